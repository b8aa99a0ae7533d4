"""Keep the intermediates of every network under a limit of memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.layouts import reduced_layout
from tncompile.cost.memory import network_peak, operand_elements, price, term_peak
from tncompile.errors import TNCompileError
from tncompile.ir import Network, Node, Opaque, Program, Slice, Switch, Term, Tree
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import merge_constants, schedules, tree_search

_COUNTS = sorted(f * 2**k for f in (2, 3) for k in range(12))


@dataclass(frozen=True)
class _Option:
    """One way to compute a term: the tree and the steps of a candidate, or what it has now, in some slices."""

    tree: Tree | None
    term: Term
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Limit(Pass):
    """Choose another order, or compute in slices, where a network would need more memory than `max_memory`.

    ```
    term x[b, i] A[i, r] B[r, o]        r large: the intermediate [b, r] does not fit
    ->
    term x[b, i] A[i, r] B[r, o]        slices r=4      four times over a quarter of r, and the results added
    ```

    1. The context has a limit, and the predicted peak at some batch size is over it.
    2. Candidates are the present order and cotengra's for other merges of the cores, each whole or with one index,
       or the batch, in the fewest slices that fit; up to `max_slices`. The one predicted fastest is taken.
    3. A run-time size is sliced only where the output has it and it is the only one of its term.

    TNCompileError where nothing fits. The pass must come last: it changes schedules.
    """

    max_slices: int = 64

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        for node in program.nodes:
            if context.max_memory is not None and not isinstance(node, Opaque):
                node = self._limited(node, context, context.max_memory, changes)
            nodes.append(node)
        return replace(program, nodes=tuple(nodes)), changes

    def _limited(self, node: Network | Switch, context: Context, limit: int, changes: list[Change]) -> Node:
        """A network under the limit; of a switch, each case at the batch sizes it serves."""
        if isinstance(node, Network):
            return self._network(node, context, limit, changes)
        served = zip(node.cases, _served(node, context), strict=True)
        cases = (self._network(case, replace(context, batches=sizes), limit, changes) for case, sizes in served)
        return replace(node, cases=tuple(cases))

    def _network(self, network: Network, context: Context, limit: int, changes: list[Change]) -> Network:
        before = peaks(network, context)
        if max(before) <= limit:
            return network
        terms = list(network.terms)
        for position, term in enumerate(terms):
            if not term.is_constant and max(peaks(replace(network, terms=tuple(terms)), context)) > limit:
                terms[position] = self._term(network, term, context, limit)
        after = replace(network, terms=tuple(terms))
        if max(peaks(after, context)) > limit:
            raise _impossible(network, context, limit, max(before))
        slices = [f"{s.index} in {s.count} slices" for t in after.terms for s in t.slices]
        what = ", ".join(slices) or "another order"
        why = f"{_megabytes(max(peaks(after, context)))} at once instead of {_megabytes(max(before))}"
        details = {"limit": limit, "batches": context.batches, "bytes": peaks(after, context), "before": before}
        changes.append(Change(network.output.name, what, f"{why}; the limit is {_megabytes(limit)}", details=details))
        return after

    def _term(self, network: Network, term: Term, context: Context, limit: int) -> Term:
        """The fastest way to compute a term in what the other terms and the operands leave."""
        rooms = _rooms(network, term, context, limit)
        options = [o for base in _orders(network, term, context) for o in self._fitting(network, base, context, rooms)]
        if not options:
            raise _impossible(network, context, limit, max(peaks(network, context)))
        best = min(options, key=lambda o: sum(o.seconds))
        whole = term if best.tree is None else merge_constants(network, term, best.tree)
        return replace(whole, steps=best.term.steps, slices=best.term.slices)

    def _fitting(self, network: Network, base: _Option, context: Context, rooms: Sequence[int]) -> Iterator[_Option]:
        """A way to compute a term whole, if that fits, else for each index in the fewest slices that fit."""
        output = [i.name for i in network.output.indices]
        sizes = [context.index_sizes(network, batch) for batch in context.batches]

        def fits(term: Term) -> bool:
            return all(term_peak(term, output, s)[0] <= room for s, room in zip(sizes, rooms, strict=True))

        if fits(base.term):
            yield base
            return
        for index in _sliceable(network, base.term):
            size = network.indices[index].size
            most = self.max_slices if isinstance(size, str) else min(size, self.max_slices)
            for count in (c for c in _COUNTS if c <= most):
                term = replace(base.term, slices=(Slice(index, count),))
                if fits(term):
                    yield replace(base, term=term, seconds=_seconds(network, term, context))
                    break


def _orders(network: Network, term: Term, context: Context) -> Iterator[_Option]:
    """The term as it is, and in the orders of other merges of its cores."""
    yield _Option(None, term, _seconds(network, term, context))
    trees: dict[Tree, None] = {}
    for batch in (context.batches[0], context.batches[-1]):
        search = tree_search(network, term, context, batch)
        found = search.merges(keep=16)
        trees |= dict.fromkeys(tree for tree in (*found, search.dense()) if tree is not None)
    for tree in trees:
        merged = merge_constants(network, term, tree, shapes_only=True)
        for steps in schedules(network, merged, context):
            scheduled = replace(merged, steps=steps)
            yield _Option(tree, scheduled, _seconds(network, scheduled, context))


def _sliceable(network: Network, term: Term) -> Iterator[str]:
    """Indices that a term can be computed in slices of."""
    output = {i.name for i in network.output.indices}
    layouts = [reduced_layout(term, p, output) for p in range(len(term.tensors))]
    symbolic = {n for n, index in term.indices.items() if isinstance(index.size, str)}
    flowing = {n for a, t in zip(layouts, term.tensors, strict=True) if not t.is_core for n in a}
    for name in dict.fromkeys(itertools.chain.from_iterable(layouts)):
        if name in term.slid:
            continue
        if name not in symbolic or (len(symbolic) == 1 and name in flowing and name in output):
            yield name


def _seconds(network: Network, term: Term, context: Context) -> tuple[float, ...]:
    itemsize = np.dtype(network.dtype).itemsize
    sizes = (context.index_sizes(network, batch) for batch in context.batches)
    return tuple(price(term, network.output.axes, s, context.profile, itemsize).seconds for s in sizes)


def _rooms(network: Network, term: Term, context: Context, limit: int) -> list[int]:
    """Elements that a term may take at each batch size, beside the operands and the results of other terms."""
    output = [i.name for i in network.output.indices]
    rooms = []
    for batch in context.batches:
        sizes = context.index_sizes(network, batch)
        others = (t for t in network.moving if t is not term)
        taken = operand_elements(network, sizes) + sum(term_peak(t, output, sizes)[1] for t in others)
        rooms.append(limit // np.dtype(network.dtype).itemsize - taken)
    return rooms


def _served(switch: Switch, context: Context) -> Iterator[tuple[int, ...]]:
    """The batch sizes planned for that each case serves; of one that serves none of them, its largest."""
    edges = (0, *switch.limits, math.inf)
    for low, high in itertools.pairwise(edges):
        inside = tuple(b for b in context.batches if low < b <= high)
        yield inside or (int(high) if high < math.inf else int(low) + 1,)


def peaks(node: Network | Switch, context: Context) -> tuple[int, ...]:
    """Predicted bytes alive at once, at each batch size."""
    itemsize = np.dtype(node.dtype).itemsize

    def peak(batch: int) -> int:
        network = node.case(batch) if isinstance(node, Switch) else node
        return network_peak(network, context.index_sizes(network, batch), itemsize)

    return tuple(map(peak, context.batches))


def _impossible(network: Network, context: Context, limit: int, needed: int) -> TNCompileError:
    sizes = context.index_sizes(network, context.batches[-1])
    output = math.prod(sizes[i.name] for i in network.output.indices)
    least = (operand_elements(network, sizes) + output) * np.dtype(network.dtype).itemsize
    return TNCompileError(
        f"{network.label} cannot be computed in {_megabytes(limit)} at batch {context.batches[-1]}: it takes "
        f"{_megabytes(needed)}, its inputs and output alone {_megabytes(least)}; allow more with --max-memory, or plan "
        "for smaller batches with --batch",
        network.source,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"
