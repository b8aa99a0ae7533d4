"""Sums of products whose terms share one bond on all cores: what CP and Kronecker sums have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.decomp.ranks import NoGainError, Ranks
from tncompile.decomp.tree import Tree, decompose
from tncompile.ir import Array

COMPRESS = 1 << 16
"""A tensor with more numbers is first projected on the leading subspaces of its modes."""


@dataclass(frozen=True)
class Components:
    """``sum_r weights[r] factors[0][:, r] x factors[1][:, r] x ...`` with the relative error it makes."""

    weights: Array
    factors: tuple[Array, ...]
    error: float

    def dense(self) -> Array:
        """The tensor, in float64."""
        return dense_of(self.weights, self.factors)


def dense_of(weights: Array, factors: Sequence[Array]) -> Array:
    """The tensor of weighted products of columns."""
    result = weights[None, :] * factors[0]
    for factor in factors[1:-1]:
        result = (result[:, None, :] * factor[None, :, :]).reshape(-1, result.shape[1])
    shape = [len(f) for f in factors]
    return (result @ factors[-1].T if len(factors) > 1 else result.sum(axis=1)).reshape(shape)


def normalized(weights: Array, factors: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
    """The same sum with columns of norm 1 and the weights, all at least 0, in decreasing order."""
    weights, unit = np.array(weights, np.float64), []
    for factor in factors:
        norms = np.linalg.norm(factor, axis=0)
        weights *= norms
        unit.append(factor / np.where(norms > 0, norms, 1.0))
    unit[0] = unit[0] * np.where(weights < 0, -1.0, 1.0)
    order = np.argsort(-np.abs(weights), kind="stable")
    return np.abs(weights)[order], tuple(f[:, order] for f in unit)


def exact(tensor: Array) -> Components:
    """The sum over all fibres of the longest mode: unit vectors for the other modes, without the fibres that are zero.

    Its rank is at most the product of the other modes. The least rank of a tensor cannot be computed in general.
    """
    longest = int(np.argmax(tensor.shape))
    others = [k for k in range(tensor.ndim) if k != longest]
    fibres = np.moveaxis(tensor, longest, 0).reshape(tensor.shape[longest], -1)
    kept = np.flatnonzero(np.any(fibres != 0, axis=0))
    kept = kept if len(kept) else np.zeros(1, np.int64)
    places = np.unravel_index(kept, [tensor.shape[k] for k in others]) if others else ()
    factors: list[Array] = [np.zeros(0)] * tensor.ndim
    factors[longest] = fibres[:, kept]
    for mode, place in zip(others, places, strict=True):
        factors[mode] = np.eye(tensor.shape[mode])[:, place]
    return Components(np.ones(len(kept)), tuple(factors), 0.0)


def fit(tensor: Array, ranks: Ranks, per_rank: int) -> tuple[Components, tuple[str, ...]]:
    """The sum that ranks ask for, where a term has `per_rank` parameters; with notes.

    Two modes are an SVD. For more, given ranks and numbers of parameters go to `als`; an error is met by the smallest
    rank that doubling and halving find, each measured, at last by the exact sum.
    """
    norm = float(np.linalg.norm(tensor))
    most = tensor.size // max(tensor.shape)
    if ranks.parameters is not None:
        if ranks.parameters < per_rank:
            raise NoGainError(f"even with rank 1 there are {per_rank:,} parameters, more than {ranks.parameters:,}")
        ranks = replace(ranks, given=min(ranks.parameters // per_rank, most), parameters=None)
    if norm == 0:
        return Components(np.zeros(1), tuple(np.zeros((n, 1)) for n in tensor.shape), 0.0), ()
    if tensor.ndim == 2:
        return _svd(tensor, ranks)
    if ranks.given is None:
        return (_least(tensor, ranks.error, norm, most) if ranks.error else exact(tensor)), ()
    (wanted,) = ranks.named(["r1"]).values()
    if wanted < most:
        return als(tensor, wanted, norm), ()
    return exact(tensor), ((f"rank {wanted} of r1 is {most}: more is of no use",) if wanted > most else ())


def als(tensor: Array, rank: int, norm: float, iterations: int = 200) -> Components:
    """Alternating least squares by tensorly, from the leading singular vectors; its error is measured.

    A large tensor is first projected on the leading subspaces of its modes, as many vectors as the rank (CANDELINC:
    Carroll, Pruzansky and Kruskal, Psychometrika 45, 1980), so that memory is that of the small one.
    """
    import tensorly
    from tensorly.decomposition import parafac

    small, bases = _compressed(tensor, rank) if tensor.size > COMPRESS else (tensor, None)
    scale = float(np.linalg.norm(small)) or 1.0
    options = {"rank": rank, "n_iter_max": iterations, "tol": 1e-9, "init": (None, _start(small, rank))}
    with tensorly.backend_context("numpy", local_threadsafe=True):  # another library may have set its own
        try:
            weights, factors = parafac(small / scale, **options)
        except np.linalg.LinAlgError:  # columns became parallel: a little ridge keeps the equations solvable
            weights, factors = parafac(small / scale, l2_reg=1e-10, **options)
    whole = [f if bases is None else bases[k] @ f for k, f in enumerate(factors)]
    weights, unit = normalized(np.asarray(weights) * scale, whole)
    error = float(np.linalg.norm(tensor - dense_of(weights, unit))) / norm
    return Components(weights, unit, error)


def _start(tensor: Array, rank: int) -> list[Array]:
    """The leading singular vectors of each mode, filled up with random columns where the mode has fewer."""
    generator = np.random.default_rng(0)
    start = []
    for mode, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, mode, 0).reshape(size, -1)
        vectors = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        start.append(np.hstack([vectors, generator.standard_normal((size, rank - vectors.shape[1]))]))
    return start


def _svd(tensor: Array, ranks: Ranks) -> tuple[Components, tuple[str, ...]]:
    """The best sum of products of two vectors."""
    rows, columns = tensor.shape
    tree = Tree((("n1", "r1"), ("r1", "n2")), (("n1", rows), ("n2", columns)), 1)
    result = decompose(tensor, tree, ranks)
    weights, factors = normalized(np.ones(result.cores[0].shape[1]), (result.cores[0], result.cores[1].T))
    return Components(weights, factors, result.bound), result.notes


def _least(tensor: Array, error: float, norm: float, most: int) -> Components:
    """The sum of the smallest rank found that makes an error of at most so much."""
    low, rank, best = 0, 1, None
    while rank < most:
        found = als(tensor, rank, norm)
        if found.error <= error:
            best = found
            break
        low, rank = rank, 2 * rank
    if best is None:
        best, rank = exact(tensor), most
    while rank - low > 1:
        middle = (low + rank) // 2
        found = als(tensor, middle, norm)
        if found.error <= error:
            best, rank = found, middle
        else:
            low = middle
    return best


def _compressed(tensor: Array, rank: int) -> tuple[Array, list[Array]]:
    """The tensor in the leading subspaces of its modes, and their bases."""
    names = [f"n{k}" for k in range(tensor.ndim)]
    bonds = [f"r{k}" for k in range(tensor.ndim)]
    labels = (*zip(names, bonds, strict=True), tuple(bonds))
    tree = Tree(labels, tuple(zip(names, tensor.shape, strict=True)), len(names))
    *bases, core = decompose(tensor, tree, Ranks(given=rank)).cores
    return core, list(bases)
