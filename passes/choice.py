"""Which candidate serves which batch sizes: one for all where that costs little, else a few with limits between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tncompile.passes.plans import DENSE, Candidate

PLAN_PENALTY = 0.03
"""How much slower than the best a plan may be at some batch size before another plan is worth its bytes."""

TOLD = 0.03
"""What measured times must differ by to be told apart: two sessions of one model differ by as much. Of what is not told
apart the best predicted serves."""

MAX_SWITCHED = 6
"""Of more batch sizes than these, neighbours are planned together."""


@dataclass(frozen=True)
class BatchPlans:
    """`plans[k]` serves batch sizes up to `limits[k]`, the last all beyond."""

    plans: tuple[Candidate, ...]
    limits: tuple[int, ...] = ()

    def plan_for(self, size: int | None) -> Candidate:
        """The plan that serves a batch size; None is a size beyond all limits."""
        return self.plans[-1] if size is None else self.plans[sum(limit < size for limit in self.limits)]


def choose(candidates: Sequence[Candidate], batches: Sequence[int], branch: float, margin: float) -> BatchPlans:
    """The plans with the least worst ratio to the best candidate of each batch size.

    More plans than one cost `branch` seconds a call (inf: are not possible). A candidate must be faster than the
    dense layer by `margin` at every batch size that it serves, and another plan better than one by as much, as their
    times are predictions.
    """
    dense = [min((c.times[k] for c in candidates if c.label == DENSE), default=math.inf) for k in range(len(batches))]

    def allowed(candidate: Candidate, k: int, extra: float = 0.0) -> bool:
        return candidate.label == DENSE or (candidate.times[k] + extra) * (1 + margin) <= dense[k]

    fastest = [min(c.times[k] for c in candidates if allowed(c, k)) for k in range(len(batches))]

    def best_for(part: range, extra: float) -> tuple[float, Candidate]:
        fits = [c for c in candidates if all(allowed(c, k, extra) for k in part)]
        return min(
            ((max((c.times[k] + extra) / max(fastest[k], 1e-12) for k in part), c) for c in fits),
            key=lambda found: (max(found[0], 1 + TOLD) if found[1].measured else found[0], sum(found[1].seconds)),
        )

    def worth(parts: Sequence[range]) -> tuple[float, list[Candidate]]:
        extra = branch if len(parts) > 1 else 0.0
        found = [best_for(part, extra) for part in parts]
        return max(ratio for ratio, _ in found) + max(PLAN_PENALTY, margin) * (len(parts) - 1), [c for _, c in found]

    options = list(_partitions(len(batches))) if math.isfinite(branch) else [[range(len(batches))]]
    parts, (_, plans) = min(((p, worth(p)) for p in options), key=lambda option: option[1][0])
    merged: list[tuple[range, Candidate]] = []
    for part, plan in zip(parts, plans, strict=True):
        if merged and plan is merged[-1][1]:
            merged[-1] = (range(merged[-1][0].start, part.stop), plan)
        else:
            merged.append((part, plan))
    limits = []
    for (a, first), (b, second) in itertools.pairwise(merged):
        low, high = a.stop - 1, b.start
        between = (_interpolated(plan, low, high, batches) for plan in (first, second))
        limits.append(crossing(batches[low], batches[high], *between))
    return BatchPlans(tuple(plan for _, plan in merged), tuple(limits))


def _partitions(count: int) -> Iterator[list[range]]:
    """All ways to cut a row of batch sizes into neighbouring parts, fewest parts first."""
    together = -(-count // MAX_SWITCHED)
    places = range(together, count, together)
    for number in range(len(places) + 1):
        for cuts in itertools.combinations(places, number):
            edges = (0, *cuts, count)
            yield [range(a, b) for a, b in itertools.pairwise(edges)]


def _interpolated(plan: Candidate, low: int, high: int, batches: Sequence[int]) -> Callable[[int], float]:
    """Seconds between two batch sizes, given by their positions, along a power of the size."""
    start = batches[low]
    x, y = (min(max(plan.times[k], 1e-12), 1e12) for k in (low, high))  # inf: it cannot run there
    slope = math.log(y / x) / math.log(batches[high] / start)
    return lambda size: float(x * (size / start) ** slope)


def crossing(low: int, high: int, first: Callable[[int], float], second: Callable[[int], float]) -> int:
    """The largest size in [low, high) at which the first plan is still the faster one, by bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first(middle) <= second(middle) else (low, middle)
    return low
