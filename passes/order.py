"""Choose the contraction of every term: which cores to merge at compile time, in which order to run the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.memory import price
from tncompile.cost.schedule import Schedule, Scheduler, reduced_layout
from tncompile.cost.search import TreeSearch
from tncompile.ir import Network, Node, Program, Step, Term, Tree
from tncompile.ir.core import left_to_right
from tncompile.ir.edit import merge_tensors, unique_cores
from tncompile.ir.evaluate import flatten
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.fold import merge_like_terms


@dataclass(frozen=True)
class Candidate:
    """One way to contract a term: a tree, the steps that run what is left of it once its subtrees of cores are
    merged, and their predicted seconds at each batch size."""

    label: str
    tree: Tree
    steps: tuple[Step, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Order(Pass):
    """Merge, order and schedule each term by one search on one cost.

    ```
    term x[b, i] A[i, r] B[r, o]        order ((x A) B)        with b=256, r large
    ->
    term x[b, i] A*B[i, o]              order (x A*B)          step matmul -> b o
    ```

    1. A subtree made only of cores is computed at compile time, so dense, every partial merge and every order
       of the rest are candidates of one search (`tncompile.cost.search`).
    2. The `keep` candidates with the lowest bound at each batch size are scheduled, layouts and all.
    3. A candidate must be faster than the dense layer at every batch size, by `margin` (the cost is a
       prediction). Of those, the dense layer among them, the one is chosen whose worst ratio to the best
       candidate of a batch size is least.
    """

    max_trials: int = 16
    keep: int = 16
    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        known: dict[object, tuple[tuple[str, ...], list[Candidate]]] = {}
        for node in program.nodes:
            if isinstance(node, Network):
                moving = [self._term(node, t, context, known, changes) for t in node.terms if not t.is_constant]
                # what folded to dense on one operand is one dense layer
                moving = [_scheduled(node, t, context) for t in merge_like_terms(node, moving, changes)]
                node = replace(node, terms=(*moving, *(t for t in node.terms if t.is_constant)))
            nodes.append(node)
        return unique_cores(replace(program, nodes=tuple(nodes))), changes

    def _term(
        self,
        network: Network,
        term: Term,
        context: Context,
        known: dict[object, tuple[tuple[str, ...], list[Candidate]]],
        changes: list[Change],
    ) -> Term:
        key, names = _key(network, term), tuple(term.indices)
        if key not in known:
            known[key] = (names, self._candidates(network, term, context))
        first, candidates = known[key]
        candidates = [_renamed(c, dict(zip(first, names, strict=True))) for c in candidates]
        best = self._choose(candidates)
        chosen = replace(merge_constants(network, term, best.tree), steps=best.steps)
        if _overflows(term, chosen):  # in float16 a product of cores may not fit where each of them does
            best = self._unmerged(network, term, context)
            chosen = replace(term, order=best.tree, steps=best.steps)
        if len(term.tensors) > 1:
            changes.append(_explain(network, term, chosen, best, candidates, context))
        return chosen

    def _candidates(self, network: Network, term: Term, context: Context) -> list[Candidate]:
        searches = [search_of(network, term, context, batch) for batch in context.batches]
        trees: dict[Tree, str] = {term.order: "as traced"}
        dense = searches[0].dense()
        if dense is not None:
            trees[dense] = "dense"
        if len(term.tensors) > 2:
            for search in {id(s): s for s in (searches[0], searches[-1])}.values():  # the extremes
                merges, complete = search.merges()
                trees |= {tree: "" for tree in merges if tree not in trees}
                if not complete:
                    trees.setdefault(search.hyper(self.max_trials), "")
        good = {tree for tree, label in trees.items() if label}
        for search in searches:
            good |= {*sorted(trees, key=search.estimate)[: self.keep]}
        return [c for tree, label in trees.items() if tree in good for c in _ways(network, term, tree, label, context)]

    @staticmethod
    def _unmerged(network: Network, term: Term, context: Context) -> Candidate:
        """The operands first, then core after core: nothing is computed at compile time."""
        positions = sorted(range(len(term.tensors)), key=lambda p: term.tensors[p].is_core)
        return _ways(network, term, left_to_right(positions), "nothing merged", context)[-1]

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate:
        fastest = np.min([c.seconds for c in candidates], axis=0)
        dense = _best_of(candidates, "dense")

        def worst(candidate: Candidate) -> float:
            return float(np.max(np.asarray(candidate.seconds) / np.maximum(fastest, 1e-12)))

        def never_slower(candidate: Candidate) -> bool:
            if dense is None or candidate.label == "dense":
                return True
            return all(s * (1 + self.margin) <= d for s, d in zip(candidate.seconds, dense.seconds, strict=True))

        return min(filter(never_slower, candidates), key=worst)


def scheduler(network: Network, term: Term, context: Context, batch: int) -> Scheduler:
    """The scheduler of one term of a network at one batch size."""
    itemsize = np.dtype(network.dtype).itemsize
    sizes = context.index_sizes(network, batch)
    return Scheduler(term, network.output.indices, sizes, context.profile, itemsize)


def _renamed(candidate: Candidate, names: Mapping[str, str]) -> Candidate:
    """The same way for an equal term whose indices have other names."""
    steps = tuple(replace(s, order=tuple(names[i] for i in s.order)) for s in candidate.steps)
    return replace(candidate, steps=steps)


def _ways(network: Network, term: Term, tree: Tree, label: str, context: Context) -> list[Candidate]:
    """The best schedule of a tree for each batch size, each priced at all of them."""
    merged = merge_constants(network, term, tree, shapes_only=True)
    schedulers = [scheduler(network, merged, context, batch) for batch in context.batches]
    found = schedules(network, merged, context)
    return [Candidate(label, tree, steps, tuple(s.price(steps).seconds for s in schedulers)) for steps in found]


def schedules(network: Network, term: Term, context: Context) -> list[tuple[Step, ...]]:
    """The best steps of a term, in its order, for each batch size; each once."""
    found = (scheduler(network, term, context, batch).schedule(term.order).steps for batch in context.batches)
    return list(dict.fromkeys(found))


def _scheduled(network: Network, term: Term, context: Context) -> Term:
    if term.steps is not None:
        return term
    best = scheduler(network, term, context, context.batches[-1]).schedule(term.order)
    return replace(term, steps=best.steps)


def _overflows(before: Term, after: Term) -> bool:
    def finite(term: Term) -> bool:
        return all(bool(np.isfinite(c.data).all()) for c in term.cores if c.data is not None)

    return finite(before) and not finite(after)


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


def search_of(network: Network, term: Term, context: Context, batch: int) -> TreeSearch:
    """The search of one term of a network at one batch size."""
    output = tuple(i.name for i in network.output.indices)
    inputs = [reduced_layout(term, p, output) for p in range(len(term.tensors))]
    core = [t.is_core for t in term.tensors]
    kept = tuple(name for name in output if name in term.indices)
    return TreeSearch(inputs, core, kept, context.index_sizes(network, batch), context.profile)


def dense_tree(network: Network, term: Term, context: Context, batch: int) -> Tree | None:
    """The order that first merges all cores of a term; None where their product is too large."""
    return search_of(network, term, context, batch).dense()


def cost_of(network: Network, term: Term, tree: Tree | None, context: Context, batch: int) -> Schedule:
    """Predicted cost of one order of a term; without a tree, of its own steps."""
    if tree is not None:
        return scheduler(network, term, context, batch).schedule(tree)
    itemsize = np.dtype(network.dtype).itemsize
    return price(term, network.output.indices, context.index_sizes(network, batch), context.profile, itemsize)


def _key(network: Network, term: Term) -> object:
    """What decides a search: the shapes and roles of the tensors, not their names or numbers."""
    number = {name: k for k, name in enumerate(term.indices)}
    tensors = tuple((t.is_core, tuple((number[i.name], i.size) for i in t.indices)) for t in term.tensors)
    output = tuple((number.get(i.name), i.size) for i in network.output.indices)
    return tensors, output, term.order, network.dtype


def _label(term: Term, tree: Tree) -> str:
    """``(x A) (B*C)``: cores merged at compile time joined by a star."""

    def show(tree: Tree) -> str:
        positions = flatten(tree)
        if isinstance(tree, int) or all(term.tensors[p].is_core for p in positions):
            return "*".join(_short(term.tensors[p].name) for p in sorted(positions))
        return "(" + " ".join(show(b) for b in tree) + ")"

    return show(tree)


def _best_of(candidates: Sequence[Candidate], label: str) -> Candidate | None:
    return min((c for c in candidates if c.label == label), key=lambda c: sum(c.seconds), default=None)


def _short(name: str) -> str:
    """``factor_0*factor_1`` for ``fc.factor_0*factor_1``; of a name that is cut short, the dots stay."""
    return "*".join("..." if part.startswith("...") else part.rpartition(".")[2] for part in name.split("*"))


def _explain(
    network: Network, before: Term, after: Term, best: Candidate, candidates: Sequence[Candidate], context: Context
) -> Change:
    merged = len(before.cores) - len(after.cores)
    dense, traced = (_best_of(candidates, label) for label in ("dense", "as traced"))
    what = f"order {_label(after, after.order)}"
    if len(after.cores) == 1 and merged:
        what = f"folded to dense: {len(before.cores)} cores are one"
    elif merged:
        what = f"{what}, {len(before.cores)} cores are {len(after.cores)}"

    def against(other: Candidate | None, name: str) -> str:
        if other is None or other.tree == best.tree:
            return ""
        return f"{name} {_microseconds(other.seconds[-1])}"

    others = ", ".join(t for t in (against(dense, "dense"), against(traced, "as traced")) if t)
    why = f"predicted {_microseconds(best.seconds[-1])} at batch {context.batches[-1]}; {others}" if others else ""
    ranked = sorted(candidates, key=lambda c: sum(c.seconds), reverse=True)  # of equal labels the best stays
    tried = {c.label or _label(before, c.tree): [round(s * 1e6, 3) for s in c.seconds] for c in ranked}
    return Change(network.output.name, what, why, details={"batches": context.batches, "microseconds": tried})


def _microseconds(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``, ``7.89 s``."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"
