"""Choose the contraction of every term: which cores to merge at compile time, in which order to run the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.ir import Network, Opaque, Program, Switch, Term, dims, networks_of
from tncompile.ir.edit import unique_cores
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.blockwise import one_term
from tncompile.passes.choice import BatchPlans, choose
from tncompile.passes.explain import explain, instead
from tncompile.passes.fold import merge_like_terms
from tncompile.passes.plans import (
    DENSE,
    Candidate,
    Limits,
    best_of,
    candidates,
    key_of,
    merge_constants,
    scheduler,
    ways_of,
)

Known = dict[object, tuple[tuple[str, ...], list[Candidate]]]
"""By what decides a search: the names of the first such term's indices, and its candidates."""

HOPELESS = 8.0
"""Candidates predicted to take this many times as long as the best at some batch size are not timed."""


@dataclass(frozen=True)
class Order(Pass):
    """Merge, order and schedule each term by one search on one cost, for each batch size.

    ```
    term x[b, i] A[i, r] B[r, o]        order ((x A) B)
    ->
    switch batch <= 11
      term x[b, i] A[i, r] B[r, o]      order ((x A) B)       steps matmul, matmul
      term x[b, i] A*B[i, o]            order (x A*B)         step matmul -> b o
    ```

    1. A subtree made only of cores is computed at compile time, so dense, every partial merge, every order of the
       rest and every layout are candidates of one search: all of them for small terms (`tncompile.cost.exhaustive`),
       what cotengra finds under the same cost for large ones (`tncompile.cost.search`).
    2. The `keep` best trees of each batch size are scheduled and priced at all of them; with a timer in the
       context they are also timed on the device, the dense layer and the order as traced among them.
    3. A candidate must be faster than the dense layer at every batch size it serves, by `margin` if its time is
       a prediction.
    4. A sum of terms of equal structure is one term where that is faster (`tncompile.passes.blockwise`), terms that
       are one dense layer together are that where it is faster than their sum.
    5. Where no one candidate is good at all batch sizes, and the batch is seen at run time, several serve one
       range each.
    """

    max_trials: int = 16
    keep: int = 8
    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        context = replace(context, attended=attended(program))
        if context.timer is not None:
            jobs = {key_of(n, t, context) for n in program.networks for t in n.terms if _has_choice(t)}
            context.timer.start(len(jobs) * len(context.batches))
        shown = any(dims.shows(size, "batch") for value in program.inputs for size in value.shape or ())
        branch = context.profile.branch if shown and not context.compact else float("inf")
        known: Known = {}
        nodes = [
            self._network(node, context, known, changes, branch) if isinstance(node, Network) else node
            for node in program.nodes
        ]
        return unique_cores(replace(program, nodes=tuple(nodes))), changes

    def _network(
        self, network: Network, context: Context, known: Known, changes: list[Change], branch: float
    ) -> Network | Switch:
        """The network with its terms scheduled, or a switch of several such."""
        moving, constant = network.moving, network.constants
        plans = [self._plan(network, term, context, known, branch) for term in moving]
        stacked = one_term(network, moving) if len(moving) > 1 else None
        if stacked is not None:
            together = self._plan(replace(network, terms=(stacked, *constant)), stacked, context, known, branch)
            apart, one = _times(network, plans, context), _times(network, [together], context)
            if self._pays(one, apart):
                what = f"{len(moving)} terms are one, numbered by an index of its cores"
                changes.append(Change(network.output.name, what, instead(one, apart, context)))
                network, plans = replace(network, terms=(stacked, *constant)), [together]
        for plan in plans:
            if len(plan.term.tensors) > 1:
                ready = [plan.ready[way] for way in plan.choice.plans]
                changes.append(explain(network, plan.term, plan.choice, ready, plan.ways, context))
        summed = self._summed(network, plans, context)
        if summed is not None:
            changes.append(summed[1])
            return replace(network, terms=(summed[0], *constant))
        found = [(plan.choice, plan.ready) for plan in plans]
        cases: list[_Case] = []
        for size in [*sorted({limit for choice, _ in found for limit in choice.limits}), None]:
            merged: list[Change] = []
            terms = [ready[choice.plan_for(size)] for choice, ready in found]
            # what folded to dense on one operand is one dense layer
            terms = [_scheduled(network, t, context) for t in merge_like_terms(network, terms, merged)]
            case = _Case(size, replace(network, terms=(*terms, *constant)), merged)
            if cases and _alike(cases[-1].network, case.network):
                cases.pop()  # one of the terms goes into another's dense core at these sizes already
            cases.append(case)
        for change in (c for case in cases for c in case.merged):
            if change not in changes:
                changes.append(change)
        limits = tuple(case.limit for case in cases if case.limit is not None)
        return Switch("batch", limits, tuple(c.network for c in cases)) if limits else cases[0].network

    def _plan(self, network: Network, term: Term, context: Context, known: Known, branch: float) -> _Plan:
        """The candidates of a term, those of its windows written out among them, and the choice."""
        ways = ways_of(network, term, context, lambda n, t: self._ways(n, t, context, known))
        return _Plan(term, ways, *self._choose(network, ways, context, branch))

    def _pays(self, new: Sequence[float], old: Sequence[float]) -> bool:
        """Whether times are better by the margin in all, and worse at no batch size."""
        return all(a <= b for a, b in zip(new, old, strict=True)) and sum(new) <= (1 - self.margin) * sum(old)

    def _summed(self, network: Network, plans: Sequence[_Plan], context: Context) -> tuple[Term, Change] | None:
        """Terms on one operand as the one dense layer that they are together, where that is faster than their sum."""
        dense = [way for plan in plans if (way := best_of([*plan.ways], DENSE)) is not None]
        if len(plans) < 2 or len(dense) < len(plans) or context.compact:
            return None
        one, apart = max((way.times for way in dense), key=sum), _times(network, plans, context)
        if not self._pays(one, apart):
            return None
        merged = [_applied(network, plan.term, way) for plan, way in zip(plans, dense, strict=True)]
        whole = merge_like_terms(network, merged, [])
        if len(whole) > 1 or _overflows(plans[0].term, whole[0]):
            return None
        what = f"{len(plans)} terms on {whole[0].operands[0].name} are one dense layer"
        return _scheduled(network, whole[0], context), Change(network.output.name, what, instead(one, apart, context))

    def _ways(self, network: Network, term: Term, context: Context, known: Known) -> list[Candidate]:
        """The candidates of a term, searched and timed once for all equal ones."""
        key = key_of(network, term, context)
        names = (*term.indices, *(w.out for w in term.windows))
        if key not in known:
            timed = context.timer is not None and _has_choice(term)
            ways = candidates(network, term, context, Limits(self.max_trials, self.keep, 3 if timed else 1))
            known[key] = (names, _timed(network, term, ways, context, self.keep) if timed else ways)
        first, ways = known[key]
        return [way.renamed(dict(zip(first, names, strict=True))) for way in ways]

    def _choose(
        self, network: Network, ways: Mapping[Candidate, Term], context: Context, branch: float
    ) -> tuple[BatchPlans, dict[Candidate, Term]]:
        """The choice among some candidates, and the term as each of the chosen ones computes it."""
        left = [*ways]
        while True:
            choice = choose(left, context.batches, branch, 0.0 if left[0].measured else self.margin)
            ready = {plan: _applied(network, ways[plan], plan) for plan in choice.plans}
            bad = [plan for plan, result in ready.items() if _overflows(ways[plan], result)]
            if not bad:  # in float16 a product of cores may not fit where each of them does
                return choice, ready
            left = [way for way in left if way not in bad]


