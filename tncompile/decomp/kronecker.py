"""Sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp import components
from tncompile.decomp.base import Axes, Factorized, Labels, as_modes, normal_axes
from tncompile.decomp.cp import finite, refitted
from tncompile.decomp.ranks import EXACT, Ranks
from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Kronecker(Factorized):
    """``sum_r A[r] (x) B[r] (x) ...``: one core ``[r, in, out]`` for each pair of modes.

    Of two factors it is the SVD of the rearranged matrix, and so the best of its rank, `bound` being the error itself
    (Van Loan and Pitsianis, "Approximation with Kronecker Products", 1993). Of more it is the CP of the rearranged
    tensor.
    """

    KIND: ClassVar[str] = "Kronecker sum"

    @property
    def labels(self) -> Labels:
        """``[r1, i1, o1], [r1, i2, o2], ...``."""
        _check(self.axes)
        return tuple(("r1", f"i{k + 1}", f"o{k + 1}") for k in range(len(self.axes[0])))

    @classmethod
    def from_dense(cls, dense: Any, axes: Sequence[Sequence[int]], ranks: Ranks = EXACT) -> Self:
        """The best sum of so many terms for two factors, the nearest that is found for more.

        Raises NoGainError where it is no smaller than the matrix.
        """
        axes = normal_axes(axes)
        _check(axes)
        count = len(axes[0])
        pairs = [i * o for i, o in zip(*axes, strict=True)]
        order = [k for pair in zip(range(count), range(count, 2 * count), strict=True) for k in pair]
        tensor = finite(as_modes(dense, axes).transpose(order)).reshape(pairs)
        found, notes = components.fit(tensor, ranks, sum(pairs))
        ranks.require_gain(cls.KIND, len(found.weights) * sum(pairs), tensor.size)
        return cls(_cores(found.weights, found.factors, axes), axes, found.error, notes)

    def canonical(self, center: int = -1) -> Self:
        """The same matrix: terms by decreasing norm, each core's of norm 1 but for the core at `center`.

        Of two factors the terms are also orthogonal to each other.
        """
        if not -len(self.cores) <= center < len(self.cores):
            raise TNCompileError(f"a {self.KIND} of {len(self.cores)} cores has no core {center}")
        columns = [core.reshape(len(core), -1).T for core in self.cores]
        if len(columns) == 2:
            found, _ = components.fit(columns[0] @ columns[1].T, EXACT, 1)
            weights, factors = found.weights, found.factors
        else:
            weights, factors = components.normalized(np.ones(len(self.cores[0])), columns)
        return replace(self, cores=_cores(weights, factors, self.axes, center % len(self.cores)))

    def spectra(self) -> dict[str, Array]:
        """The norms of the terms; of two factors, the singular values of the rearranged matrix."""
        center = self.canonical().cores[-1]
        return {"r1": np.linalg.norm(center.reshape(len(center), -1), axis=1)}

    def truncated(self, ranks: Ranks) -> Self:
        """A smaller sum fitted to this one; this one where none is found."""
        found: Self = refitted(self, type(self).from_dense(self.dense(), self.axes, replace(ranks, larger=True)))
        return found


def _check(axes: Axes) -> None:
    if len(axes) != 2 or len(axes[0]) != len(axes[1]) or len(axes[0]) < 2:
        raise TNCompileError(
            "a Kronecker sum is of a matrix with as many modes, two or more, of the input as of the output"
        )


def _cores(weights: Array, factors: Sequence[Array], axes: Axes, center: int = 0) -> tuple[Array, ...]:
    shapes = list(zip(*axes, strict=True))
    scaled = [f * weights if k == center else f for k, f in enumerate(factors)]
    assert all(len(f) == math.prod(s) for f, s in zip(scaled, shapes, strict=True))
    return tuple(np.ascontiguousarray(f.T).reshape(-1, *s) for f, s in zip(scaled, shapes, strict=True))
