"""Choose the order of modes of values between networks, which elementwise operations leave as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tncompile.cost.exhaustive import best_trees
from tncompile.cost.layouts import classify
from tncompile.cost.schedule import KEPT_LAYOUTS, OpenEnded
from tncompile.ir import Network, Opaque, Program, Step, Switch, Term, Tree, networks_of
from tncompile.ir.edit import CannotEdit
from tncompile.ir.tree import flatten
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.explain import instead
from tncompile.passes.plans import key_of, scheduler
from tncompile.passes.regions import Modes, Order, Region, modes_of, regions, relaid

MOST_TENSORS, TREES = 6, 2
"""Terms of so many tensors may be contracted in another order, one of the best so many of each batch size."""

MOST_TRIED = 4
"""Of up to so many modes every order is tried (24), of more those that a network leaves or reads for free."""


@dataclass(frozen=True)
class Layout(Pass):
    """Let a value between networks lie as they leave and read it, through relu and its like.

    ```
    network y                            steps .. -> [b, o2, o1], then a Transpose
      -> y[b, (o1 o2)]
    opaque z = relu(y)
    network w                            a Transpose, then steps on [b, i2, i1]
      operand z[b, (i1 i2)]
    ->
    network y                            steps .. -> [b, o2, o1]
      -> y[b, (o2 o1)]
    opaque z = relu(y)
    network w                            steps on [b, i2, i1]
      operand z[b, (i2 i1)]
    ```

    1. Networks compute the value; operations on each element alone (`tncompile.passes.pointwise`), and in the end
       networks, are all that reads it or what they make of it. It is no output of the model. Values that networks
       alone read stay: attention is made of such, and must be told by them when the model is emitted.
    2. The modes of all these networks nest. A batch may move behind others; of two run-time sizes in front none does.
    3. With the networks around it ordered and scheduled anew, their cores as they are, the predicted time falls by
       `margin` on average and rises by more than that at no batch size; else nothing is changed.
    4. Values joined by a sum or a product of whole networks are also tried together.
    5. Plans were chosen by prediction: what was measured is not changed by what is not.

    The pass needs the schedules of `order`. `sweeps`: how often it may look at a value again, as the networks around it
    have changed.
    """

    margin: float = 0.02
    sweeps: int = 3

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        if context.timer is not None:
            return program, ()
        changes: dict[frozenset[str], Change] = {}
        work = _Work(context)
        for _ in range(self.sweeps):
            before = program
            for region in (r for r in regions(program) if r.elementwise):
                program = self._region(program, region, work, changes)
            if program is before:
                break
        return program, tuple(changes.values())

    def _region(self, program: Program, region: Region, work: _Work, changes: dict[frozenset[str], Change]) -> Program:
        """The program with one region in the best order found."""
        try:
            modes = modes_of(program, region)
        except CannotEdit as reason:
            what = f"{_names(region)} in another order of modes"
            changes.setdefault(region.values, Change(region.first, what, str(reason), declined=True))
            return program
        now = work.seconds(program, region)
        best, least, chosen = program, now, None
        for order in work.candidates(modes, region):
            found = relaid(modes, region, order, work.rescheduled)
            seconds = work.seconds(found, region)
            if all(new <= old * (1 + self.margin) for new, old in zip(seconds, now, strict=True)) and _mean(
                seconds, now
            ) < _mean(least, now):
                best, least, chosen = found, seconds, order
        if chosen is None or _mean(least, now) > 1 - self.margin:
            return program
        changes[region.values] = _change(region, modes, chosen, work.context, now, least)
        return best


def _mean(new: Sequence[float], old: Sequence[float]) -> float:
    """The geometric mean of the ratios."""
    logs = [math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in zip(new, old, strict=True)]
    return math.exp(sum(logs) / len(logs))


def _change(
    region: Region, modes: Modes, order: Order, context: Context, before: Sequence[float], after: Sequence[float]
) -> Change:
    node = next(n for n in modes.program.nodes if n.value.name == region.first)
    names = [i.name for i in networks_of(node)[-1].output.indices]
    lie = f"{' '.join(names[place] for place in order)} instead of {' '.join(names)}"
    details = {
        "batches": context.batches,
        "microseconds": tuple(s * 1e6 for s in after),
        "before": tuple(s * 1e6 for s in before),
    }
    what = f"{_names(region)} in the order {lie}"
    why = f"predicted {instead(after, before, context)}, with the networks around"
    return Change(region.first, what, why, details=details)


def _names(region: Region) -> str:
    few = [region.first, *sorted(region.values - {region.first})[:2]]
    more = len(region.values) - len(few)
    return ", ".join(few) + (f" and {more} more" if more else "")


@dataclass(frozen=True)
class _Work:
    """Schedules networks in a context; equal ones are scheduled once."""

    context: Context
    known: dict[object, tuple[tuple[str, ...], Tree, tuple[Step, ...]]] = field(default_factory=dict)

    def seconds(self, program: Program, region: Region) -> tuple[float, ...]:
        """What the networks that touch a region take at each batch size, as they are scheduled."""
        total = [0.0] * len(self.context.batches)
        for node in program.nodes:
            if isinstance(node, Opaque) or not region.touches(node):
                continue
            for k, batch in enumerate(self.context.batches):
                network = node.case(batch) if isinstance(node, Switch) else node
                total[k] += sum(self._price(network, term, k) for term in network.moving)
        return tuple(total)

    def _price(self, network: Network, term: Term, k: int) -> float:
        return scheduler(network, term, self.context, self.context.batches[k]).price(term.steps or ()).seconds

    def rescheduled(self, network: Network) -> Network:
        """A network whose terms run the best steps for the layouts of its operands and its output."""
        terms = tuple(t if t.is_constant else self._best(network, t) for t in network.terms)
        return replace(network, terms=terms)

    def _best(self, network: Network, term: Term) -> Term:
        """A term in the order of its tensors, and with the steps, that have the least sum of ratios to the best at each
        batch size."""
        names = tuple(term.indices)
        number = {name: k for k, name in enumerate(names)}
        now = tuple((s.left, s.right, s.form, tuple(number[n] for n in s.order)) for s in term.steps or ())
        key = (key_of(network, term, self.context), now)
        if key not in self.known:
            self.known[key] = (names, *self._search(network, term))
        first, tree, steps = self.known[key]
        new = dict(zip(first, names, strict=True))
        return replace(term, order=tree, steps=tuple(replace(s, order=tuple(new[n] for n in s.order)) for s in steps))

    def _search(self, network: Network, term: Term) -> tuple[Tree, tuple[Step, ...]]:
        schedulers = [scheduler(network, term, self.context, batch) for batch in self.context.batches]
        ways = {(term.order, term.steps or ()): None}
        for prices in schedulers:
            present = prices.schedule(term.order)
            others = (
                best_trees(prices, _unmerged, TREES, present.seconds) if 2 < len(term.tensors) <= MOST_TENSORS else None
            )
            for tree in dict.fromkeys([term.order, *(others or ())]):
                ways[tree, prices.schedule(tree).steps] = None
        times = [[s.price(steps).seconds for s in schedulers] for _, steps in ways]
        least = [max(min(column), 1e-12) for column in zip(*times, strict=True)]
        worth = [sum(a / b for a, b in zip(row, least, strict=True)) for row in times]
        return list(ways)[worth.index(min(worth))]

    # ------------------------------------------------------------------------------ orders to try

    def candidates(self, modes: Modes, region: Region) -> list[Order]:
        """Orders of a region's modes that may be better than the present one."""
        every = modes.orders(MOST_TRIED)
        if every is not None:
            return every
        found: dict[Order, None] = {}
        for node in modes.program.nodes:
            for network in networks_of(node) if region.touches(node) else ():
                for names, layout in (*self._left(network, region), *_read(network, region)):
                    order = modes.allowed(tuple(names.index(name) for name in layout))
                    found[order] = None
        found.pop(tuple(range(len(modes.flat))), None)
        return list(found)

    def _left(self, network: Network, region: Region) -> Iterator[tuple[list[str], tuple[str, ...]]]:
        """The layouts that a network's terms end in where nothing asks for another: the names of its output's modes,
        and those names in the order they come out."""
        if network.output.name not in region.values:
            return
        names = [i.name for i in network.output.indices]
        for term in network.moving:
            for batch in self.context.batches if {*names} <= {*term.indices} else ():
                free = scheduler(network, term, self.context, batch, OpenEnded)
                for schedule in free.schedules(term.order, KEPT_LAYOUTS):
                    yield names, schedule.steps[-1].order if schedule.steps else free.layout(0)


