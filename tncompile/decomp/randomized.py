"""Truncated singular value decompositions from a few passes over a matrix (Halko, Martinsson and Tropp 2011).

Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011: algorithm 4.4 finds the
range by subspace iteration, algorithm 5.1 makes the decomposition. The matrix may be one that is never in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tncompile.ir import Array


class Matrix(Protocol):
    """What the algorithms need of a matrix: products with thin ones, from either side, and its norm."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    def times(self, right: Array) -> Array:
        """The matrix times ``right[columns, k]``."""
        ...

    def transposed_times(self, left: Array) -> Array:
        """The transposed matrix times ``left[rows, k]``."""
        ...

    def squared_norm(self) -> float:
        """The sum of all squares."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A matrix that is an array."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.array.shape
        return rows, columns

    def times(self, right: Array) -> Array:
        """The matrix times ``right[columns, k]``."""
        return np.asarray(self.array @ right)

    def transposed_times(self, left: Array) -> Array:
        """The transposed matrix times ``left[rows, k]``."""
        return np.asarray(self.array.T @ left)

    def squared_norm(self) -> float:
        """The sum of all squares."""
        return float(np.vdot(self.array, self.array))


@dataclass(frozen=True)
class Truncated:
    """``left[rows, k] * values[k] @ right[k, columns]``, with the sum of squares of what it leaves out."""

    left: Array
    values: Array
    right: Array
    dropped: float


def svd(matrix: Matrix, rank: int, *, oversample: int = 10, power: int = 2, seed: int = 0) -> Truncated:
    """The leading `rank` singular triples, by a range of `oversample` more and `power` iterations.

    `dropped` is not an estimate: with Q orthonormal, ``|A - Q Q'A|^2 = |A|^2 - |Q'A|^2``, to which the squares that are
    cut off ``Q'A`` add. It is right to about 1e-15 of ``|A|^2``, so an error below 1e-7 reads as up to that.
    """
    rows, columns = matrix.shape
    width = min(rank + oversample, rows, columns)
    basis = range_of(matrix, width, power=power, seed=seed)
    small, values, right = np.linalg.svd(matrix.transposed_times(basis).T, full_matrices=False)
    kept = min(rank, width)
    whole = matrix.squared_norm()
    slack = 8 * np.finfo(np.float64).eps * whole
    dropped = max(whole - float(np.sum(values[:kept] ** 2)), 0.0) + slack
    return Truncated(basis @ small[:, :kept], values[:kept], right[:kept], dropped)


def range_of(matrix: Matrix, width: int, *, power: int = 2, seed: int = 0) -> Array:
    """An orthonormal ``[rows, width]`` whose span holds most of the matrix's range (algorithm 4.4)."""
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], width))
    basis = np.linalg.qr(matrix.times(start))[0]
    for _ in range(power):
        other = np.linalg.qr(matrix.transposed_times(basis))[0]
        basis = np.linalg.qr(matrix.times(other))[0]
    return np.asarray(basis)


def spectral_error(matrix: Matrix, basis: Array, *, probes: int = 10, seed: int = 1) -> float:
    """A bound of the spectral norm of ``A - Q Q'A`` that holds with probability ``1 - 10**-probes`` (equation 4.3)."""
    probe = np.random.default_rng(seed).standard_normal((matrix.shape[1], probes))
    seen = matrix.times(probe)
    left = seen - basis @ (basis.T @ seen)
    return 10 * math.sqrt(2 / math.pi) * float(np.max(np.linalg.norm(left, axis=0)))


def svd_to(matrix: Matrix, dropped: float, *, seed: int = 0) -> Truncated:
    """The fewest leading triples that leave out at most `dropped` in squares, found by doubling the rank."""
    most = min(matrix.shape)
    rank = min(16, most)
    while True:
        found = svd(matrix, rank, seed=seed)
        if found.dropped <= dropped or rank == most:
            break
        rank = min(2 * rank, most)
    squares = found.values**2
    beyond = found.dropped + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    kept = max(1, int(np.argmax(beyond <= max(dropped, found.dropped))))
    return Truncated(found.left[:, :kept], found.values[:kept], found.right[:kept], float(beyond[kept]))
