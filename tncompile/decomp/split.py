"""Two factors across any cut of the modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tncompile.decomp import blocks
from tncompile.decomp.base import Axes, Labels, mode_names, normal_axes
from tncompile.decomp.metric import Metric
from tncompile.decomp.ranks import EXACT, Ranks
from tncompile.decomp.treeformat import TreeFactorized, fit
from tncompile.errors import TNCompileError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Split(TreeFactorized):
    """The SVD of another unfolding: the modes numbered in `first`, from 0 over all axes, are those of the first factor.

    A kernel ``[(c, k1, k2), (o,)]`` cut behind c is a convolution of 1 x 1 before one of k1 x k2; cut behind k1, one
    of k1 x 1 before one of 1 x k2 (Jaderberg, Vedaldi and Zisserman, BMVC 2014). The best of its rank, so `bound` is
    the error itself.
    """

    first: tuple[int, ...] = (0,)

    KIND: ClassVar[str] = "split"

    @property
    def labels(self) -> Labels:
        """``[first modes, r1], [r1, other modes]``."""
        return _layout(self.axes, self.first)

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """The first mode beside all others."""
        return _layout(axes, (0,))

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        axes: Sequence[Sequence[int]] | None = None,
        ranks: Ranks = EXACT,
        *,
        metric: Metric | None = None,
        memory: int = blocks.MEMORY,
        first: Sequence[int] = (0,),
    ) -> Self:
        """As `TreeFactorized.from_dense`; `first` numbers the modes of the first factor."""
        axes, chosen = normal_axes(axes or cls.default_axes(dense.shape)), tuple(sorted(first))
        return cls(**fit(cls.KIND, dense, axes, _layout(axes, chosen), cls.ROOT, ranks, metric, memory), first=chosen)


def _layout(axes: Axes, first: tuple[int, ...]) -> Labels:
    names = mode_names(axes)
    if not 0 < len({*first}) < len(names) or not {*first} < {*range(len(names))}:
        raise TNCompileError(f"modes are numbered from 0 to {len(names) - 1}; {first} leaves a factor without any")
    left = tuple(name for k, name in enumerate(names) if k in first)
    right = tuple(name for k, name in enumerate(names) if k not in first)
    return ((*left, "r1"), ("r1", *right))
