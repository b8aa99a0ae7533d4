"""The canonical polyadic format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp import components
from tncompile.decomp.base import Factorized, Labels, as_modes, mode_names, normal_axes
from tncompile.decomp.ranks import EXACT, Ranks
from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class CP(Factorized):
    """``weights[r]`` and a factor ``[mode, r]`` for each mode, all on one bond.

    Alternating least squares (tensorly; Kolda and Bader, SIAM Review 51(3), 2009, section 3.4). No decomposition
    gives the best CP of a rank, nor bounds its distance, and a best one need not exist: `bound` is the error as
    measured. Exactly it is made from fibres, of a rank up to the product of all modes but the longest; two modes are
    an SVD.
    """

    KIND: ClassVar[str] = "CP"

    @property
    def labels(self) -> Labels:
        """``[r1], [n1, r1], [n2, r1], ...``."""
        return (("r1",), *((name, "r1") for name in mode_names(self.axes)))

    @property
    def core_names(self) -> tuple[str, ...]:
        """``weights, factor_0, factor_1, ...``."""
        return ("weights", *(f"factor_{k}" for k in range(len(self.cores) - 1)))

    @classmethod
    def from_dense(cls, dense: Any, axes: Sequence[Sequence[int]] | None = None, ranks: Ranks = EXACT) -> Self:
        """The nearest that is found. Raises NoGainError where it is no smaller than the tensor."""
        axes = normal_axes(axes or [(n,) for n in np.shape(dense)])
        tensor = finite(as_modes(dense, axes))
        found, notes = components.fit(tensor, ranks, 1 + sum(tensor.shape))
        ranks.require_gain(cls.KIND, len(found.weights) * (1 + sum(tensor.shape)), tensor.size)
        return cls((found.weights, *found.factors), axes, found.error, notes)

    def canonical(self, center: int = -1) -> Self:
        """The same tensor with columns of norm 1 and weights of at least 0, decreasing; no core is special."""
        weights, factors = components.normalized(self.cores[0], self.cores[1:])
        return replace(self, cores=(weights, *factors))

    def spectra(self) -> dict[str, Array]:
        """The norms of the terms, in decreasing order. They are no singular values: terms may cancel."""
        return {"r1": self.canonical().cores[0]}

    def truncated(self, ranks: Ranks) -> Self:
        """A smaller sum fitted to this one; this one where none is found."""
        found: Self = refitted(self, type(self).from_dense(self.dense(), self.axes, replace(ranks, larger=True)))
        return found


def finite(tensor: Array) -> Array:
    """The tensor in float64; TNCompileError where a number is not finite."""
    tensor = np.ascontiguousarray(tensor, dtype=np.float64)
    if not np.all(np.isfinite(tensor)):
        raise TNCompileError("the tensor has values that are not finite: it cannot be factorized")
    return tensor


def refitted(old: Any, new: Any) -> Any:
    """What was fitted to an older factorization, with both bounds; the older where the new is no smaller."""
    if new.parameters >= old.parameters:
        return old
    bound = None if old.bound is None else old.bound + new.bound * (1 + old.bound)
    return replace(new, bound=bound, notes=(*old.notes, *new.notes))
