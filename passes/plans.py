"""The ways to compute a term that `order` weighs: which trees, which layouts, and what each is predicted to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.exhaustive import best_trees
from tncompile.cost.layouts import reduced_layouts
from tncompile.cost.memory import price
from tncompile.cost.schedule import Schedule, Scheduler
from tncompile.cost.search import TreeSearch
from tncompile.ir import Network, Step, Term, Tree, dims
from tncompile.ir.edit import merge_groups, merged_axes
from tncompile.ir.tree import flatten, fold_tree, left_to_right, map_tree
from tncompile.passes.base import Context
from tncompile.passes.unroll import unrolled

DENSE, TRACED, UNMERGED = "dense", "as traced", "nothing merged"
SLACK = 2.0
"""The exhaustive search follows ways up to this many times the best of the plain candidates."""

FEW, GROWTH = 1 << 14, 4
"""Windows are written out where the file then holds few numbers, 64 KB of float32, or at most so many times as many."""


@dataclass(frozen=True)
class Candidate:
    """One way to contract a term: a tree, and the steps that run what is left of it once its subtrees of cores are
    merged. `seconds` are predicted, at each batch size; `measured` are taken on the device, where it was asked."""

    label: str
    tree: Tree
    steps: tuple[Step, ...]
    seconds: tuple[float, ...]
    measured: tuple[float, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """The measured seconds where there are any, else the predicted ones."""
        return self.measured or self.seconds

    def renamed(self, names: Mapping[str, str]) -> Candidate:
        """The same way for an equal term whose indices have other names."""
        steps = tuple(replace(s, order=tuple(names[i] for i in s.order)) for s in self.steps)
        return replace(self, steps=steps)


@dataclass(frozen=True)
class Limits:
    """How far to look: cotengra's trials, the trees kept for each batch size, the schedules kept of each tree."""

    max_trials: int
    trees: int
    schedules: int = 1


def candidates(network: Network, term: Term, context: Context, limits: Limits) -> list[Candidate]:
    """The plain ways (as traced, dense, nothing merged), and the best that the search finds for each batch size."""
    searches = [tree_search(network, term, context, batch) for batch in context.batches]
    plain: dict[Tree, str] = {_unmerged(term): UNMERGED, term.order: TRACED}
    dense = searches[0].dense()
    cores = sum(t.is_core for t in term.tensors)
    if dense is not None and (cores > 1 or cores == len(term.tensors) - 1):  # else nothing is folded
        plain[dense] = DENSE
    trees = dict(plain)
    if len(term.tensors) > 2:
        for batch, search in zip(context.batches, searches, strict=True):
            for tree in _search(network, term, context, batch, search, limits, plain):
                trees.setdefault(tree, "")
    schedulers = {tree: _schedulers(network, term, tree, context) for tree in trees}
    found: dict[Candidate, None] = {}
    for tree, label in trees.items():
        merged, prices = schedulers[tree]
        steps = dict.fromkeys(
            s.steps for p in prices for s in p.schedules(merged.order, 1 if label else limits.schedules)
        )
        for way in steps:
            found[Candidate(label, tree, way, tuple(p.price(way).seconds for p in prices))] = None
    return list(found)


def held(network: Network, term: Term, tree: Tree) -> Iterator[tuple[tuple[int, ...], int]]:
    """The cores that a file holds for an order: each merged one, or where that is smaller, those it is made of; as
    positions, with how many numbers it has."""
    for part in constant_parts(term, tree):
        positions = tuple(sorted(flatten(part)))
        single = {p: math.prod(int(n) for n in term.tensors[p].shape) for p in positions}
        merged = math.prod(int(i.size) for i in merged_axes(term, positions, network.output.indices))
        if sum(single.values()) <= merged:
            yield from (((p,), count) for p, count in single.items())
        else:
            yield positions, merged


def grows(network: Network, term: Term, tree: Tree) -> bool:
    """Whether an order merges cores into one that has more numbers than they have."""
    kept = [positions for positions, _ in held(network, term, tree)]
    parts = [tuple(sorted(flatten(part))) for part in constant_parts(term, tree)]
    return any(part not in kept for part in parts)


