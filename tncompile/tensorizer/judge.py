"""Whether a model is still good enough: its outputs on held-out calibration data, and the task metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tncompile.tensorizer.budget import Budget
from tncompile.tensorizer.data import Calibration
from tncompile.tensorizer.evaluation import Evaluation, Run
from tncompile.tensorizer.measure import as_tensors
from tncompile.tensorizer.metric import value_of
from tncompile.tensorizer.runner import Runner

_ROUNDING = 1e-9
"""A drop of 0.9 - 0.89 is one of 0.01."""


@dataclass(frozen=True)
class Found:
    """What a model is like: relative error of its outputs, its metric and how far that fell (None where not asked)."""

    error: float | None
    metric: float | None = None
    drop: float | None = None


class Judge:
    """Compares models with the one that came in, on held-out data where there are any.

    TNCompileError where the metric fails on the model that came in.
    """

    def __init__(self, budget: Budget, runner: Runner, held: Calibration | None, inputs: Sequence[str]) -> None:
        self.budget = budget
        self.inputs = inputs
        self._evaluation = None if held is None else Evaluation(runner, held)
        self.before = None if budget.metric is None else self._value(lambda feeds: runner.run(feeds).outputs)

    def __call__(self, run: Run, weights: float | None = None) -> Found:
        """What a model is like; `weights` is the error of its weights, which counts where there are no data."""
        error = weights if self._evaluation is None else self._evaluation.of(run)
        if self.before is None:
            return Found(error)
        value = self._value(run)
        return Found(error, value, self.before - value)

    def accepts(self, found: Found) -> bool:
        """Whether a model is within the budget's error and drop; not where one is limited and unknown."""
        limits = ((found.error, self.budget.max_error), (found.drop, self.budget.max_drop))
        return all(limit is None or (value is not None and value <= limit + _ROUNDING) for value, limit in limits)

    def _value(self, run: Run) -> float:
        assert self.budget.metric is not None
        return value_of(self.budget.metric, as_tensors(run, self.inputs))
