"""Measured times on a grid of sizes, and what lies between and beyond."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from tncompile.errors import LoadError


@dataclass(frozen=True)
class Table:
    """Seconds at each point of a grid.

    `axes` are the sizes of each axis, strictly ascending; `seconds` the times, positive, last axis fastest.
    Between the points a time is interpolated linearly in each size: the sum of an overhead and of terms in
    products of sizes, which is what a kernel's time mostly is, comes out exactly. Beyond the last size of an
    axis it grows in proportion.
    """

    axes: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.axes or any(not axis or [*axis] != sorted({*axis}) for axis in self.axes):
            raise ValueError("the sizes of each axis must be strictly ascending")
        if len(self.seconds) != math.prod(map(len, self.axes)):
            raise ValueError(f"{len(self.seconds)} times for {math.prod(map(len, self.axes))} points")
        if not all(0 < s < math.inf for s in self.seconds):
            raise ValueError("times must be positive and finite")

    def __call__(self, *sizes: float) -> float:
        """Seconds at some sizes, one for each axis."""
        corner, scale = 0, 1.0
        between = []
        for size, axis, stride in zip(sizes, self.axes, self._strides, strict=True):
            if size >= axis[-1]:
                scale *= size / axis[-1]
                corner += (len(axis) - 1) * stride
                continue
            low = bisect_right(axis, size) - 1
            if low < 0:
                continue
            corner += low * stride
            if size != axis[low]:
                between.append((stride, (size - axis[low]) / (axis[low + 1] - axis[low])))
        corners = [corner]
        for stride, _ in between:
            corners += [c + stride for c in corners]
        values = [self.seconds[c] for c in corners]
        for _, share in reversed(between):
            half = len(values) // 2
            values = [a + (b - a) * share for a, b in zip(values[:half], values[half:], strict=True)]
        return scale * values[0]

    def points(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Each point of the grid with its time."""
        return zip(product(*self.axes), self.seconds, strict=True)

    def covers(self, *sizes: float) -> bool:
        """Whether some sizes lie within the grid."""
        return all(size <= axis[-1] for size, axis in zip(sizes, self.axes, strict=True))

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(map(len, self.axes[k + 1 :])) for k in range(len(self.axes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: nanoseconds, to four digits."""
        return {"axes": [[*axis] for axis in self.axes], "ns": [float(f"{s * 1e9:.4g}") for s in self.seconds]}

    @classmethod
    def from_dict(cls, data: Any) -> Table:
        """The table that `to_dict` made. LoadError where it is not one."""
        try:
            axes = tuple(tuple(int(size) for size in axis) for axis in data["axes"])
            return cls(axes, tuple(float(ns) * 1e-9 for ns in data["ns"]))
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"not a table of times ({error})") from error