def ways_of(
    network: Network, term: Term, context: Context, search: Callable[[Network, Term], list[Candidate]]
) -> dict[Candidate, Term]:
    """What a search finds for a term and for the term with its windows written out as cores, with the term of each.

    Where the context is compact, only what does not grow; where windows are written out, only what grows little.
    """
    ways = dict.fromkeys(search(network, term), term)
    if context.compact:
        return {way: term for way in ways if not grows(network, term, way.tree)}
    written_out = unrolled(network, term)
    if written_out is not None:
        whole = replace(network, terms=(written_out, *network.constants))
        most = max(FEW, GROWTH * sum(math.prod(map(int, core.shape)) for core in term.cores))
        for way in search(whole, written_out):
            if sum(count for _, count in held(whole, written_out, way.tree)) <= most:
                ways[replace(way, label="")] = written_out
    return ways


def fastest(network: Network, term: Term, context: Context, limits: Limits) -> tuple[float, ...]:
    """The least predicted seconds of the `candidates` of a term, at each batch size."""
    ways = candidates(network, term, context, limits)
    return tuple(map(min, zip(*(way.seconds for way in ways), strict=True)))


def estimate(network: Network, term: Term, context: Context) -> tuple[float, ...]:
    """Seconds of a good way to compute a term at each batch size, without the long search: for what asks often."""
    if all(dims.is_static(i.size) for i in (*term.indices.values(), *network.output.indices)):
        (seconds,) = _estimate(network, term, replace(context, batches=context.batches[:1]))
        return (seconds,) * len(context.batches)
    return _estimate(network, term, context)


def _estimate(network: Network, term: Term, context: Context) -> tuple[float, ...]:
    searches = [tree_search(network, term, context, batch) for batch in context.batches]
    dense = searches[0].dense()
    trees = dict.fromkeys((term.order, _unmerged(term), *([] if dense is None else [dense])))
    if len(term.tensors) > 2:
        trees |= dict.fromkeys(search.refined(term.order) for search in {searches[0], searches[-1]})
    found = [_schedulers(network, term, tree, context) for tree in trees]
    return tuple(
        min(prices[k].schedule(merged.order).seconds for merged, prices in found) for k in range(len(searches))
    )


def _search(
    network: Network,
    term: Term,
    context: Context,
    batch: int,
    search: TreeSearch,
    limits: Limits,
    plain: Mapping[Tree, str],
) -> list[Tree]:
    """The trees that may be best at one batch size."""
    prices = scheduler(network, term, context, batch)
    bound = min(prices.schedule(tree).seconds for tree in plain)
    exhaustive = best_trees(prices, search.merge_order, limits.trees, SLACK * bound)
    if exhaustive is not None:
        return exhaustive
    starts = dict.fromkeys((*search.orders(limits.max_trials), *plain))
    trees = [*starts, *map(search.refined, starts)]
    if not search.has_many_merges:
        trees += sorted(search.merges(), key=search.estimate)[: 2 * limits.trees]
    return trees


def _unmerged(term: Term) -> Tree:
    """The operands first, then core after core: nothing is computed at compile time."""
    return left_to_right(sorted(range(len(term.tensors)), key=lambda p: term.tensors[p].is_core))


def _schedulers(network: Network, term: Term, tree: Tree, context: Context) -> tuple[Term, list[Scheduler]]:
    merged = merge_constants(network, term, tree, shapes_only=True)
    return merged, [scheduler(network, merged, context, batch) for batch in context.batches]


def scheduler(
    network: Network, term: Term, context: Context, batch: int, kind: type[Scheduler] = Scheduler
) -> Scheduler:
    """The scheduler of one term of a network at one batch size."""
    itemsize = np.dtype(network.dtype).itemsize
    sizes = context.index_sizes(network, batch)
    output = network.output
    return kind(
        term,
        output.axes,
        sizes,
        context.profile,
        itemsize,
        shown=output.name in context.outputs,
        in_order=output.name in context.attended,
        images=context.images,
        added=added(network, context),
        awaited=output.name in context.images,
    )


def added(network: Network, context: Context) -> int:
    """How often something is added to the one term that computes: constants, and an image that is as it was."""
    computed = [term for term in network.moving if len(term.tensors) > 1]
    others = [term for term in network.moving if len(term.tensors) == 1]
    if len(computed) != 1 or any(term.tensors[0].name not in context.images for term in others):
        return 0
    return len(others) + bool(network.constants)


