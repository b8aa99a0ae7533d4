"""The formats that suit a site, each with its modes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np

from tncompile.decomp import CP, BlockTrain, Factorized, MatrixTrain, Metric, NoGainError, Ranks, TensorTrain, Tucker
from tncompile.decomp.base import Axes
from tncompile.decomp.modes import balanced, useful_count
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.tensorizer.ladders import LARGE, LARGE_SHARE, Weighing, cut_ladder, tree_ladder
from tncompile.tensorizer.sites import Site

Moments = Array | Sequence[Array]
"""Second moments of a layer's input: ``[in, in]``; one such matrix for each axis of the input, whose Kronecker product
they then are; or, for a table, how often each row is read, ``[rows]``."""

SAMPLE = 1 << 17
"""Numbers of a part of a matrix on which formats are compared first."""

BETTER, NEAR = 0.98, 1.25
"""A format is followed where it makes at most this times the error of the SVD, or of the best cut, at equal size: of a
matrix, where it has more steps to run, and of a kernel, where it may have fewer."""

HEAVY, TOO_HEAVY = 1 << 20, 1 << 22
"""Numbers of a matrix from which on formats other than the SVD are made at few sizes, and not at all."""

CP_SIZE = 1 << 16
"""Larger kernels are not fitted by alternating least squares, which would take minutes."""

_REGULAR = 1e-6


@dataclass(frozen=True)
class Family:
    """A format with modes, at any size: `ladder` gives the factorizations for a decreasing row of sizes."""

    label: str
    ladder: Callable[[Sequence[int]], Iterator[Factorized]]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A site's matrix, and how its errors count."""

    site: Site
    moments: Moments | None = None
    _known: dict[tuple[int, ...], Weighing] = field(default_factory=dict, repr=False)

    @cached_property
    def array(self) -> Array:
        """The matrix in float64."""
        return np.asarray(self.site.matrix, np.float64)

    def weighing(self, modes: Sequence[int]) -> Weighing:
        """The norm that counts, as near as modes of the input allow. TNCompileError for moments that do not fit."""
        key = tuple(modes)
        if key not in self._known:
            self._known[key] = self._weighing(key)
        return self._known[key]

    def _weighing(self, modes: tuple[int, ...]) -> Weighing:
        moments = self.moments
        size = math.prod(modes)
        if moments is None:
            return Weighing()
        if not isinstance(moments, np.ndarray):
            return self._of_axes([np.asarray(m, np.float64) for m in moments], modes)
        if moments.ndim == 1:
            counts = np.asarray(moments, np.float64)
            if counts.shape != (size,) or not np.all(counts >= 0):
                raise TNCompileError(f"{self.site.name} has {size} rows, and counts {counts.shape} are given for them")
            weights = np.sqrt(counts + max(float(np.mean(counts)), np.finfo(float).tiny) * _ROW_FLOOR)
            return Weighing(rows=weights) if len(modes) == 1 else Weighing()
        return Weighing(Metric.of_moments(moments, modes))

    def _of_axes(self, moments: list[Array], modes: tuple[int, ...]) -> Weighing:
        """Moments of each axis of the input, for modes that are those axes or products of neighbours."""
        kept = [m for m in moments if len(m) > 1]
        groups: list[Array] = []
        for size in modes:
            group = [kept.pop(0)] if kept else []
            while kept and math.prod(map(len, group)) < size:
                group.append(kept.pop(0))
            if math.prod(map(len, group)) != size:
                raise TNCompileError(f"moments of sizes {[len(m) for m in moments]} do not fit modes {modes}")
            groups.append(reduce(np.kron, group))
        parts = [Metric.of_moments(m) for m in groups]
        return Weighing(Metric(tuple(p.scales[0] for p in parts), tuple(p.inverses[0] for p in parts)))

    @cached_property
    def exact(self) -> Weighing:
        """The norm in which errors are reported."""
        if self.moments is None or isinstance(self.moments, np.ndarray):
            return self.weighing((len(self.array),))
        return self.weighing(self.inputs)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Axes that are contracted, without those of size 1."""
        return tuple(size for size in self.site.in_sizes if size != 1)

    @cached_property
    def norm(self) -> float:
        """That of the matrix."""
        return float(np.linalg.norm(self.exact.weigh(self.array)))

    def error(self, factorized: Factorized) -> float:
        """The relative error of a factorization in the norm that counts."""
        wrong = float(np.linalg.norm(self.exact.weigh(self.array - factorized.dense())))
        return wrong / self.norm if self.norm else wrong


_ROW_FLOOR = 0.01
"""What a row that is never read counts, in mean counts: calibration data do not have every word."""


def families(matrix: Matrix) -> list[Family]:
    """All formats that suit a site: the SVD first, others where they are no worse on a part of it.

    Sites of several weights have the SVD only.
    """
    site = matrix.site
    first = _svd(matrix)
    if len(site.parts) > 1:
        return [first]
    windows = any(use.term.windows for use in site.parts[0].uses)
    others = list(_kernels(matrix) if windows and len(matrix.inputs) > 1 else _matrices(matrix))
    return [first, *others]


def _svd(matrix: Matrix) -> Family:
    rows, columns = matrix.array.shape
    several = matrix.moments is not None and not isinstance(matrix.moments, np.ndarray)
    axes: Axes = (matrix.inputs if several else (rows,), (columns,))

    def ladder(sizes: Sequence[int]) -> Iterator[Factorized]:
        most = matrix.array.size * (LARGE_SHARE if min(rows, columns) >= LARGE else 1.0)
        fits = [size for size in sizes if size <= most]
        weighing = matrix.weighing(axes[0])
        return cut_ladder(matrix.array, axes, range(len(axes[0])), weighing, fits)

    return Family("SVD", ladder)


# ------------------------------------------------------------------------------------ matrices


def _matrices(matrix: Matrix) -> Iterator[Family]:
    """Formats of a matrix with two modes or more on either side."""
    axes = _modes(matrix) if matrix.array.size <= TOO_HEAVY else None
    if axes is None:
        return
    sample, fewer = _sample(matrix.array, axes)
    size = sample.size // 4
    limit = BETTER * _svd_error(sample, size)
    kinds: list[type[TreeFactorized]] = [TensorTrain, MatrixTrain, Tucker]
    if len(axes[0]) == len(axes[1]):
        kinds.append(BlockTrain)
    for kind in kinds:
        if _error(kind, sample, fewer, size) <= limit:
            yield _tree(matrix, kind, axes, weighed=kind is not BlockTrain)


def _modes(matrix: Matrix) -> Axes | None:
    """Modes that the network around the weight has already, else two of about one size; None for a prime."""
    site = matrix.site
    part = site.parts[0]
    sides = []
    for numbers, size in ((part.ins, matrix.array.shape[0]), (part.outs, matrix.array.shape[1])):
        natural: tuple[int, ...] = ()
        if part.uses:
            core = part.uses[0].term.tensors[part.uses[0].position]
            natural = tuple(int(i.size) for axis in numbers for i in core.axes[axis] if i.size != 1)
        if len(natural) < 2:
            natural = balanced(size, 2) if useful_count(size) > 1 else ()
        sides.append(natural)
    return (sides[0], sides[1]) if all(len(side) > 1 for side in sides) else None


def _sample(matrix: Array, axes: Axes) -> tuple[Array, Axes]:
    """Some values of each mode: of whatever format the matrix is, its part is too, with bonds no larger."""
    sizes = [size for axis in axes for size in axis]
    tensor = matrix.reshape(sizes)
    while math.prod(sizes) > SAMPLE and max(sizes) > 4:
        largest = sizes.index(max(sizes))
        sizes[largest] = -(-sizes[largest] // 2)
    kept = [np.arange(new) * (old // new) for new, old in zip(sizes, tensor.shape, strict=True)]
    part = tensor[np.ix_(*kept)]
    count = len(axes[0])
    fewer: Axes = (tuple(sizes[:count]), tuple(sizes[count:]))
    return part.reshape(math.prod(fewer[0]), -1), fewer


def _svd_error(matrix: Array, size: int) -> float:
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    rank = max(1, size // sum(matrix.shape))
    return math.sqrt(float(np.sum(values[rank:])) / max(float(np.sum(values)), 1e-300))


def _error(kind: type[TreeFactorized], matrix: Array, axes: Axes, size: int, **options: Any) -> float:
    """The error of a format at a size; inf where it cannot be so small."""
    try:
        found = kind.from_dense(matrix, axes, Ranks(parameters=size), **options)
    except NoGainError:
        return math.inf
    return math.inf if found.bound is None else found.bound


# ------------------------------------------------------------------------------------ kernels


def _kernels(matrix: Matrix) -> Iterator[Family]:
    """Formats of a convolution's kernel ``[(c, k1, ...), (o,)]``."""
    axes: Axes = (matrix.inputs, (matrix.array.shape[1],))
    last = len(matrix.inputs)
    size = matrix.array.size // 4
    cuts: list[tuple[int, ...]] = [tuple(range(k)) for k in range(1, last)]
    limit = NEAR * min(
        _svd_error(matrix.array, size),
        *(_svd_error(matrix.array.reshape(math.prod(axes[0][: len(cut)]), -1), size) for cut in cuts),
    )
    for cut in cuts:
        if _svd_error(matrix.array.reshape(math.prod(axes[0][: len(cut)]), -1), size) <= limit:
            yield _cut(matrix, axes, cut)
    if _error(Tucker, matrix.array, axes, size, factored=(0, last)) <= limit:
        yield _tree(matrix, Tucker, axes, factored=(0, last))
    if _error(TensorTrain, matrix.array, axes, size) <= limit:
        yield _tree(matrix, TensorTrain, axes)
    if matrix.array.size <= CP_SIZE:
        yield _cp(matrix, axes)


