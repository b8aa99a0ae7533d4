"""Order the networks of a program that is trained, by what a step costs forward and backward."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.layouts import reduced_layouts
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.search import TreeSearch
from tncompile.cost.slices import MEMORY, peak_of
from tncompile.cost.training import TrainingCost, cheapest_trees
from tncompile.ir import Network, Node, Program, Switch, Term, Tree, dims
from tncompile.ir.core import networks_of
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.choice import BatchPlans, choose
from tncompile.passes.plans import DENSE, TRACED, Candidate, label_of

_BRANCH = 1e-6
_NEAR = 1.1
"""Times the predicted seconds of the fastest tree, up to which another may be chosen for its memory."""


@dataclass(frozen=True)
class TrainingOrder(Pass):
    """Order each term for a training step, for each batch size.

    ```
    term x[b, i] A[i, r] B[r, o]        order ((x A) B)
    ->
    switch batch <= 40
      term x[b, i] A[i, r] B[r, o]      order ((x A) B)
      term x[b, i] A[i, r] B[r, o]      order (x (A B))
    ```

    1. Nothing is computed at compile time: weights are inputs of the program. Merging all of them first, as a
       reconstructed layer does, is a candidate at what it costs in every step. Between trees of about one time memory
       decides.
    2. A product costs its own time and that of one more for each side through which a gradient flows: `trained` names
       the inputs of the program that need one.
    3. Where no one order is good at all batch sizes, several serve one range each.
    """

    trained: frozenset[str] = frozenset()

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        trained = trained_values(program, self.trained)
        dynamic = any(dims.shows(size, "batch") for value in program.inputs for size in value.shape or ())
        nodes = [
            _ordered(node, context, trained, dynamic, changes) if isinstance(node, Network) else node
            for node in program.nodes
        ]
        return replace(program, nodes=tuple(nodes)), changes


def trained_values(program: Program, trained: Collection[str]) -> frozenset[str]:
    """The values that a gradient flows through, if it flows to these inputs."""
    found = {*trained}
    for node in program.nodes:
        if any(name in found for name in node.inputs) and _is_real(node):
            found.add(node.value.name)
    return frozenset(found)


def _is_real(node: Node) -> bool:
    return node.value.dtype == "tuple" or node.value.dtype.startswith(("float", "bfloat"))


def training_cost(
    network: Network, term: Term, sizes: Mapping[str, int], trained: Collection[str], profile: DeviceProfile
) -> TrainingCost:
    """What orders of a term cost, at given sizes of the indices."""
    output = tuple(i.name for i in network.output.indices)
    needs = [not t.is_core and t.name in trained for t in term.tensors]
    layouts = reduced_layouts(term, output)
    shown = tuple(name for name in output if name in term.indices)
    return TrainingCost(layouts, shown, sizes, needs, profile, np.dtype(network.dtype).itemsize)


def _ordered(
    network: Network, context: Context, trained: Collection[str], dynamic: bool, changes: list[Change]
) -> Node:
    choices = [_choose(network, term, context, trained, dynamic) for term in network.terms]
    for term, choice in zip(network.terms, choices, strict=True):
        if len(term.tensors) > 2:
            orders = [label_of(term, plan.tree) for plan in choice.plans]
            times = " or ".join(f"{plan.seconds[-1] * 1e6:,.0f} µs" for plan in choice.plans)
            why = f"predicted {times} for forward and backward at batch {context.batches[-1]}"
            changes.append(Change(network.output.name, f"order {' or '.join(orders)}", why))
    limits = tuple(sorted({limit for choice in choices for limit in choice.limits}))
    cases = tuple(
        replace(
            network,
            terms=tuple(
                replace(term, order=choice.plan_for(size).tree)
                for term, choice in zip(network.terms, choices, strict=True)
            ),
        )
        for size in (*limits, None)
    )
    return Switch("batch", limits, cases) if limits else cases[0]


def _choose(network: Network, term: Term, context: Context, trained: Collection[str], dynamic: bool) -> BatchPlans:
    if len(term.tensors) < 3:
        return BatchPlans((Candidate(TRACED, term.order, (), (0.0,) * len(context.batches)),))
    sizes = [context.index_sizes(network, batch) for batch in context.batches]
    costs = [training_cost(network, term, s, trained, context.profile) for s in sizes]
    fixed = [all(isinstance(i.size, int) for i in t.indices) for t in term.tensors]
    merged = _search(costs[-1], fixed, context).dense()  # what a layer with its weight reconstructed computes
    labels = {term.order: TRACED} | ({} if merged is None else {merged: DENSE})
    trees = dict.fromkeys(_best(cost, [*labels, *_found(term, cost, context)]) for cost in costs)
    ways = [Candidate(labels.get(tree, ""), tree, (), tuple(c.arrange(tree).seconds for c in costs)) for tree in trees]
    return choose(ways, context.batches, _BRANCH if dynamic else float("inf"), 0.0)


def _best(cost: TrainingCost, trees: Sequence[Tree]) -> Tree:
    """Of the trees that are about as fast as the fastest, the best by time and memory."""
    arranged = [(cost.arrange(tree), tree) for tree in trees]
    limit = _NEAR * min(found.seconds for found, _ in arranged)
    near = [(found, tree) for found, tree in arranged if found.seconds <= limit]
    return min(near, key=lambda pair: pair[0].seconds * peak_of(cost, pair[0].pairs) ** MEMORY)[1]


def _found(term: Term, cost: TrainingCost, context: Context) -> list[Tree]:
    """The trees that may be best for one cost."""
    trees = cheapest_trees(cost)
    if trees:
        return trees
    search = _search(cost, [False] * len(term.tensors), context)
    starts = dict.fromkeys((*search.orders(16), term.order))
    return [*starts, *map(search.refined, starts)]


def _search(cost: TrainingCost, core: Sequence[bool], context: Context) -> TreeSearch:
    return TreeSearch(cost.layouts, core, cost.output, cost.sizes, context.profile)


def planned_sizes(node: Network | Switch, context: Context) -> tuple[dict[str, int], ...]:
    """For each case of a node the index sizes at the largest batch size that is planned for and that it serves."""
    limits = (*node.limits, None) if isinstance(node, Switch) else (None,)
    fitting = [[b for b in context.batches if limit is None or b <= limit] for limit in limits]
    return tuple(
        context.index_sizes(case, (batches or context.batches)[-1])
        for case, batches in zip(networks_of(node), fitting, strict=True)
    )
