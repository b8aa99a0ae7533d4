"""What a tensorized model may cost, and what it should be best at."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tncompile.errors import OutputError, TNCompileError

Prefer = Literal["both", "speed", "size"]
"""What is made as small as it can be within the budget: time and size (their product), time alone, or size alone."""

Metric = Callable[[Callable[..., Any]], float]
"""A task metric, higher is better, of a callable that takes the model's inputs and gives its outputs (as tensors)."""

FORMATS: Mapping[str, tuple[str, ...]] = {
    "svd": ("SVD", "split"),
    "tensor-train": ("tensor train",),
    "matrix-train": ("TT-matrix",),
    "block-train": ("block train",),
    "tucker": ("Tucker",),
    "cp": ("CP",),
}
"""What dense weights may become: the names that a user gives, and those of the formats in `tncompile.decomp`."""


@dataclass(frozen=True)
class Budget:
    """At most this error, size and time; of these at least one is given.

    `max_error`: relative error of the outputs, ``|y - y0| / |y0|`` over the held-out samples of the calibration data,
    of several outputs the largest; without data that of the weights. `max_drop`: by how much a task `metric` may fall,
    in its own units: 0.01 is a point of an accuracy. `max_size`: bytes of the written file, or as a share of the dense
    float32 file where it is below 1. `min_speedup`: over the dense float32 file in ONNX Runtime, at the batch sizes
    planned for. `prefer` is what to minimize within all of that; where neither `max_error` nor `max_drop` is given,
    the error is. TNCompileError for values that mean nothing.
    """

    max_error: float | None = None
    metric: Metric | None = None
    max_drop: float | None = None
    max_size: float | None = None
    min_speedup: float | None = None
    prefer: Prefer = "both"

    def __post_init__(self) -> None:
        given = (self.max_error, self.metric, self.max_size, self.min_speedup)
        if all(value is None for value in given):
            raise TNCompileError(
                "tensorizing needs a budget: --max-error, --metric with --max-drop, --max-size or --min-speedup"
            )
        for name in ("max_error", "max_drop", "max_size", "min_speedup"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TNCompileError(f"{name.replace('_', '-')} is a number above 0, not {value}")
        if self.max_drop is not None and self.metric is None:
            raise TNCompileError("--max-drop is that of a metric: name one with --metric package.module:function")
        if self.metric is not None and self.max_drop is None:
            object.__setattr__(self, "max_drop", 0.01)
        if self.prefer not in get_args(Prefer):
            raise TNCompileError(f"prefer is {', '.join(get_args(Prefer))}; not {self.prefer!r}")

    @property
    def bounds_error(self) -> bool:
        """Whether an error is given that must not be exceeded."""
        return self.max_error is not None or self.metric is not None

    def __str__(self) -> str:
        limits: list[str] = []
        if self.max_error is not None:
            limits.append(f"output error up to {self.max_error:g}")
        if self.max_drop is not None:
            limits.append(f"metric down by up to {self.max_drop:g}")
        if self.max_size is not None:
            share = self.max_size < 1
            limits.append(f"size up to {self.max_size:.0%} of dense" if share else f"up to {self.max_size / 1e6:g} MB")
        if self.min_speedup is not None:
            limits.append(f"at least {self.min_speedup:g} times as fast")
        best = {"both": "time and size", "speed": "time", "size": "size"}[self.prefer] if self.bounds_error else "error"
        return f"{', '.join(limits)}; least {best}"


def kind_of(path: str | os.PathLike[str]) -> str:
    """``"onnx"`` or ``"pt"``, by the suffix; OutputError for any other."""
    suffix = Path(path).suffix
    if suffix == ".onnx":
        return "onnx"
    if suffix in (".pt", ".pt2"):
        return "pt"
    raise OutputError(f"{os.fspath(path)}: name a file that ends in .onnx, or in .pt2 for a model to train further")
