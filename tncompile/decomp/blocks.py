"""Tensors larger than memory: read in blocks, for the first truncation, after which the rest fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tncompile.decomp import randomized
from tncompile.errors import TNCompileError
from tncompile.ir import Array

MEMORY = 2 << 30
"""Bytes that a tensor may take as float64; one that takes more is read in blocks."""

GRAM_ROWS = 2048
"""Up to so many rows the range of a matrix is found from its Gram matrix, in one pass."""


def too_large(tensor: Array, memory: int) -> bool:
    """Whether the tensor as float64 takes more than `memory` bytes."""
    return tensor.size * 8 > memory


def pieces(tensor: Array, first: int, last: int, elements: int) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut the axes ``first`` to ``last`` so that a piece has about `elements` at most.

    Leading axes are cut first, so that pieces of an array in row-major order are read from one place.
    """
    whole = tensor.size
    cuts: list[list[slice]] = [[slice(None)] for _ in range(tensor.ndim)]
    for axis in range(first, last):
        length = tensor.shape[axis]
        step = max(1, min(length, length * elements // max(whole, 1)))
        cuts[axis] = [slice(k, min(k + step, length)) for k in range(0, length, step)]
        whole = whole // length * step
    yield from itertools.product(*cuts)


class TooLargeError(TNCompileError):
    """What a truncation leaves does not fit into memory."""


@dataclass(frozen=True)
class Blocked:
    """A tensor, such as a `numpy.memmap` or a transposed view of one, whose first `lead` axes are rows of a matrix."""

    tensor: Array
    lead: int
    elements: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.tensor.shape[: self.lead]), math.prod(self.tensor.shape[self.lead :])

    def _rows(self) -> Iterator[tuple[Array, Array]]:
        """Blocks of whole rows, each with the numbers of its rows."""
        numbers = np.arange(self.shape[0]).reshape(self.tensor.shape[: self.lead])
        for piece in pieces(self.tensor, 0, self.lead, self.elements):
            rows = numbers[piece[: self.lead]].reshape(-1)
            yield rows, _float64(self.tensor[piece]).reshape(len(rows), -1)

    def columns(self) -> Iterator[tuple[Array, Array]]:
        """Blocks of whole columns, each with the numbers of its columns."""
        numbers = np.arange(self.shape[1]).reshape(self.tensor.shape[self.lead :])
        for piece in pieces(self.tensor, self.lead, self.tensor.ndim, self.elements):
            chosen = numbers[piece[self.lead :]].reshape(-1)
            yield chosen, _float64(self.tensor[piece]).reshape(-1, len(chosen))

    def times(self, right: Array) -> Array:
        """The matrix times ``right[columns, k]``, in one pass."""
        result = np.empty((self.shape[0], right.shape[1]))
        for rows, block in self._rows():
            result[rows] = block @ right
        return result

    def transposed_times(self, left: Array) -> Array:
        """The transposed matrix times ``left[rows, k]``, in one pass."""
        result = np.zeros((self.shape[1], left.shape[1]))
        for rows, block in self._rows():
            result += block.T @ left[rows]
        return result

    def squared_norm(self) -> float:
        """The sum of all squares, in one pass."""
        return sum(float(np.vdot(block, block)) for _, block in self._rows())


def split(tensor: Array, lead: int, rank: int | None, error: float, memory: int) -> tuple[Array, Array, float, float]:
    """``U[rows, k]`` orthonormal and ``U'A``, a matrix ``[k, columns]``, of a tensor that is read in blocks.

    `rank`, or where it is None the relative error, says how much is kept. Returned with them are the sum of squares
    that is left out and that of the whole. With few rows U comes from the Gram matrix, so that singular values below
    1e-8 of the largest are lost; otherwise from `randomized.svd`. Raises TooLargeError where ``U'A`` does not fit.
    """
    matrix = Blocked(tensor, lead, max(1, memory // 32))
    whole = matrix.squared_norm()
    if not math.isfinite(whole):
        raise TNCompileError("the tensor has values that are not finite: it cannot be factorized")
    rows, columns = matrix.shape
    if rows > GRAM_ROWS:
        found = randomized.svd(matrix, rank) if rank is not None else randomized.svd_to(matrix, error**2 * whole)
        return found.left, found.values[:, None] * found.right, found.dropped, whole
    gram = np.zeros((rows, rows))
    for _, block in matrix.columns():
        gram += block @ block.T
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    beyond = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    kept = rank if rank is not None else max(1, int(np.argmax(beyond <= error**2 * whole)))
    kept = min(kept, rows)
    if kept * columns * 8 > memory:
        raise TooLargeError(
            f"a first rank of {kept} leaves {kept * columns * 8:,} bytes, more than the {memory:,} of memory: "
            "give a smaller first rank, a larger error or more memory"
        )
    left = np.ascontiguousarray(vectors[:, :kept])
    rest = np.empty((kept, columns))
    for chosen, block in matrix.columns():
        rest[:, chosen] = left.T @ block
    slack = 8 * np.finfo(np.float64).eps * whole
    return left, rest, max(whole - float(np.vdot(rest, rest)), 0.0) + slack, whole


def _float64(block: Array) -> Array:
    return np.ascontiguousarray(block, dtype=np.float64)
