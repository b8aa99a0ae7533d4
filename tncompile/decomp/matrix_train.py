"""The tensor train of a matrix (TT-matrix), or matrix product operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tncompile.decomp import modes
from tncompile.decomp.base import Axes, Labels
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.errors import TNCompileError


@dataclass(frozen=True, eq=False)
class MatrixTrain(TreeFactorized):
    """One core ``[bond_left, in, out, bond_right]`` for each site; the outer bonds are 1.

    Where input and output have different numbers of modes, the fewer are spread over the sites, and the legs that are
    missing have size 1. Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015; error and bound are those of a
    tensor train.
    """

    KIND: ClassVar[str] = "TT-matrix"

    @classmethod
    def default_axes(cls, shape: Sequence[int]) -> Axes:
        """Balanced modes, two or three for each axis."""
        count = max(2, min(3, *map(modes.useful_count, shape)))
        return tuple(modes.balanced(size, count) for size in shape)

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """``[r0, i1, o1, r1], [r1, i2, o2, r2], ...``, with ``u`` where a leg is missing."""
        if len(axes) != 2:
            raise TNCompileError(f"a TT-matrix is of a matrix, with two axes of modes, not {len(axes)}")
        sites = max(map(len, axes))
        legs = []
        for letter, axis in zip("io", axes, strict=True):
            at = {place: f"{letter}{k + 1}" for k, place in enumerate(modes.places(len(axis), sites))}
            legs.append([at.get(site, f"u{letter}{site + 1}") for site in range(sites)])
        return tuple((f"r{k}", legs[0][k], legs[1][k], f"r{k + 1}") for k in range(sites))
