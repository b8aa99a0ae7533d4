"""Whether a model is still good enough: its outputs on held-out calibration data, and the task metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tncompile.ir import Array
from tncompile.tensorize.budget import Budget
from tncompile.tensorize.measure import as_tensors, distance
from tncompile.tensorize.metric import value_of

Run = Callable[[Mapping[str, Array]], Sequence[Array]]
"""A model: arrays by input name to its outputs in order."""


@dataclass(frozen=True)
class Found:
    """What a model is like: relative error of its outputs, its metric and how far that fell (None where not asked)."""

    error: float | None
    metric: float | None = None
    drop: float | None = None


class Judge:
    """Compares models with the one that came in, which is `reference`, on `runs` of held-out data.

    TNCompileError where the metric fails on the reference.
    """

    def __init__(
        self, budget: Budget, reference: Run, runs: Sequence[Mapping[str, Array]], inputs: Sequence[str]
    ) -> None:
        self.budget = budget
        self.runs = runs
        self.inputs = inputs
        self.expected = [reference(feeds) for feeds in runs]
        self.metric = None if budget.metric is None else value_of(budget.metric, as_tensors(reference, inputs))

    def __call__(self, run: Run) -> Found:
        """What a model is like."""
        error = distance((run(feeds) for feeds in self.runs), self.expected) if self.runs else None
        if self.budget.metric is None or self.metric is None:
            return Found(error)
        value = value_of(self.budget.metric, as_tensors(run, self.inputs))
        return Found(error, value, self.metric - value)

    def accepts(self, found: Found) -> bool:
        """Whether a model is within the budget's error and drop."""
        limits = ((found.error, self.budget.max_error), (found.drop, self.budget.max_drop))
        return all(limit is None or value is None or value <= limit for value, limit in limits)
