"""The largest error to plan with: estimates corrected by evaluating whole plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tncompile.tensorizer.judge import Found, Judge
from tncompile.tensorizer.search import Plan

TRIALS = 7
"""Plans that are evaluated."""

FIRST, LARGEST = 0.03, 2.0
"""The error to begin with where only a drop of a metric is given, and where to stop asking for more."""


@dataclass(frozen=True)
class Fitted:
    """The last plan that was within the budget, by an evaluation with its weights in the model as it came in."""

    plan: Plan
    limit: float
    found: Found


def fit(
    judge: Judge,
    plan_for: Callable[[float], Plan | None],
    evaluate: Callable[[Plan], Found],
    progress: Callable[[str], None],
) -> Fitted | None:
    """Bisect the estimated error, on a logarithmic scale, for the largest whose plan is accepted; None where none is.

    `plan_for` gives the plan for an estimated error, None where so small an error takes more time or bytes than there
    may be.
    """
    best: Fitted | None = None
    low, high = 0.0, math.inf
    limit = min(FIRST, judge.budget.max_error or FIRST) if judge.budget.metric is not None else judge.budget.max_error
    limit = limit or FIRST
    tried: dict[tuple[object, ...], Found] = {}
    for trial in range(TRIALS):
        plan = plan_for(limit)
        if plan is None:
            low = limit
            if limit >= LARGEST:
                break
            limit = math.sqrt(low * high) if high < math.inf else limit * 2
            continue
        key = tuple((option.site.name, option.label) for option in plan.options)
        if key not in tried:
            progress(f"evaluating plan {trial + 1} of at most {TRIALS}, expected error {plan.error:.2g}")
            tried[key] = evaluate(plan)
        found = tried[key]
        if judge.accepts(found):
            low, best = limit, Fitted(plan, limit, found)
            if limit >= LARGEST:
                break
        else:
            high = limit
        if high < low * 1.1:
            break
        limit = math.sqrt(low * high) if low and high < math.inf else limit * 2 if low else limit / 3
    return best
