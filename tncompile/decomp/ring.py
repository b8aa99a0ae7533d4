"""The tensor ring: a train whose ends share a bond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp import ring_als, tree
from tncompile.decomp.base import Axes, Factorized, Labels, as_modes, mode_names, normal_axes
from tncompile.decomp.cp import refitted
from tncompile.decomp.cut import Cut, truncate
from tncompile.decomp.ranks import EXACT, Ranks, Sizes, clamp
from tncompile.decomp.tensor_train import TensorTrain
from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Ring(Factorized):
    """One core ``[r, mode, r']`` for each mode; the last one's right bond is the first one's left bond, ``r0``.

    TR-SVD of Zhao et al., "Tensor Ring Decomposition", arXiv:1606.05535, 2016, section 3.1: the first singular values
    are split into ``r0 * r1`` as evenly as they go, then the rest is a train. The squared error is the sum of what is
    left out, but no best ring need exist, so there is no factor to the best one.
    """

    KIND: ClassVar[str] = "tensor ring"

    @property
    def labels(self) -> Labels:
        """``[r0, n1, r1], [r1, n2, r2], ..., [r, nd, r0]``."""
        return _layout(self.axes)

    @classmethod
    def from_dense(cls, dense: Any, axes: Sequence[Sequence[int]] | None = None, ranks: Ranks = EXACT) -> Self:
        """TR-SVD. Given ranks are ``r0, r1, ...``; exactly, or where that is smaller, the ring is a train (``r0 = 1``).

        TR-SVD cannot make ``r0 * r1`` larger than the first mode. Such ranks are reached by alternating least squares
        from there, and `bound` is then the error as measured.

        Raises NoGainError where the result is no smaller than the tensor.
        """
        axes = normal_axes(axes or [(n,) for n in np.shape(dense)])
        tensor = np.ascontiguousarray(as_modes(dense, axes), dtype=np.float64)
        if tensor.ndim < 3:
            raise TNCompileError(f"a tensor ring needs three modes or more, not {tensor.ndim}")
        if ranks.given is not None:
            found = cls._given(tensor, axes, ranks)
        elif ranks.parameters is not None:
            found = cls._smallest_error(tensor, axes, ranks.parameters)
        else:
            found = cls._to_error(tensor, axes, ranks.error or 0.0)
        ranks.require_gain(cls.KIND, found.parameters, tensor.size)
        return found

    @classmethod
    def _given(cls, tensor: Array, axes: Axes, ranks: Ranks) -> Self:
        asked, notes = clamp(ranks.named([f"r{k}" for k in range(tensor.ndim)]), lambda r: _limits(tensor.shape, r))
        wanted, _ = clamp(asked, lambda r: {"r0": tensor.shape[0], "r1": max(1, tensor.shape[0] // r["r0"])})
        matrix = tensor.reshape(1, tensor.shape[0], -1)
        found = _closed(tensor, truncate(matrix, wanted["r0"] * wanted["r1"]), wanted["r0"], wanted["r1"], wanted)
        if wanted == asked:
            return cls(found.cores, axes, found.bound, notes + found.notes)
        refined = ring_als.refine(tensor, found.cores, tuple(asked.values()))
        return cls(refined.cores, axes, refined.error, notes)

    @classmethod
    def _to_error(cls, tensor: Array, axes: Axes, error: float) -> Self:
        """The smaller of the train and of the ring that leave out so much at most."""
        train = tree.decompose(tensor, _chain(tensor.shape), Ranks(error=error))
        best = cls(train.cores, axes, train.bound)
        norm = float(np.linalg.norm(tensor))
        allowed = 2 / tensor.ndim * (error * norm) ** 2

        def pick(values: Array) -> int:
            beyond = np.append(np.cumsum((values**2)[::-1])[::-1], 0.0)
            return max(1, int(np.argmax(beyond <= allowed)))

        cut = truncate(tensor.reshape(1, tensor.shape[0], -1), pick)
        rank = cut.left.shape[2]
        left = max(k for k in range(1, math.isqrt(rank) + 1) if rank % k == 0)
        if left == 1:
            return best
        ring = _closed(tensor, cut, left, rank // left, error)
        return cls(ring.cores, axes, ring.bound) if sum(c.size for c in ring.cores) < best.parameters else best

    @classmethod
    def _smallest_error(cls, tensor: Array, axes: Axes, parameters: int) -> Self:
        """The nearest of the train of this size, and of the rings found by halving the error, that are no larger."""
        train = tree.decompose(tensor, _chain(tensor.shape), Ranks(parameters=parameters))
        best = cls(train.cores, axes, train.bound)
        low, high = 0.0, train.bound
        for _ in range(12):
            middle = (low + high) / 2
            found = cls._to_error(tensor, axes, middle)
            if found.parameters <= parameters:
                best, high = found, middle
            else:
                low = middle
        return best

    def canonical(self, center: int = -1) -> Self:
        """The same tensor; each core before the center is orthonormal as ``[r mode, r']``, each behind it as ``[r,
        mode r']``.

        In a loop this uses up the freedom of all bonds but ``r0``; it does not make the rest an isometry.
        """
        opened = tree.Tree(
            _opened(self.labels),
            (*self.modes.items(), ("left", self.sizes["r0"]), ("right", self.sizes["r0"])),
            center % len(self.cores),
        )
        return replace(self, cores=tree.canonical(self.cores, opened))

    def truncated(self, ranks: Ranks) -> Self:
        """A smaller ring fitted to this one; this one where none is found."""
        found: Self = refitted(self, type(self).from_dense(self.dense(), self.axes, replace(ranks, larger=True)))
        return found

    def spectra(self) -> dict[str, Array]:
        """For each bond but ``r0`` the singular values of the tensor cut there and at ``r0``, as a train has them."""
        from tncompile.decomp.convert import convert

        return convert(self, TensorTrain).spectra()


def _layout(axes: Axes) -> Labels:
    count = len(mode_names(axes))
    return tuple((f"r{k}", name, f"r{(k + 1) % count}") for k, name in enumerate(mode_names(axes)))


def _opened(labels: Labels) -> Labels:
    """The ring cut at ``r0``, whose two ends are then modes."""
    (_, *first), *inner, (*last, _) = labels
    return (("left", *first), *inner, (*last, "right"))


def _chain(shape: Sequence[int]) -> tree.Tree:
    labels = TensorTrain.layout((tuple(shape),))
    return tree.Tree(labels, tuple((f"n{k + 1}", n) for k, n in enumerate(shape)), len(shape) - 1)


def _limits(shape: Sequence[int], ranks: Sizes) -> dict[str, int]:
    """The largest rank of each bond that the cores at its ends can use."""
    count = len(shape)
    return {
        f"r{k}": min(ranks[f"r{(k - 1) % count}"] * shape[k - 1], shape[k] * ranks[f"r{(k + 1) % count}"])
        for k in range(count)
    }


def _closed(tensor: Array, cut: Cut, left: int, right: int, rest: Sizes | float) -> tree.Result:
    """The ring whose first core is a cut of ``left * right`` values, its others a train to ranks or an error."""
    shape = tensor.shape
    notes: tuple[str, ...] = ()
    if cut.left.shape[2] < left * right:  # the tensor itself has a smaller rank there: fill up with zeros
        missing = left * right - cut.left.shape[2]
        cut = replace(
            cut,
            left=np.pad(cut.left, ((0, 0), (0, 0), (0, missing))),
            rest=np.pad(cut.rest, ((0, 0), (0, missing), (0, 0))),
        )
        notes = (f"{missing} of the {left * right} values of r0 and r1 are zeros",)
    first = cut.left[0].reshape(shape[0], left, right).transpose(1, 0, 2)
    remainder = np.moveaxis(cut.rest[0].reshape(left, right, *shape[1:]), 0, -1)
    names = [f"n{k + 2}" for k in range(len(shape) - 1)]
    labels = tuple((f"r{k + 1}", n, "r0" if n == names[-1] else f"r{k + 2}") for k, n in enumerate(names))
    chain = tree.Tree(labels, (("r1", right), *zip(names, shape[1:], strict=True), ("r0", left)), len(labels) - 1)
    norm = float(np.linalg.norm(tensor))
    if isinstance(rest, dict):
        wanted = Ranks(given=tuple(rest[b] for b in chain.bonds))
    else:
        allowed = max((rest * norm) ** 2 - cut.dropped, 0.0)
        inner = float(np.linalg.norm(remainder))
        wanted = Ranks(error=min(math.sqrt(allowed) / inner, 1 - 1e-9) if inner else 0.0)
    result = tree.decompose(remainder, chain, wanted)
    return tree.Result((first, *result.cores), cut.dropped + result.dropped, norm, notes + result.notes)
