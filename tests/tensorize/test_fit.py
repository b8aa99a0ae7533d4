"""Whether a model is good enough, and the largest expected error whose plan is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tensorize.small import imported, mlp
from tncompile.errors import TNCompileError
from tncompile.tensorizer.budget import Budget
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.fit import FIRST, LARGEST, TRIALS, Fitted, fit
from tncompile.tensorizer.judge import Found, Judge
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.search import Option, Plan
from tncompile.tensorizer.sites import Part, Site

SITE = Site((Part("w", np.zeros((4, 4)), (0,), (1,)),))
NOTHING = cast(Runner, None)
"""For judges that run no model."""


def judge_of(**limits: Any) -> Judge:
    return Judge(Budget(**limits), NOTHING, None, ())


def steady(run: Callable[..., Any]) -> float:
    return 0.8


def fails(run: Callable[..., Any]) -> float:
    return 1 / 0


def plan_of(error: float, name: str | None = None) -> Plan:
    """A plan of an expected error, under a name of its own."""
    return Plan((Option(SITE, None, f"{error!r}" if name is None else name, error, 1.0, 10),))


class Search:
    """`fit` on plans of the error asked for, whose real error is a function of that."""

    def __init__(self, real: Callable[[float], float], plan: Callable[[float], Plan | None] = plan_of) -> None:
        self.real, self.plan = real, plan
        self.asked: list[float] = []
        self.evaluated: list[float] = []

    def run(self, judge: Judge) -> Fitted | None:
        return fit(judge, self._plan, self._evaluate, lambda message: None)

    def _plan(self, limit: float) -> Plan | None:
        self.asked.append(limit)
        return self.plan(limit)

    def _evaluate(self, plan: Plan) -> Found:
        self.evaluated.append(plan.error)
        return Found(self.real(plan.error))


# ------------------------------------------------------------------------------------ judge


@pytest.mark.parametrize(
    ("limits", "found", "accepted"),
    [
        ({"max_error": 0.1}, Found(0.1), True),
        ({"max_error": 0.1}, Found(0.1 + 1e-11), True),
        ({"max_error": 0.1}, Found(0.1 + 1e-7), False),
        ({"max_error": 0.1}, Found(math.inf), False),
        ({"max_error": 0.1}, Found(math.nan), False),
        ({"max_error": 0.1}, Found(None), False),
        ({"max_error": 0.1}, Found(None, 0.9, 0.0), False),
        ({"metric": steady, "max_drop": 0.01}, Found(None, 0.8, 0.81 - 0.8), True),
        ({"metric": steady, "max_drop": 0.01}, Found(5.0, 0.8, -0.3), True),
        ({"metric": steady, "max_drop": 0.01}, Found(0.0, 0.8, 0.02), False),
        ({"metric": steady, "max_drop": 0.01}, Found(0.0), False),
        ({"metric": steady, "max_error": 0.1}, Found(0.05, 0.8, 0.0), True),
        ({"metric": steady, "max_error": 0.1}, Found(0.2, 0.8, 0.0), False),
        ({"metric": steady, "max_error": 0.1}, Found(0.05, 0.8, 0.02), False),
        ({"max_size": 0.5}, Found(None), True),
        ({"min_speedup": 2.0}, Found(7.0), True),
    ],
)
def test_what_is_accepted(limits: dict[str, Any], found: Found, accepted: bool) -> None:
    assert judge_of(**limits).accepts(found) is accepted


def test_error_metric_and_drop_of_a_model() -> None:
    module, x = mlp(), torch.randn(40, 48)
    model = imported(module, x[:4])
    runner, held = Runner(model), collect(x, model)
    with torch.no_grad():
        largest = float(module(x).abs().max())

    def metric(run: Callable[..., Any]) -> float:
        return float(run(x).abs().max())

    judge = Judge(Budget(metric=metric), runner, held, ["input"])
    assert judge.before == pytest.approx(largest, rel=1e-5)
    exact = judge(lambda feeds: runner.run(feeds).outputs)
    assert exact.error == 0 and exact.drop == 0
    half = judge(lambda feeds: {name: 0.5 * y for name, y in runner.run(feeds).outputs.items()})
    assert half.error == pytest.approx(0.5, rel=1e-6)
    assert half.metric == pytest.approx(largest / 2, rel=1e-5) and half.drop == pytest.approx(largest / 2, rel=1e-5)


def test_without_data_or_metric_nothing_is_measured() -> None:
    judge = judge_of(max_size=0.5)
    assert judge.before is None
    assert judge(lambda feeds: pytest.fail("runs"), 0.25) == Found(0.25)  # the error of the weights is all there is


def test_a_metric_that_fails_on_the_model_is_told_at_once() -> None:
    with pytest.raises(TNCompileError, match=r"the metric fails fails at .*: ZeroDivisionError"):
        judge_of(metric=fails)


# ------------------------------------------------------------------------------------ fit


@given(st.floats(0.2, 5.0), st.floats(0.001, 0.1))
def test_estimates_that_are_off_are_corrected(factor: float, limit: float) -> None:
    search = Search(lambda error: factor * error)
    found = search.run(judge_of(max_error=limit))
    assert found is not None and len(search.asked) <= TRIALS
    assert found.found.error == factor * found.limit <= limit + 1e-9
    assert found.plan.error == found.limit
    assert found.limit > limit / factor / 1.35


def test_the_first_trial_is_for_the_error_asked() -> None:
    search = Search(lambda error: error)
    search.run(judge_of(max_error=0.07))
    assert search.asked[0] == 0.07
    search = Search(lambda error: error)
    search.run(judge_of(metric=lambda run: 0.5, max_drop=0.1))
    assert search.asked[0] == FIRST


def test_no_more_is_asked_for_than_the_largest() -> None:
    search = Search(lambda error: 0.0)
    found = search.run(judge_of(max_error=0.7))
    assert search.asked == pytest.approx([0.7, 1.4, 2.8]) and search.asked[-2] < LARGEST
    assert found is not None and found.limit == pytest.approx(2.8)


def test_the_same_plan_is_evaluated_once() -> None:
    def plan(limit: float) -> Plan:
        return plan_of(0.1, "large") if limit >= 0.02 else plan_of(0.01, "small")

    search = Search(lambda error: error, plan)
    found = search.run(judge_of(max_error=0.05))
    assert found is not None and found.plan.options[0].bits == "small"
    assert sorted(search.evaluated) == [0.01, 0.1] and len(search.asked) > 2
    assert found.limit < 0.02 and found.found == Found(0.01)


def test_nothing_within_the_budget_is_none() -> None:
    search = Search(lambda error: 1.0)
    assert search.run(judge_of(max_error=0.01)) is None
    assert len(search.asked) == TRIALS and search.asked == sorted(search.asked, reverse=True)


def test_where_there_is_no_plan_the_best_so_far_stays() -> None:
    assert Search(lambda error: 0.0, lambda limit: None).run(judge_of(max_error=0.01)) is None
    search = Search(lambda error: 0.0, lambda limit: plan_of(limit) if limit < 0.03 else None)
    found = search.run(judge_of(max_error=0.01))
    assert found is not None and found.limit == pytest.approx(0.02)
