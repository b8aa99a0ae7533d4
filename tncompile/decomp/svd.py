"""The singular value decomposition: ``W[in, out] = left[in, r] right[r, out]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tncompile.decomp.base import Axes, Labels, group_names
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.errors import TNCompileError


@dataclass(frozen=True, eq=False)
class SVD(TreeFactorized):
    """Two factors; the best of all of one rank (Eckart and Young 1936), so `bound` is the error itself."""

    KIND: ClassVar[str] = "SVD"

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """``left[i1, ..., r1]``, ``right[r1, o1, ...]``."""
        if len(axes) != 2:
            raise TNCompileError(f"an SVD is of a matrix, with two axes, not {len(axes)}")
        return ((*group_names(axes, 0), "r1"), ("r1", *group_names(axes, 1)))

    @property
    def core_names(self) -> tuple[str, ...]:
        """``left`` and ``right``."""
        return ("left", "right")
