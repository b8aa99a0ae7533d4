"""How far numbers are apart, and how far they may be: what a check finds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tncompile.ir import Array, Network, Opaque, Program
from tncompile.passes.fold import is_view

FACTOR = 10.0
"""How many times the error of eager PyTorch the compiled model's error may be."""

EXPORTED, ROUNDINGS = 2.0, 50.0
"""How many times the error of torch's own export in ONNX Runtime it may be, where that is more; and how many times the
floor that error may be to be taken for rounding, as the exporter may be wrong, too."""

FLOORS = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3}
"""Relative errors below which the comparison with eager says nothing: a few roundings of the dtype."""


SATURATED = 1 / 16
"""What the numbers of a sigmoid are compared with at least: ONNX Runtime's is exact to a rounding of 1, and all its
numbers may be smaller than that."""

TELLING = 1e-3
"""How much of that they must be for a check to say something."""


@dataclass(frozen=True)
class OutputCheck:
    """Errors of one output, as `relative_error` has them, over all runs; `eager` is PyTorch's own.

    `baseline` says whose that is: of a model that came in as ONNX it is the original file's. `exported` is that of
    torch's own export in ONNX Runtime, whose operators may sum less exactly than PyTorch's; it is asked for only where
    eager's does not explain the error.
    """

    name: str
    error: float
    eager: float
    bound: float
    baseline: str = "eager PyTorch's"
    exported: float | None = None

    def __str__(self) -> str:
        return f"{self.name}: relative error {self.error:.2g}, {self.others}"

    @property
    def others(self) -> str:
        """What the error is compared with."""
        export = "" if self.exported is None else f"torch's own export's {self.exported:.2g}, "
        return f"{self.baseline} {self.eager:.2g}, {export}allowed {self.bound:.2g}"

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound (never where it is not a number)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class CheckReport:
    """The outputs' checks, the sizes they were run at, and what limits what that proves."""

    outputs: tuple[OutputCheck, ...]
    runs: tuple[str, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(o.passed for o in self.outputs)

    def __str__(self) -> str:
        return "; ".join(f"{o.name}: error {o.error:.2g} ({o.others})" for o in self.outputs)


def relative_error(result: Array, reference: Array, least: float = 0.0) -> float:
    """max |result - reference| / max |reference|, that maximum taken to be `least` where it is smaller; values that are
    not finite must be the same. NaN if not."""
    if result.size == 0:
        return 0.0
    a, b = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.all(np.isfinite(a[finite])):
        return math.nan
    scale = float(np.max(np.abs(b[finite]), initial=least))
    distance = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return distance if scale == 0 else distance / scale


def scales(program: Program) -> list[float]:
    """For each output the scale that its error is relative to at least: that of a sigmoid, or of a view of one."""
    made = {node.value.name: node for node in program.nodes}

    def sigmoid(name: str) -> bool:
        node = made.get(name)
        if isinstance(node, Network) and is_view(node):
            return sigmoid(node.operands[0].name)
        return isinstance(node, Opaque) and node.target in ("aten.sigmoid.default", "onnx.Sigmoid")

    return [SATURATED if sigmoid(name) else 0.0 for _, name in program.outputs]
