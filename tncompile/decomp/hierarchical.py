"""The hierarchical Tucker format, or tree tensor network, on a balanced tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tncompile.decomp.base import Axes, Labels, group_names, mode_names
from tncompile.decomp.treeformat import TreeFactorized


@dataclass(frozen=True, eq=False)
class Hierarchical(TreeFactorized):
    """A frame ``[mode, r]`` for each mode and transfer tensors ``[r_left, r_right, r]`` on a balanced binary tree.

    The two halves at the top share one bond, so there is no matrix between them; of a matrix they are input and output.
    Grasedyck, "Hierarchical Singular Value Decomposition of
    Tensors", SIAM J. Matrix Anal. Appl. 31(4), 2010, section 3: the squared error is at most the sum of what
    all bonds leave out, and the error at most ``sqrt(2 d - 3)`` times that of the best such network.
    """

    KIND: ClassVar[str] = "hierarchical Tucker"

    @classmethod
    def layout(cls, axes: Axes) -> Labels:
        """From the leaves to the root; bonds are named by the first and last mode below them, ``r_i1_i3``."""
        names = mode_names(axes)
        if len(names) == 1:
            return (names,)
        halves = (group_names(axes, 0), group_names(axes, 1)) if len(axes) == 2 else _halves(names)
        cores: list[tuple[str, ...]] = []
        top = _bond(halves[0])
        todo = [(halves[1], top), (halves[0], top)]
        while todo:
            inside, bond = todo.pop(0)
            if len(inside) == 1:
                cores.append((inside[0], bond))
            else:
                left, right = _halves(inside)
                cores.append((_bond(left), _bond(right), bond))
                todo += [(left, _bond(left)), (right, _bond(right))]
        return tuple(reversed(cores))


def _halves(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    middle = (len(names) + 1) // 2
    return tuple(names[:middle]), tuple(names[middle:])


def _bond(names: Sequence[str]) -> str:
    """A bond's name: the first and last of the modes below it, which are contiguous."""
    return "r_" + "_".join(dict.fromkeys((names[0], names[-1])))