def _unmerged(group: tuple[int, ...]) -> None:
    """No cores are merged here: that would change what is computed at load, and the file."""


def _read(network: Network, region: Region) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """The layouts that the first step on an operand reads as they lie: the names of its modes, and those in order."""
    output = {i.name for i in network.output.indices}
    for term in network.moving:
        for place, tensor in enumerate(term.tensors):
            names = [i.name for i in tensor.indices]
            other = _meets(term.order, place)
            if tensor.is_core or tensor.name not in region.values or other is None or len({*names}) < len(names):
                continue
            there = flatten(other)
            outside = output | {*_names_on(term, {*range(len(term.tensors))} - {place, *there})}
            with_it = tuple(n for n in _names_on(term, there) if n in outside or n in names)
            c = classify(tuple(names), with_it, outside)
            for before in range(len(c.left) + 1):  # the modes in front; all of them for a matmul
                yield names, (*c.left[:before], *c.batch, *c.summed, *c.left[before:])
            yield names, (*(n for n in names if n not in c.summed), *c.summed)
            yield names, (*c.batch, *c.left, *c.summed)


def _meets(tree: Tree, place: int) -> Tree | None:
    """What a tensor is contracted with first; None where it is alone."""
    if isinstance(tree, int):
        return None
    for branch, other in (tree, tree[::-1]):
        if branch == place:
            return other  # type: ignore[no-any-return]
        if place in flatten(branch):
            return _meets(branch, place)
    return None


def _names_on(term: Term, places: Sequence[int] | set[int]) -> dict[str, None]:
    return dict.fromkeys(i.name for place in places for i in term.tensors[place].indices)
