"""The tensor train, or matrix product state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tncompile.decomp.base import Axes, Labels, mode_names
from tncompile.decomp.treeformat import TreeFactorized


@dataclass(frozen=True, eq=False)
class TensorTrain(TreeFactorized):
    """One core ``[bond_left, mode, bond_right]`` for each mode, from the first to the last; the outer bonds are 1.

    A matrix has the modes of its input first: as many as it likes on either side. TT-SVD of Oseledets, "Tensor-Train
    Decomposition", SIAM J. Sci. Comput. 33(5), 2011: theorem 2.2 is the bound, and by corollary 2.4 the error is at
    most ``sqrt(d - 1)`` times that of the best train of these ranks.
    """

    KIND: ClassVar[str] = "tensor train"

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """``[r0, n1, r1], [r1, n2, r2], ...``."""
        return tuple((f"r{k}", name, f"r{k + 1}") for k, name in enumerate(mode_names(axes)))
