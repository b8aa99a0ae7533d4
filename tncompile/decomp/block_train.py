"""Block tensor trains; with two cores and rank 1, the Monarch matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tncompile.decomp import modes
from tncompile.decomp.base import Axes, Labels
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.errors import TNCompileError


@dataclass(frozen=True, eq=False)
class BlockTrain(TreeFactorized):
    """Core k is ``[r, i_k, ..., i_d, o_1, ..., o_k, r']``: it also has the modes that were not yet, or are already,
    replaced.

    So each core is a block diagonal matrix between permutations. Qiu et al., "Compute Better Spent", ICML 2024, has
    the format. For two cores and rank 1 it is the product of two block diagonal matrices of Dao et al., "Monarch",
    ICML 2022, and the truncation is their projection: for each value of the shared modes the best approximation by
    one rank. More cores repeat it; the error is at most ``sqrt(d - 1)`` times that of the best such train.
    """

    KIND: ClassVar[str] = "block train"

    @classmethod
    def default_axes(cls, shape: Sequence[int]) -> Axes:
        """Two balanced modes for each axis."""
        return tuple(modes.balanced(size, 2) for size in shape)

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """``[i1, ..., id, o1, r1], [r1, i2, ..., id, o1, o2, r2], ..., [r, id, o1, ..., od]``."""
        if len(axes) != 2 or len(axes[0]) != len(axes[1]):
            raise TNCompileError("a block train is of a matrix with as many modes of the input as of the output")
        count = len(axes[0])
        return tuple(
            (
                *([f"r{k}"] if k else []),
                *(f"i{n + 1}" for n in range(k, count)),
                *(f"o{n + 1}" for n in range(k + 1)),
                *([f"r{k + 1}"] if k + 1 < count else []),
            )
            for k in range(count)
        )
