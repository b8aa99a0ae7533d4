"""The ways to compute a term that `order` weighs: which trees, which layouts, and what each is predicted to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.exhaustive import best_trees
from tncompile.cost.memory import price
from tncompile.cost.schedule import Schedule, Scheduler, reduced_layout
from tncompile.cost.search import TreeSearch
from tncompile.ir import Network, Step, Term, Tree
from tncompile.ir.core import left_to_right
from tncompile.ir.edit import merge_tensors
from tncompile.ir.evaluate import flatten
from tncompile.passes.base import Context

DENSE, TRACED, UNMERGED = "dense", "as traced", "nothing merged"
SLACK = 2.0
"""The exhaustive search follows ways up to this many times the best of the plain candidates."""


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
    if dense is not None:
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
    trees = dict.fromkeys(search.merges()[0])
    trees[search.hyper(limits.max_trials)] = None
    return sorted(trees, key=search.estimate)[: 2 * limits.trees]


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
    shown = [tuple(i.name for i in axis) for axis in network.output.axes]
    if network.output.name not in context.outputs:
        shown = []
    return kind(term, network.output.indices, sizes, context.profile, itemsize, shown)


def tree_search(network: Network, term: Term, context: Context, batch: int) -> TreeSearch:
    """The search of one term of a network at one batch size."""
    output = tuple(i.name for i in network.output.indices)
    inputs = [reduced_layout(term, p, output) for p in range(len(term.tensors))]
    core = [t.is_core for t in term.tensors]
    kept = tuple(name for name in output if name in term.indices)
    return TreeSearch(inputs, core, kept, context.index_sizes(network, batch), context.profile)


def dense_tree(network: Network, term: Term, context: Context, batch: int) -> Tree | None:
    """The order that first merges all cores of a term; None where their product is too large."""
    return tree_search(network, term, context, batch).dense()


def cost_of(network: Network, term: Term, tree: Tree | None, context: Context, batch: int) -> Schedule:
    """Predicted cost of one order of a term; without a tree, of its own steps."""
    if tree is not None:
        return scheduler(network, term, context, batch).schedule(tree)
    itemsize = np.dtype(network.dtype).itemsize
    return price(term, network.output.indices, context.index_sizes(network, batch), context.profile, itemsize)


def schedules(network: Network, term: Term, context: Context) -> list[tuple[Step, ...]]:
    """The best steps of a term, in its order, for each batch size; each once."""
    found = (scheduler(network, term, context, batch).schedule(term.order).steps for batch in context.batches)
    return list(dict.fromkeys(found))


def merge_constants(network: Network, term: Term, tree: Tree, shapes_only: bool = False) -> Term:
    """Contract every largest subtree of cores alone; the term's order becomes what is left of `tree`.

    With `shapes_only` the new cores have no numbers of their own, which is enough to schedule the term.
    """
    groups: list[tuple[int, ...]] = []

    def find(tree: Tree) -> None:
        positions = flatten(tree)
        if all(term.tensors[p].is_core for p in positions):
            if len(positions) > 1:
                groups.append(positions)
        elif not isinstance(tree, int):
            for branch in tree:
                find(branch)

    find(tree)
    term = replace(term, order=tree, steps=None, slices=())
    tags = list(range(len(term.tensors)))  # positions shift as tensors go
    for group in groups:
        now = [tags.index(p) for p in group]
        term = merge_tensors(term, now, network.output.indices, network.dtype, shapes_only)
        tags = [p for k, p in enumerate(tags) if k == min(now) or k not in now]
    return term


def key_of(network: Network, term: Term, context: Context) -> tuple[object, ...]:
    """What decides a search: the shapes and roles of the tensors, not their names or numbers."""
    number = {name: k for k, name in enumerate(term.indices)}
    tensors = tuple((t.is_core, tuple((number[i.name], i.size) for i in t.indices)) for t in term.tensors)
    output = tuple(tuple((number.get(i.name), i.size) for i in axis) for axis in network.output.axes)
    return tensors, output, term.order, network.dtype, network.output.name in context.outputs


def label_of(term: Term, tree: Tree) -> str:
    """``(x A) (B*C)``: cores merged at compile time joined by a star."""

    def show(tree: Tree) -> str:
        positions = flatten(tree)
        if isinstance(tree, int) or all(term.tensors[p].is_core for p in positions):
            return "*".join(_short(term.tensors[p].name) for p in sorted(positions))
        return "(" + " ".join(show(b) for b in tree) + ")"

    return show(tree)


def _short(name: str) -> str:
    """``factor_0*factor_1`` for ``fc.factor_0*factor_1``; of a name that is cut short, the dots stay."""
    return "*".join("..." if part.startswith("...") else part.rpartition(".")[2] for part in name.split("*"))


def best_of(candidates: Sequence[Candidate], label: str) -> Candidate | None:
    """The fastest candidate of a label, over all batch sizes."""
    return min((c for c in candidates if c.label == label), key=lambda c: sum(c.times), default=None)
