"""Files beside each other: bytes, time, and how far their outputs are from the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race
from tncompile.tensorizer.evaluation import Run

SECONDS = 4.0
"""How long the files are timed at each batch size."""


@dataclass(frozen=True)
class Measured:
    """A file that a model can become: bytes, median ms by batch size, relative error of its outputs on calibration
    data (None without), the task metric and how far that fell (None without)."""

    name: str
    size: int = 0
    ms: Mapping[int, float] = field(default_factory=dict)
    error: float | None = None
    metric: float | None = None
    drop: float | None = None

    @property
    def mean_ms(self) -> float:
        """The geometric mean of the times at all batch sizes."""
        return float(np.exp(np.mean(np.log([*self.ms.values()])))) if self.ms else float("inf")


def times(files: Mapping[str, Session], feeds: Mapping[int, Mapping[str, Array]]) -> dict[str, dict[int, float]]:
    """Median ms of each session at each batch size, all of them run in turns."""
    found: dict[str, dict[int, float]] = {name: {} for name in files}
    for batch, arrays in feeds.items():
        calls = {name: session.bound(session.feeds(arrays)) for name, session in files.items()}
        result = race(calls, budget_s=SECONDS)
        for name in files:
            found[name][batch] = result.median(name)
    return found


def as_tensors(run: Run, names: Sequence[str]) -> Callable[..., Any]:
    """A model for a task metric: takes tensors or arrays in the order of the inputs, or by their names, and gives a
    tensor, or a tuple of several."""

    def call(*inputs: Any, **named: Any) -> Any:
        if len(inputs) > len(names) or {*named} - {*names[len(inputs) :]}:
            raise TNCompileError(f"the metric calls the model otherwise than with its inputs {', '.join(names)}")
        given = {**dict(zip(names, inputs, strict=False)), **named}
        feeds = {
            n: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for n, v in given.items()
        }
        outputs = tuple(torch.from_numpy(np.array(y)) for y in run(feeds).values())
        return outputs[0] if len(outputs) == 1 else outputs

    return call
