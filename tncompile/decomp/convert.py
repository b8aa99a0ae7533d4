"""From one format to another, the tensor unchanged but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tncompile.decomp import modes, tree
from tncompile.decomp.base import Factorized, mode_names, normal_axes
from tncompile.decomp.block_train import BlockTrain
from tncompile.decomp.cp import CP
from tncompile.decomp.hierarchical import Hierarchical
from tncompile.decomp.kronecker import Kronecker
from tncompile.decomp.matrix_train import MatrixTrain
from tncompile.decomp.ranks import EXACT, Ranks
from tncompile.decomp.ring import Ring
from tncompile.decomp.svd import SVD
from tncompile.decomp.tensor_train import TensorTrain
from tncompile.decomp.tucker import Tucker, superdiagonal
from tncompile.errors import TNCompileError
from tncompile.ir import Array

F = TypeVar("F", bound=Factorized)


def convert(source: Factorized, target: type[F]) -> F:
    """The same tensor in another format, from the cores alone; bound and notes are kept.

    Raises TNCompileError where there is no exact way, and names those that there are. A TT-matrix becomes the train
    of the rearranged tensor, with one axis ``in * out`` for each site; `matrix_train` is the way back.
    """
    if type(source) is target:
        return source
    ways = {to: make for (origin, to), make in _WAYS.items() if isinstance(source, origin)}
    if target not in ways:
        known = ", ".join(to.__name__ for to in ways) or "nothing"
        raise TNCompileError(
            f"no exact way from {type(source).__name__} to {target.__name__}, only to {known}: "
            f"use {target.__name__}.from_dense(source.dense(), ...)"
        )
    converted: F = ways[target](source)
    return converted


def matrix_train(train: TensorTrain, axes: Sequence[Sequence[int]]) -> MatrixTrain:
    """The TT-matrix whose sites are those of a train, the mode of each split into ``(in, out)`` of these axes.

    The inverse of ``convert(matrix_train, TensorTrain)``. Raises TNCompileError where the sizes differ.
    """
    axes = normal_axes(axes)
    MatrixTrain.layout(axes)  # raises where they are no matrix's
    legs = modes.paired(*axes)
    sites = tuple(map(math.prod, legs))
    if sites != tuple(train.modes.values()):
        raise TNCompileError(f"modes {tuple(train.modes.values())} of the train are not the products {sites} of {axes}")
    cores = [core.reshape(len(core), *pair, core.shape[2]) for core, pair in zip(train.cores, legs, strict=True)]
    return MatrixTrain(tuple(cores), axes, train.bound, train.notes)


def _svd_to_train(source: SVD) -> TensorTrain:
    """Each factor is a train over its modes and the bond."""
    left, right = source.cores
    rank = source.ranks["r1"]
    before = _chain(left.reshape(*source.axes[0], rank))
    after = _chain(right.reshape(rank, *source.axes[1]))
    head = [*before[:-2], np.tensordot(before[-2], before[-1][:, :, 0], 1)]
    tail = [np.tensordot(after[0][0], after[1], 1), *after[2:]]
    return TensorTrain((*head, *tail), source.axes, source.bound, source.notes)


def _chain(tensor: Array) -> tuple[Array, ...]:
    """The exact train of a small tensor."""
    axes = (tensor.shape,)
    named = tuple(zip(mode_names(axes), tensor.shape, strict=True))
    return tree.decompose(tensor, tree.Tree(TensorTrain.layout(axes), named, tensor.ndim - 1), EXACT).cores


def _train_to_ring(source: TensorTrain) -> Ring:
    return Ring(source.cores, source.axes, source.bound, source.notes)


def _ring_to_train(source: Ring) -> TensorTrain:
    """The bond that closes the ring runs along all others."""
    first, *inner, last = source.cores
    closing = source.ranks["r0"]
    through = np.eye(closing)
    cores = [first.transpose(1, 0, 2).reshape(1, first.shape[1], -1)]
    cores += [np.einsum("ab,inj->ainbj", through, c).reshape(closing * c.shape[0], c.shape[1], -1) for c in inner]
    cores.append(last.transpose(2, 0, 1).reshape(-1, last.shape[1], 1))
    return TensorTrain(tuple(cores), source.axes, source.bound, source.notes)


def _matrix_train_to_train(source: MatrixTrain) -> TensorTrain:
    cores = tuple(core.reshape(core.shape[0], -1, core.shape[3]) for core in source.cores)
    return TensorTrain(cores, tuple((core.shape[1],) for core in cores), source.bound, source.notes)


def _tucker_to_hierarchical(source: Tucker) -> Hierarchical:
    """The core in hierarchical format; each factor times the frame of its bond."""
    *factors, core = source.cores
    if len(factors) < core.ndim:
        raise TNCompileError("only a Tucker format with a factor for each mode is hierarchical")
    sizes = iter(core.shape)
    axes = tuple(tuple(next(sizes) for _ in axis) for axis in source.axes)
    inner = Hierarchical.from_dense(core.reshape([math.prod(a) for a in axes]), axes, Ranks(larger=True))
    owner = dict(zip(mode_names(axes), factors, strict=True))
    cores = [
        owner[labels[0]] @ node if labels[0] in owner else node
        for labels, node in zip(inner.labels, inner.cores, strict=True)
    ]
    return Hierarchical(tuple(cores), source.axes, source.bound, source.notes)


def _cp_to_train(source: CP) -> TensorTrain:
    """Every inner core is diagonal in its bonds."""
    weights, *factors = source.cores
    if len(factors) == 1:
        return TensorTrain(((factors[0] @ weights)[None, :, None],), source.axes, source.bound, source.notes)
    rank = len(weights)
    cores = [(factors[0] * weights)[None]]
    cores += [np.einsum("nr,rs->rns", factor, np.eye(rank)) for factor in factors[1:-1]]
    cores.append(factors[-1].T[:, :, None])
    return TensorTrain(tuple(cores), source.axes, source.bound, source.notes)


def _cp_to_ring(source: CP) -> Ring:
    return _train_to_ring(_cp_to_train(source))


def _cp_to_tucker(source: CP) -> Tucker:
    """The core has the weights on its superdiagonal."""
    weights, *factors = source.cores
    core = superdiagonal(len(factors), len(weights)) * weights
    return Tucker((*factors, core), source.axes, source.bound, source.notes)


def _cp_to_hierarchical(source: CP) -> Hierarchical:
    """Transfer tensors are superdiagonal; the last core has the weights."""
    weights, *factors = source.cores
    owner = dict(zip(mode_names(source.axes), factors, strict=True))
    if len(factors) == 1:
        return Hierarchical((factors[0] @ weights,), source.axes, source.bound, source.notes)
    cores = [
        owner[labels[0]] if labels[0] in owner else superdiagonal(len(labels), len(weights))
        for labels in Hierarchical.layout(source.axes)
    ]
    cores[-1] = cores[-1] * weights
    return Hierarchical(tuple(cores), source.axes, source.bound, source.notes)


def _kronecker_to_matrix_train(source: Kronecker) -> MatrixTrain:
    """Every inner core is diagonal in its bonds."""
    first, *inner, last = source.cores
    through = np.eye(len(first))
    cores = [first.transpose(1, 2, 0)[None]]
    cores += [np.einsum("rio,rs->rios", core, through) for core in inner]
    cores.append(last[..., None])
    return MatrixTrain(tuple(cores), source.axes, source.bound, source.notes)


def _matrix_train_to_kronecker(source: MatrixTrain) -> Kronecker:
    if len(source.cores) != 2:
        raise TNCompileError(f"only a TT-matrix of two sites is a Kronecker sum, and this one has {len(source.cores)}")
    first, last = source.cores
    return Kronecker((first[0].transpose(2, 0, 1), last[..., 0]), source.axes, source.bound, source.notes)


def _block_train_to_matrix_train(source: BlockTrain) -> MatrixTrain:
    """The bond also carries what both cores have: the second mode of the input and the first of the output."""
    if len(source.cores) != 2:
        raise TNCompileError(
            f"only a block train of two cores becomes a TT-matrix, and this one has {len(source.cores)}"
        )
    first, last = source.cores  # [i1, i2, o1, r], [r, i2, o1, o2]
    (rows, carried, early, rank), late = first.shape, last.shape[3]
    left = np.einsum("abcr,cd->acbdr", first, np.eye(early)).reshape(1, rows, early, carried * early * rank)
    right = np.einsum("rbcd,eb->ecrbd", last, np.eye(carried)).reshape(carried * early * rank, carried, late, 1)
    return MatrixTrain((left, right), source.axes, source.bound, source.notes)


_WAYS: dict[tuple[type[Factorized], type[Factorized]], Callable[[Any], Any]] = {
    (SVD, TensorTrain): _svd_to_train,
    (TensorTrain, Ring): _train_to_ring,
    (Ring, TensorTrain): _ring_to_train,
    (MatrixTrain, TensorTrain): _matrix_train_to_train,
    (MatrixTrain, Kronecker): _matrix_train_to_kronecker,
    (Kronecker, MatrixTrain): _kronecker_to_matrix_train,
    (BlockTrain, MatrixTrain): _block_train_to_matrix_train,
    (Tucker, Hierarchical): _tucker_to_hierarchical,
    (CP, TensorTrain): _cp_to_train,
    (CP, Ring): _cp_to_ring,
    (CP, Tucker): _cp_to_tucker,
    (CP, Hierarchical): _cp_to_hierarchical,
}