def tree_search(network: Network, term: Term, context: Context, batch: int) -> TreeSearch:
    """The search of one term of a network at one batch size."""
    output = tuple(i.name for i in network.output.indices)
    inputs = reduced_layouts(term, output)
    core = [t.is_core for t in term.tensors]
    kept = (*(name for name in output if name in term.indices), *sorted(term.slid))
    return TreeSearch(inputs, core, kept, context.index_sizes(network, batch), context.profile)


def dense_tree(network: Network, term: Term, context: Context, batch: int) -> Tree | None:
    """The order that first merges all cores of a term; None where their product is too large."""
    return tree_search(network, term, context, batch).dense()


def cost_of(network: Network, term: Term, tree: Tree | None, context: Context, batch: int) -> Schedule:
    """Predicted cost of one order of a term; without a tree, of its own steps."""
    if tree is not None:
        return scheduler(network, term, context, batch).schedule(tree)
    if not term.slices:
        return scheduler(network, term, context, batch).price(term.steps or ())
    itemsize = np.dtype(network.dtype).itemsize
    return price(term, network.output.axes, context.index_sizes(network, batch), context.profile, itemsize)


def schedules(network: Network, term: Term, context: Context) -> list[tuple[Step, ...]]:
    """The best steps of a term, in its order, for each batch size; each once."""
    found = (scheduler(network, term, context, batch).schedule(term.order).steps for batch in context.batches)
    return list(dict.fromkeys(found))


def merge_constants(network: Network, term: Term, tree: Tree, shapes_only: bool = False) -> Term:
    """Contract every largest subtree of cores alone; the term's order becomes what is left of `tree`.

    With `shapes_only` the new cores have no numbers of their own, which is enough to schedule the term.
    """
    groups = []
    for part in constant_parts(term, tree):
        positions = sorted(flatten(part))
        if len(positions) > 1:
            groups.append((positions, map_tree(part, positions.index)))
    term = replace(term, order=tree, steps=None, slices=())
    return merge_groups(term, groups, network.output.indices, network.dtype, shapes_only)


def constant_parts(term: Term, tree: Tree) -> list[Tree]:
    """The largest subtrees of cores alone, from left to right."""
    Part = tuple[Tree, bool, list[Tree]]

    def leaf(position: int) -> Part:
        core = term.tensors[position].is_core
        return position, core, [position] if core else []

    def join(a: Part, b: Part) -> Part:
        tree, core = (a[0], b[0]), a[1] and b[1]
        return tree, core, [tree] if core else a[2] + b[2]

    return fold_tree(tree, leaf, join)[2]


def key_of(network: Network, term: Term, context: Context) -> tuple[object, ...]:
    """What decides a search: the shapes and roles of the tensors, not their names or numbers."""
    number = {name: k for k, name in enumerate(dict.fromkeys((*term.indices, *(w.out for w in term.windows))))}
    tensors = tuple(
        (t.is_core, t.name in context.images, tuple((number[i.name], i.size) for i in t.indices)) for t in term.tensors
    )
    windows = tuple(w.form(number) for w in term.windows)
    name, output = network.output.name, network.output.form(number)
    place = name in context.outputs, name in context.attended, name in context.images, added(network, context)
    return tensors, output, windows, term.order, network.dtype, place


def label_of(term: Term, tree: Tree) -> str:
    """``(x A) (B*C)``: cores merged at compile time joined by a star."""

    Part = tuple[str, list[int], bool]  # as text, the positions in it, whether it has cores only

    def show(positions: list[int], core: bool) -> Part:
        return "*".join(_short(term.tensors[p].name) for p in sorted(positions)), positions, core

    def join(a: Part, b: Part) -> Part:
        positions = a[1] + b[1]
        return show(positions, True) if a[2] and b[2] else (f"({a[0]} {b[0]})", positions, False)

    return fold_tree(tree, lambda p: show([p], term.tensors[p].is_core), join)[0]


def _short(name: str) -> str:
    """``factor_0*factor_1`` for ``fc.factor_0*factor_1``; of a name that is cut short, the dots stay."""
    return "*".join("..." if part.startswith("...") else part.rpartition(".")[2] for part in name.split("*"))


def best_of(candidates: Sequence[Candidate], label: str) -> Candidate | None:
    """The fastest candidate of a label, over all batch sizes."""
    return min((c for c in candidates if c.label == label), key=lambda c: sum(c.times), default=None)
