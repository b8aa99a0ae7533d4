"""Rows and columns of a matrix in an order in which factorizations need smaller bonds.

A network of modes sees a row by its digits. Where rows that are alike are neighbours the last digits say little, so
the bonds to them are small; trained weights come in no order at all, for the neurons of a layer may be permuted freely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tncompile.decomp import randomized
from tncompile.decomp.base import Factorized
from tncompile.errors import TNCompileError
from tncompile.ir import Array

F = TypeVar("F", bound=Factorized)

DENSE_ROWS = 2048
"""Up to so many rows eigenvectors are computed exactly."""


@dataclass(frozen=True, eq=False)
class Permutation:
    """``permuted = W[rows][:, columns]``. The layer then is ``y[columns] = x[rows] permuted``."""

    rows: Array
    columns: Array

    def __post_init__(self) -> None:
        for numbers in (self.rows, self.columns):
            if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
                raise TNCompileError("a permutation has each number from 0 once")

    @staticmethod
    def identity(shape: tuple[int, int]) -> Permutation:
        """The one that changes nothing."""
        return Permutation(np.arange(shape[0]), np.arange(shape[1]))

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return all(np.array_equal(n, np.arange(len(n))) for n in (self.rows, self.columns))

    def apply(self, dense: Array) -> Array:
        """The matrix with rows and columns in the new order."""
        return np.asarray(dense)[self.rows][:, self.columns]

    def undo(self, permuted: Array) -> Array:
        """The matrix with rows and columns in the original order."""
        return np.asarray(permuted)[np.argsort(self.rows)][:, np.argsort(self.columns)]

    def into_previous(self, weight: Array) -> Array:
        """The layer before, ``weight[in, rows]`` or its bias, with what it computes in the order that the rows have
        here.

        So the rows need no gather at run time. Between the two there may only be operations on each element alone.
        """
        return np.asarray(weight)[..., self.rows]

    def into_next(self, weight: Array) -> Array:
        """The layer behind, ``weight[columns, out]``, reading what this layer computes in the new order."""
        return np.asarray(weight)[self.columns]


def by_correlation(dense: Array) -> Permutation:
    """Rows and columns so that those which are alike, or opposite, are near to each other.

    Spectral seriation (Atkins, Boman and Hendrickson, SIAM J. Comput. 28(1), 1998): the order of the second eigenvector
    of the graph whose weights are the absolute cosines between rows, and between columns.
    """
    matrix = np.asarray(dense, np.float64)
    if matrix.ndim != 2 or not np.all(np.isfinite(matrix)):
        raise TNCompileError(f"an order of rows and columns needs a matrix of finite numbers, not shape {matrix.shape}")
    return Permutation(_seriation(matrix), _seriation(matrix.T))


def reorder(dense: Array, build: Callable[[Array], F]) -> tuple[F, Permutation]:
    """What `build` makes of a matrix as it is or by correlation: the smaller one, of equal size the one with the
    lower bound.

    ``reorder(w, lambda m: MatrixTrain.from_dense(m, axes, ranks))``. The factorization is that of
    ``permutation.apply(w)``.
    """
    permutation = by_correlation(dense)
    plain, permuted = build(np.asarray(dense)), build(permutation.apply(dense))

    def merit(found: Any) -> tuple[int, float]:
        return found.parameters, np.inf if found.bound is None else found.bound

    if merit(permuted) < merit(plain):
        return permuted, permutation
    rows, columns = np.shape(dense)
    return plain, Permutation.identity((rows, columns))


def _seriation(rows: Array) -> Array:
    count = len(rows)
    if count < 3:
        return np.arange(count)
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    alike = np.abs(unit @ unit.T)
    degree = np.sqrt(np.maximum(alike.sum(axis=1), 1e-300))
    scaled = alike / degree[:, None] / degree
    if count <= DENSE_ROWS:
        vector = np.linalg.eigh(scaled)[1][:, -2]
    else:
        vector = randomized.svd(randomized.InMemory(scaled), 2, power=8).left[:, 1]
    vector = vector / degree
    largest = int(np.argmax(np.abs(vector)))
    return np.argsort(vector * np.sign(vector[largest]), kind="stable")
