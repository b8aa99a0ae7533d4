"""The metric of a layer's inputs: errors are weighed by how much they change the layer's output.

With second moments ``M = E[x' x]`` of the input, ``E |x W - x V|^2 = |S (W - V)|^2`` where ``S' S = M``. So ``S W``
is factorized in the place of W, and S is undone on the core that has the input's mode. This is exact: the cores of W
differ from those of ``S W`` in that one axis of one core, and no rank changes.

A layer whose input has several modes can undo only an S that acts on each mode alone, the Kronecker product of one
small matrix for each. It is made from the partial traces of M; the norm that is minimized is then an approximation of
that of the outputs, and everything else stays exact.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.ir import Array

LARGE = 512


@dataclass(frozen=True, eq=False)
class Metric:
    """For each mode of the input a ``scale[n, n]``, S of the module's docstring, or ``[n]`` where it is diagonal, and
    its inverse."""

    scales: tuple[Array, ...]
    inverses: tuple[Array, ...]

    @staticmethod
    def of_moments(moments: Array, modes: Sequence[int] | None = None, regularization: float = 1e-6) -> Metric:
        """From second moments ``[in, in]``, for the modes of the input (by default one).

        Of diagonal ones, ``[in]``, scales are diagonals too.

        `regularization` times the mean of the diagonal is added to it, so that directions that the inputs never take
        keep a little weight and S has an inverse. Raises TNCompileError where the moments are not symmetric or fit no
        modes.
        """
        moments = np.asarray(moments, np.float64)
        modes = tuple(modes or (len(moments),))
        size = math.prod(modes)
        if moments.shape not in ((size, size), (size,)) or not np.all(np.isfinite(moments)):
            raise TNCompileError(
                f"second moments of modes {modes} are finite and of shape {(size, size)}, not {moments.shape}"
            )
        if moments.ndim == 2 and not np.allclose(
            moments, moments.T, rtol=1e-5, atol=1e-8 * float(np.abs(moments).max())
        ):
            raise TNCompileError("second moments are symmetric: give the mean of outer products of the inputs")
        if regularization <= 0:
            raise TNCompileError(f"regularization must be above 0, not {regularization}")
        root = _root if moments.ndim == 2 else _diagonal_root
        roots = [root(_partial(moments, modes, k), regularization) for k in range(len(modes))]
        return Metric(tuple(s for s, _ in roots), tuple(i for _, i in roots))

    @staticmethod
    def of_inputs(inputs: Array, modes: Sequence[int] | None = None, regularization: float = 1e-6) -> Metric:
        """From samples of the input, ``[..., in]``."""
        rows = np.asarray(inputs, np.float64).reshape(-1, np.shape(inputs)[-1])
        if not len(rows):
            raise TNCompileError("the metric of the inputs needs at least one sample")
        return Metric.of_moments(rows.T @ rows / len(rows), modes, regularization)

    @property
    def modes(self) -> tuple[int, ...]:
        """The sizes of the modes of the input."""
        return tuple(map(len, self.scales))

    def weigh(self, dense: Array) -> Array:
        """``S W`` for a matrix ``W[in, ...]``, of the same shape."""
        shape = dense.shape
        result = np.asarray(dense, np.float64).reshape(*self.modes, -1)
        for axis, scale in enumerate(self.scales):
            result = apply(scale, result, axis)
        return result.reshape(shape)


def apply(matrix: Array, tensor: Array, axis: int) -> Array:
    """A matrix, or the diagonal of one, times a tensor, over one of its axes."""
    if matrix.ndim == 1:
        return tensor * matrix.reshape(-1, *(1,) * (tensor.ndim - axis - 1))
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def _partial(moments: Array, modes: tuple[int, ...], mode: int) -> Array:
    """The partial trace over all modes but one; the product over all modes has the trace of the whole."""
    before, size, after = math.prod(modes[:mode]), modes[mode], math.prod(modes[mode + 1 :])
    if moments.ndim == 1:
        total = float(moments.sum())
        diagonal: Array = moments.reshape(before, size, after).sum((0, 2))
        return diagonal if mode == 0 or total <= 0 else diagonal / total
    part = np.einsum("aibajb->ij", moments.reshape(before, size, after, before, size, after))
    trace = float(np.trace(moments))
    return part if mode == 0 or trace <= 0 else np.asarray(part / trace)


def _root(moments: Array, regularization: float) -> tuple[Array, Array]:
    """A root S of regularized moments, ``S' S``, and its inverse.

    The symmetric one; of many inputs that of Cholesky, several times as fast.
    """
    if len(moments) >= LARGE:
        mean = float(np.trace(moments)) / len(moments)
        with contextlib.suppress(np.linalg.LinAlgError):  # of moments that are not quite positive
            whole = (moments + moments.T) / 2 + (regularization * mean if mean > 0 else 1.0) * np.eye(len(moments))
            root = np.linalg.cholesky(whole).T
            return root, np.linalg.inv(root)
    values, vectors = np.linalg.eigh((moments + moments.T) / 2)
    mean = float(np.mean(values))
    values = np.maximum(values, 0.0) + (regularization * mean if mean > 0 else 1.0)
    roots = np.sqrt(values)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _diagonal_root(moments: Array, regularization: float) -> tuple[Array, Array]:
    mean = float(np.mean(moments))
    root = np.sqrt(np.maximum(moments, 0.0) + (regularization * mean if mean > 0 else 1.0))
    return root, 1 / root
