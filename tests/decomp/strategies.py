"""What the tests of formats share: the formats, and tensors for each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from tncompile.decomp import CP, SVD, BlockTrain, Hierarchical, Kronecker, MatrixTrain, Ring, Split, TensorTrain, Tucker
from tncompile.decomp.base import Axes
from tncompile.ir import Array

FORMATS: tuple[Any, ...] = (SVD, Split, TensorTrain, MatrixTrain, Tucker, Hierarchical, Ring, BlockTrain, CP, Kronecker)
TREES: tuple[Any, ...] = (SVD, Split, TensorTrain, MatrixTrain, Tucker, Hierarchical, BlockTrain)
ROUNDING = 1e-12
"""The relative error allowed to float64 arithmetic on a few hundred numbers."""


def axes_for(kind: Any) -> st.SearchStrategy[Axes]:
    """Modes of a matrix that the format takes; unequal numbers of them where it can."""
    counts = {BlockTrain: [(2, 2), (3, 3)], Kronecker: [(2, 2)], Ring: [(2, 2), (1, 2), (3, 1)]}
    free = [(1, 1), (2, 2), (3, 2), (1, 3)]
    return st.sampled_from(counts.get(kind, free)).flatmap(
        lambda c: st.tuples(*(st.tuples(*[st.integers(1, 4)] * n) for n in c))
    )


def random(axes: Axes, seed: int) -> Array:
    """A matrix of standard normal numbers."""
    return np.random.default_rng(seed).standard_normal([math.prod(a) for a in axes])


@st.composite
def matrices(draw: DrawFn, kind: Any) -> tuple[Array, Axes]:
    """A matrix and its modes: of full rank, of low rank, or zero."""
    axes = draw(axes_for(kind))
    dense = random(axes, draw(st.integers(0, 99)))
    what = draw(st.sampled_from(["full", "full", "low", "zero"]))
    if what == "low":
        dense = np.outer(dense[:, 0], dense[0])
    return dense * (what != "zero"), axes
