"""The Tucker format: a factor for each mode, or for some (Tucker-2), around a core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp import blocks
from tncompile.decomp.base import Axes, Labels, mode_names, normal_axes
from tncompile.decomp.metric import Metric
from tncompile.decomp.ranks import EXACT, Ranks
from tncompile.decomp.treeformat import TreeFactorized, fit
from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Tucker(TreeFactorized):
    """Factors ``[mode, r]`` for the modes numbered in `factored` (None: all), and last a core with the bonds and
    other modes.

    Factors for the two channels of a convolution alone make Tucker-2. Sequentially truncated HOSVD (Vannieuwenhoven,
    Vandebril and Meerbergen, SIAM J. Sci. Comput. 34(2), 2012): its squared error is the sum of what the modes leave
    out (De Lathauwer, De Moor and Vandewalle 2000, property 10), at most ``sqrt(d)`` times the error of the best.
    HOOI lowers it further.
    """

    factored: tuple[int, ...] | None = None

    KIND: ClassVar[str] = "Tucker"

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """Factors of all modes, then the core."""
        return _layout(axes, None)

    @property
    def labels(self) -> Labels:
        """``[mode, r]`` for each factored mode, then the core."""
        return _layout(self.axes, self.factored)

    @property
    def core_names(self) -> tuple[str, ...]:
        """``factor_0, factor_1, ..., core``."""
        return (*(f"factor_{k}" for k in range(len(self.cores) - 1)), "core")

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        axes: Sequence[Sequence[int]] | None = None,
        ranks: Ranks = EXACT,
        *,
        metric: Metric | None = None,
        memory: int = blocks.MEMORY,
        factored: Sequence[int] | None = None,
        iterations: int = 0,
    ) -> Self:
        """As `TreeFactorized.from_dense`; `factored` numbers the modes that get a factor, counted from 0 over all axes.

        `iterations` of HOOI (tensorly's `partial_tucker`) follow; they keep the ranks and never raise the error. They
        need the whole tensor in memory, and no metric.
        """
        axes = normal_axes(axes or [(n,) for n in np.shape(dense)])
        chosen = None if factored is None else tuple(sorted(factored))
        found = cls(**fit(cls.KIND, dense, axes, _layout(axes, chosen), -1, ranks, metric, memory), factored=chosen)
        if not iterations:
            return found
        if metric is not None:
            raise TNCompileError("HOOI does not know a metric: leave iterations at 0, or the metric out")
        return found.refined(dense, iterations)

    def refined(self, dense: Any, iterations: int) -> Self:
        """After some iterations of higher-order orthogonal iteration, from these factors."""
        import tensorly
        from tensorly.decomposition import partial_tucker

        tensor = np.asarray(dense, np.float64).reshape(list(self.modes.values()))
        start = self.canonical()
        chosen = list(range(tensor.ndim)) if self.factored is None else list(self.factored)
        with tensorly.backend_context("numpy", local_threadsafe=True):  # another library may have set its own
            (core, factors), _ = partial_tucker(
                tensor,
                rank=[factor.shape[1] for factor in start.cores[:-1]],
                modes=chosen,
                init=(start.cores[-1], list(start.cores[:-1])),
                n_iter_max=iterations,
                tol=1e-10,
            )
        norm = float(np.linalg.norm(tensor))
        refined = replace(self, cores=(*factors, core))
        error = refined.error(dense)
        if norm == 0 or error >= self.error(dense):
            return self
        return replace(refined, bound=error)


def _layout(axes: Axes, factored: tuple[int, ...] | None) -> Labels:
    names = mode_names(axes)
    chosen = range(len(names)) if factored is None else factored
    if any(not 0 <= k < len(names) for k in chosen) or len(set(chosen)) < len(chosen) or not chosen:
        raise TNCompileError(
            f"modes are numbered from 0 to {len(names) - 1}, each once: {factored} cannot have factors"
        )
    bonds = {k: f"r{k + 1}" for k in chosen}
    core = tuple(bonds.get(k, name) for k, name in enumerate(names))
    return (*((names[k], bonds[k]) for k in chosen), core)


def superdiagonal(order: int, rank: int) -> Array:
    """The tensor of so many axes that is 1 where all indices are equal, else 0."""
    tensor = np.zeros((rank,) * order)
    tensor[(np.arange(rank),) * order] = 1.0
    return tensor