def _cut(matrix: Matrix, axes: Axes, first: tuple[int, ...]) -> Family:
    def ladder(sizes: Sequence[int]) -> Iterator[Factorized]:
        return cut_ladder(matrix.array, axes, first, matrix.weighing(axes[0]), sizes)

    return Family(f"split {len(first)}", ladder)


def _cp(matrix: Matrix, axes: Axes) -> Family:
    """CP at the smallest sizes, where alternating least squares are quick and the other formats poor."""

    def ladder(sizes: Sequence[int]) -> Iterator[Factorized]:
        for size in itertools.islice((s for s in sizes if s <= matrix.array.size // 5), 0, None, 2):
            try:
                yield CP.from_dense(matrix.array, axes, Ranks(parameters=size))
            except NoGainError:
                return

    return Family("CP", ladder)


def _tree(matrix: Matrix, kind: type[TreeFactorized], axes: Axes, weighed: bool = True, **options: Any) -> Family:
    def ladder(sizes: Sequence[int]) -> Iterator[Factorized]:
        weighing = matrix.weighing(axes[0]) if weighed else Weighing()
        if matrix.array.size > HEAVY:
            sizes = [size for size in sizes if size <= matrix.array.size * LARGE_SHARE][::2]
        return tree_ladder(kind, matrix.array, axes, weighing, sizes, **options)

    return Family(kind.KIND, ladder)
