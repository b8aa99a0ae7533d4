"""Choose the contraction of every term: which cores to merge at compile time, in which order to run the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.schedule import Schedule, Scheduler, reduced_layout
from tncompile.cost.search import TreeSearch
from tncompile.ir import Network, Node, Program, Term, Tree
from tncompile.ir.edit import map_tree, merge_tensors, unique_cores
from tncompile.ir.evaluate import flatten
from tncompile.passes.base import Change, Context, Pass


@dataclass(frozen=True)
class Candidate:
    """One way to contract a term: its tree and its predicted seconds at each batch size."""

    label: str
    tree: Tree
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
    max_seconds: float = 4.0
    keep: int = 16
    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        known: dict[object, list[Candidate]] = {}
        for node in program.nodes:
            if isinstance(node, Network):
                terms = tuple(self._term(node, term, context, known, changes) for term in node.terms)
                node = replace(node, terms=terms)
            nodes.append(node)
        return unique_cores(replace(program, nodes=tuple(nodes))), changes

    def _term(
        self,
        network: Network,
        term: Term,
        context: Context,
        known: dict[object, list[Candidate]],
        changes: list[Change],
    ) -> Term:
        if term.is_constant:
            return term
        key = _key(network, term)
        if key not in known:
            known[key] = self._candidates(network, term, context)
        candidates = known[key]
        best = self._choose(candidates)
        chosen = merge_constants(network, term, best.tree)
        schedule = scheduler(network, chosen, context, max(context.batches)).schedule(chosen.order)
        chosen = replace(chosen, steps=schedule.steps)
        if len(term.tensors) > 1:
            changes.append(_explain(network, term, chosen, best, candidates, context))
        return chosen

    def _candidates(self, network: Network, term: Term, context: Context) -> list[Candidate]:
        inputs = [reduced_layout(term, p, (i.name for i in network.output.indices)) for p in range(len(term.tensors))]
        core = [t.is_core for t in term.tensors]
        output = tuple(i.name for i in network.output.indices if i.name in term.indices)
        trees: dict[Tree, str] = {term.order: "as traced"}
        searches = [
            TreeSearch(inputs, core, output, context.index_sizes(network, batch), context.profile)
            for batch in context.batches
        ]
        dense = searches[0].dense()
        if dense is not None:
            trees[dense] = "dense"
        if len(term.tensors) > 2:
            for search in {id(s): s for s in (searches[0], searches[-1])}.values():  # the extremes
                merges, complete = search.merges()
                trees |= {tree: "" for tree in merges if tree not in trees}
                if not complete:
                    trees.setdefault(search.hyper(self.max_trials, self.max_seconds / 2), "")
        kept = {tree for tree, label in trees.items() if label}
        for search in searches:
            kept |= {*sorted(trees, key=search.estimate)[: self.keep]}
        schedulers = [scheduler(network, term, context, batch) for batch in context.batches]
        return [
            Candidate(label or _label(term, tree), tree, tuple(s.schedule(tree).seconds for s in schedulers))
            for tree, label in trees.items()
            if tree in kept
        ]

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate:
        fastest = np.min([c.seconds for c in candidates], axis=0)
        dense = next((c for c in candidates if c.label == "dense"), None)

        def worst(candidate: Candidate) -> float:
            return float(np.max(np.asarray(candidate.seconds) / np.maximum(fastest, 1e-12)))

        def never_slower(candidate: Candidate) -> bool:
            if dense is None or candidate is dense:
                return True
            return all(s * (1 + self.margin) <= d for s, d in zip(candidate.seconds, dense.seconds, strict=True))

        return min(filter(never_slower, candidates), key=worst)


def scheduler(network: Network, term: Term, context: Context, batch: int) -> Scheduler:
    """The scheduler of one term of a network at one batch size."""
    itemsize = np.dtype(network.dtype).itemsize
    sizes = context.index_sizes(network, batch)
    return Scheduler(term, network.output.indices, sizes, context.profile, itemsize)


def merge_constants(network: Network, term: Term, tree: Tree) -> Term:
    """Contract every largest subtree of cores alone; the term's order becomes what is left of `tree`."""
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
    term = replace(term, order=tree, steps=None)
    # positions shift as tensors go: find each group again by its first tensors
    tags = list(range(len(term.tensors)))
    for group in groups:
        now = [tags.index(p) for p in group]
        term = merge_tensors(term, now, network.output.indices, network.dtype)
        first = min(now)
        tags = [p for k, p in enumerate(tags) if k == first or k not in now]
    return replace(term, order=map_tree(term.order, lambda p: p))


def dense_tree(network: Network, term: Term, context: Context, batch: int) -> Tree | None:
    """The order that first merges all connected cores of a term."""
    output = tuple(i.name for i in network.output.indices)
    inputs = [reduced_layout(term, p, output) for p in range(len(term.tensors))]
    core = [t.is_core for t in term.tensors]
    kept = tuple(i for i in output if i in term.indices)
    return TreeSearch(inputs, core, kept, context.index_sizes(network, batch), context.profile).dense()


def cost_of(network: Network, term: Term, tree: Tree, context: Context, batch: int) -> Schedule:
    """Predicted cost of one order of a term."""
    return scheduler(network, term, context, batch).schedule(tree)


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


def _short(name: str) -> str:
    """``factor_0*factor_1`` for ``fc.factor_0*factor_1``."""
    return "*".join(part.rpartition(".")[2] for part in name.split("*"))


def _explain(
    network: Network, before: Term, after: Term, best: Candidate, candidates: Sequence[Candidate], context: Context
) -> Change:
    merged = len(before.cores) - len(after.cores)
    dense = next((c for c in candidates if c.label == "dense"), None)
    traced = next((c for c in candidates if c.label == "as traced"), None)
    what = f"order {_label(after, after.order)}"
    if best.label == "dense" and merged:
        what = f"folded to dense: {len(before.cores)} cores are one"
    elif merged:
        what = f"{what}, {len(before.cores)} cores are {len(after.cores)}"

    last = int(np.argmax(context.batches))

    def against(other: Candidate | None, name: str) -> str:
        if other is None or other is best:
            return ""
        return f"{name} {_microseconds(other.seconds[last])}"

    others = ", ".join(t for t in (against(dense, "dense"), against(traced, "as traced")) if t)
    why = f"predicted {_microseconds(best.seconds[last])} at batch {context.batches[last]}; {others}" if others else ""
    tried = {c.label: [round(s * 1e6, 3) for s in c.seconds] for c in sorted(candidates, key=lambda c: sum(c.seconds))}
    return Change(network.output.name, what, why, details={"batches": context.batches, "microseconds": tried})


def _microseconds(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``, ``7.89 s``."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"
