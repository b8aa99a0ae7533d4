"""Alternating least squares for tensor rings (Zhao et al. 2016, section 3.2): each core in turn, the others held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.ir import Array


@dataclass(frozen=True)
class Fit:
    """Cores, and the relative error that they make."""

    cores: tuple[Array, ...]
    error: float


def refine(tensor: Array, cores: Sequence[Array], ranks: Sequence[int], iterations: int = 50) -> Fit:
    """The best of all rings seen, from cores that are first filled up to `ranks` with small random numbers.

    Core k is ``[ranks[k], mode, ranks[k + 1]]``. An update never raises the error but for rounding; it ends where a
    round of updates lowers it by less than a part in 10,000.
    """
    norm = float(np.linalg.norm(tensor)) or 1.0
    generator = np.random.default_rng(0)
    current = [
        _filled(core, (ranks[k], core.shape[1], ranks[(k + 1) % len(ranks)]), generator) for k, core in enumerate(cores)
    ]
    best: Fit | None = None
    for _ in range(iterations):
        error = 0.0
        for k in range(len(current)):
            current[k], error = _update(tensor, current, k)
        done = best is not None and error > best.error * (1 - 1e-4)
        if best is None or error < best.error:
            best = Fit(tuple(current), error)
        if done or error <= 1e-12 * norm:
            break
    assert best is not None
    return Fit(best.cores, best.error / norm)


def _update(tensor: Array, cores: Sequence[Array], k: int) -> tuple[Array, float]:
    """The best core at one place, and the error then."""
    count = len(cores)
    chain = cores[(k + 1) % count]
    for step in range(2, count):
        chain = np.tensordot(chain, cores[(k + step) % count], 1)
    left, size, right = cores[k].shape
    # chain[r_right, modes behind k and then before it, r_left]
    design = np.moveaxis(chain, -1, 0).reshape(left * right, -1)
    unfolded = np.transpose(tensor, [(k + step) % count for step in range(count)]).reshape(size, -1)
    # normal equations, as `lstsq` on the design itself takes many times as long; it may have any rank
    solution = np.linalg.lstsq(design @ design.T, design @ unfolded.T, rcond=None)[0]
    error = float(np.linalg.norm(unfolded - solution.T @ design))
    return solution.T.reshape(size, left, right).transpose(1, 0, 2), error


def _filled(core: Array, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    scale = 0.1 * float(np.sqrt(np.mean(core**2)))
    filled = scale * generator.standard_normal(shape)
    filled[tuple(slice(n) for n in core.shape)] = core
    return filled
