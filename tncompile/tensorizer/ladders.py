"""One decomposition, many sizes: the same factorization at a ladder of numbers of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tncompile.decomp import SVD, Factorized, Metric, NoGainError, Ranks, Split, randomized
from tncompile.decomp.base import Axes, mode_names
from tncompile.decomp.metric import apply
from tncompile.decomp.treeformat import WEIGHED, TreeFactorized
from tncompile.ir import Array

LARGE = 2048
"""A matrix with both sides this long is sampled."""

LARGE_SHARE = 0.5
"""Of which no more than this share of the parameters is kept: more takes minutes."""

BLOCK = 8
"""Ranks of 16 or more are multiples of this, which kernels are fast at."""


@dataclass(frozen=True, eq=False)
class Weighing:
    """How errors of a matrix ``[in, out]`` count: by the metric of the inputs, by a weight for each row, or alike."""

    metric: Metric | None = None
    rows: Array | None = None

    def weigh(self, matrix: Array) -> Array:
        """The matrix whose Frobenius norm is the norm that counts."""
        if self.rows is not None:
            return np.asarray(matrix * self.rows[:, None])
        return np.asarray(matrix, np.float64) if self.metric is None else self.metric.weigh(matrix)

    def undo(self, factorized: Factorized) -> Factorized:
        """The factorization of the matrix for one of the weighed matrix, of the same axes."""
        cores = list(factorized.cores)
        inputs = [name for name in mode_names(factorized.axes) if name.startswith("i")]
        owners = [next((k, on.index(name)) for k, on in enumerate(factorized.labels) if name in on) for name in inputs]
        if self.rows is not None:
            ((core, axis),) = owners
            cores[core] = np.moveaxis(np.moveaxis(cores[core], axis, -1) / self.rows, -1, axis)
        elif self.metric is not None:
            for (core, axis), inverse in zip(owners, self.metric.inverses, strict=True):
                cores[core] = apply(inverse, cores[core], axis)
        else:
            return factorized
        return replace(factorized, cores=tuple(cores), notes=(*factorized.notes, WEIGHED))


def cut_ladder(
    matrix: Array, axes: Axes, first: Sequence[int], weighing: Weighing, sizes: Sequence[int]
) -> Iterator[Factorized]:
    """Two factors with the modes `first` on the left one, at the largest rank that each size allows, from one SVD.

    The bound of each is its error. Singular values are shared alike between the two, so that both are of one scale.
    """
    modes = [size for axis in axes for size in axis]
    others = [k for k in range(len(modes)) if k not in first]
    tensor = weighing.weigh(matrix).reshape(modes)
    unfolded = tensor.transpose(*first, *others).reshape(math.prod(modes[k] for k in first), -1)
    rows, columns = unfolded.shape
    ranks = [rounded(min(size // (rows + columns), rows, columns)) for size in sizes]
    ranks = [rank for rank in dict.fromkeys(ranks) if 0 < rank * (rows + columns) < matrix.size]
    if not ranks:
        return
    left, values, right = _svd(unfolded, max(ranks))
    norm = float(np.vdot(unfolded, unfolded))
    kind: dict[str, Any] = {} if tuple(first) == tuple(range(len(axes[0]))) else {"first": tuple(first)}
    for rank in ranks:
        kept = values[:rank]
        dropped = max(norm - float(np.sum(kept**2)), 0.0)
        share = np.sqrt(kept)
        cores = (
            (left[:, :rank] * share).reshape(*(modes[k] for k in first), -1),
            (share[:, None] * right[:rank]).reshape(-1, *(modes[k] for k in others)),
        )
        bound = math.sqrt(dropped / norm) if norm else 0.0
        found = Split(cores, axes, bound, **kind) if kind else SVD(cores, axes, bound)
        yield weighing.undo(found)


def tree_ladder(
    kind: type[TreeFactorized],
    matrix: Array,
    axes: Axes,
    weighing: Weighing,
    sizes: Sequence[int],
    **options: Any,
) -> Iterator[Factorized]:
    """A format at each of some sizes, in decreasing order, each truncated from the one before."""
    now: TreeFactorized | None = None
    weighed = weighing.weigh(matrix)
    for size in sizes:
        try:
            if now is None:
                now = kind.from_dense(weighed, axes, Ranks(parameters=size), **options)
            else:
                now = now.truncated(Ranks(parameters=size))
        except NoGainError:  # not even with every rank 1
            return
        ranks = tuple(rounded(rank) for rank in now.ranks.values())
        if ranks != tuple(now.ranks.values()):
            now = now.truncated(Ranks(given=ranks))
        yield weighing.undo(now)


def rounded(rank: int) -> int:
    """A rank as kernels like it: a multiple of `BLOCK`, where that is no great loss."""
    return rank // BLOCK * BLOCK if rank >= 2 * BLOCK else rank


def _svd(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """The leading `rank` singular triples, the smaller ones to about 1e-8 of the largest."""
    rows, columns = matrix.shape
    if min(rows, columns) >= LARGE:
        found = randomized.svd(randomized.InMemory(matrix), rank, power=1)
        return found.left, found.values, found.right
    if rows < columns:
        left, values, right = _svd(matrix.T, rank)
        return right.T, values, left.T
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, ::-1][:, :rank]
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    left = matrix @ right
    return left / np.where(values > 0, values, 1.0), values, right.T
