"""Truncations of matrices, or of one matrix for each value of a batch, by their singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tncompile.decomp import randomized
from tncompile.decomp.ranks import rounding
from tncompile.ir import Array

LARGE = 2048
"""A matrix with both sides this long may be truncated by `randomized.svd`, to an eighth of its rank at most."""

GRAM = 64
"""A matrix with both sides this long is first tried by the eigenvectors of its Gram matrix, several times as fast."""

SAFE = 1e-6
"""The relative squared error from which on those are exact enough: they lose values below 1e-8 of the largest."""


@dataclass(frozen=True)
class Cut:
    """``left[batch, rows, rank]`` orthonormal, ``rest[batch, rank, columns]``, all values, and the squares left out."""

    left: Array
    rest: Array
    values: Array
    dropped: float


def truncate(matrix: Array, pick: int | Callable[[Array], int], nearly: bool = False) -> Cut:
    """The best approximation of each ``matrix[batch, rows, columns]`` by one rank, given or picked from their values.

    Values that are rounding are always left out. `nearly`: one that is nearly the best will do, where that is faster.
    """
    batch, rows, columns = matrix.shape
    if (
        nearly
        and isinstance(pick, int)
        and batch == 1
        and min(rows, columns) >= LARGE
        and pick * 8 <= min(rows, columns)
    ):
        found = randomized.svd(randomized.InMemory(matrix[0]), pick)
        return Cut(found.left[None], (found.values[:, None] * found.right)[None], found.values, found.dropped)
    if batch == 1 and min(rows, columns) >= GRAM:
        quick = _by_gram(matrix[0], pick)
        if quick is not None:
            return quick
    left, each, right = np.linalg.svd(matrix, full_matrices=False)
    values = pooled(each, rows, columns)
    rank = pick if isinstance(pick, int) else pick(values)
    rank = max(1, min(rank, len(values)))
    rest = each[:, :rank, None] * right[:, :rank]
    return Cut(left[:, :, :rank], rest, values, float(np.sum(each[:, rank:] ** 2)))


def keep(matrix: Array) -> Cut:
    """Nothing left out, the isometry being the identity."""
    batch, rows, _ = matrix.shape
    return Cut(np.broadcast_to(np.eye(rows), (batch, rows, rows)), matrix, np.zeros(0), 0.0)


def _by_gram(matrix: Array, pick: int | Callable[[Array], int]) -> Cut | None:
    """The truncation of one matrix by eigenvectors; None where too little is left out for them to be exact enough."""
    rows, columns = matrix.shape
    squares, vectors = np.linalg.eigh(matrix @ matrix.T if rows <= columns else matrix.T @ matrix)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    rank = max(1, min(pick if isinstance(pick, int) else pick(values), len(values)))
    kept = vectors[:, ::-1][:, :rank]
    left = kept if rows <= columns else np.linalg.qr(matrix @ kept)[0]
    rest = left.T @ matrix
    whole = float(np.vdot(matrix, matrix))
    dropped = whole - float(np.vdot(rest, rest)) + 8 * float(np.finfo(np.float64).eps) * whole
    return Cut(left[None], rest[None], values, dropped) if dropped > SAFE * whole else None


def pooled(each: Array, rows: int, columns: int) -> Array:
    """Singular values ``[batch, k]`` as one decreasing sequence, without those that are rounding."""
    values = np.sqrt(np.sum(each**2, axis=0))
    largest = float(values[0]) if len(values) else 0.0
    return np.asarray(values[values > rounding(rows, columns, largest)])


def singular_values(matrix: Array, exact: bool) -> Array:
    """The values of ``matrix[batch, rows, columns]`` as one sequence; if not `exact`, perhaps by a Gram matrix."""
    batch, rows, columns = matrix.shape
    if exact or batch > 1 or min(rows, columns) < GRAM:
        return pooled(np.linalg.svd(matrix, compute_uv=False), rows, columns)
    squares = np.linalg.eigvalsh(matrix[0] @ matrix[0].T if rows <= columns else matrix[0].T @ matrix[0])
    return pooled(np.sqrt(np.maximum(squares[None, ::-1], 0.0)), rows, columns)