@dataclass(frozen=True)
class _Plan:
    """A term, its candidates with the term that each is a way to compute, which of them serves which batch size, and
    the term as each of those computes it."""

    term: Term
    ways: Mapping[Candidate, Term]
    choice: BatchPlans
    ready: Mapping[Candidate, Term]


def _times(network: Network, plans: Sequence[_Plan], context: Context) -> list[float]:
    """Seconds at each batch size, with those that it takes to add the terms up."""
    found = []
    for k, batch in enumerate(context.batches):
        sizes = context.index_sizes(network, batch)
        elements = math.prod(sizes[i.name] for i in network.output.indices)
        add = context.profile.multiply_time(1, elements, np.dtype(network.dtype).itemsize)
        found.append(sum(p.choice.plan_for(batch).times[k] for p in plans) + add * (len(plans) - 1))
    return found


@dataclass(frozen=True)
class _Case:
    """What serves batch sizes up to a limit (None: all beyond), and how its terms were merged."""

    limit: int | None
    network: Network
    merged: Sequence[Change]


def _alike(a: Network, b: Network) -> bool:
    """Whether two ways to compute one network are the same but for the rounding of their cores."""

    def form(network: Network) -> object:
        return [([(t.name, t.axes) for t in term.tensors], term.steps) for term in network.terms]

    return form(a) == form(b)


def attended(program: Program) -> frozenset[str]:
    """Values that meet another run-time value in a network or in torch's attention: ONNX Runtime must tell queries,
    keys and values by the order of their modes."""
    found: set[str] = set()
    for node in program.nodes:
        if isinstance(node, Opaque):
            found |= {*node.inputs} if "scaled_dot_product_attention" in node.target else set()
        else:
            terms = (term for network in networks_of(node) for term in network.terms)
            found |= {t.name for term in terms if len(term.operands) > 1 for t in term.operands}
    return frozenset(found)


def _has_choice(term: Term) -> bool:
    return not term.is_constant and len(term.tensors) > 1


def _applied(network: Network, term: Term, plan: Candidate, shapes_only: bool = False) -> Term:
    return replace(merge_constants(network, term, plan.tree, shapes_only), steps=plan.steps)


def _timed(network: Network, term: Term, ways: Sequence[Candidate], context: Context, keep: int) -> list[Candidate]:
    """The best predicted few of each batch size and the plain ones, timed on the device."""
    assert context.timer is not None
    few = {way: None for way in ways if way.label}
    for k in range(len(context.batches)):
        few |= dict.fromkeys(sorted(ways, key=lambda way: way.seconds[k])[:keep])
    # the order as traced may take seconds and gigabytes: what is hopeless keeps its prediction
    best = [min(way.seconds[k] for way in few) for k in range(len(context.batches))]
    racing = [
        way
        for way in few
        if way.label == DENSE or all(s <= HOPELESS * b for s, b in zip(way.seconds, best, strict=True))
    ]
    networks = [replace(network, terms=(_applied(network, term, way, shapes_only=True),)) for way in racing]
    shown = network.output.name in context.outputs
    taken = [context.timer.times(networks, context.symbols(batch), shown) for batch in context.batches]
    times = dict(zip(racing, zip(*taken, strict=True), strict=True))
    return [replace(way, measured=times.get(way, way.seconds)) for way in few]


def _scheduled(network: Network, term: Term, context: Context) -> Term:
    if term.steps is not None:
        return term
    best = scheduler(network, term, context, context.batches[-1]).schedule(term.order)
    return replace(term, steps=best.steps)


def _overflows(before: Term, after: Term) -> bool:
    def finite(term: Term) -> bool:
        return all(bool(np.isfinite(c.data).all()) for c in term.cores if c.data is not None)

    return not finite(after) and finite(before)
