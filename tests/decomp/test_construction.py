"""What construction rests on: modes, permutations, metrics, randomized and blockwise truncation, conversions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decomp.strategies import ROUNDING, random
from tncompile.decomp import (
    CP,
    SVD,
    BlockTrain,
    Hierarchical,
    Kronecker,
    MatrixTrain,
    Metric,
    Permutation,
    Ranks,
    Ring,
    TensorTrain,
    Tucker,
    balanced,
    convert,
    matrix_train,
    modes,
    randomized,
    reorder,
)
from tncompile.decomp.blocks import Blocked
from tncompile.errors import TNCompileError

ANY_SIZE = Ranks(larger=True)


# ------------------------------------------------------------------------------------ modes


@given(size=st.integers(1, 5000), count=st.integers(1, 5))
def test_balanced_modes_multiply_to_the_size(size: int, count: int) -> None:
    found = balanced(size, count)
    assert math.prod(found) == size and len(found) == count and list(found) == sorted(found)


@given(parts=st.lists(st.integers(1, 12), min_size=2, max_size=3))
def test_no_other_modes_have_a_smaller_sum(parts: list[int]) -> None:
    assert sum(balanced(math.prod(parts), len(parts))) <= sum(parts)


def test_modes_of_well_known_sizes() -> None:
    assert balanced(768, 3) == (8, 8, 12)
    assert balanced(3072, 3) == (12, 16, 16)
    assert balanced(13, 2) == (1, 13)
    assert modes.useful_count(768) == 4 and modes.useful_count(13) == 1
    assert modes.paired((4, 4), (2, 3, 2, 3)) == ((4, 2), (1, 3), (4, 2), (1, 3))
    with pytest.raises(TNCompileError, match="0 modes"):
        balanced(4, 0)


# ------------------------------------------------------------------------------------ conversions

AXES = ((3, 4), (2, 5))
SOURCES: list[tuple[Any, Any]] = [
    (SVD, TensorTrain),
    (TensorTrain, Ring),
    (Ring, TensorTrain),
    (MatrixTrain, Kronecker),
    (Kronecker, MatrixTrain),
    (BlockTrain, MatrixTrain),
    (Tucker, Hierarchical),
    (CP, TensorTrain),
    (CP, Ring),
    (CP, Tucker),
    (CP, Hierarchical),
]


@pytest.mark.parametrize(("source", "target"), SOURCES)
@pytest.mark.parametrize("rank", [1, 2])
def test_conversions_are_exact(source: Any, target: Any, rank: int) -> None:
    found = source.from_dense(random(AXES, 1), AXES, Ranks(given=rank, larger=True))
    other = convert(found, target)
    assert type(other) is target and other.bound == found.bound
    assert other.error(found.dense()) <= ROUNDING


@settings(max_examples=20, deadline=None)
@given(counts=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 9))
def test_a_tt_matrix_is_the_train_of_the_rearranged_tensor(counts: tuple[int, int], seed: int) -> None:
    axes = tuple((2, 3, 2)[:n] for n in counts)
    found = MatrixTrain.from_dense(random(axes, seed), axes, ANY_SIZE)
    train = convert(found, TensorTrain)
    back = matrix_train(train, axes)
    assert back.error(found.dense()) <= ROUNDING
    if counts[0] == counts[1]:
        order = [k for pair in zip(range(counts[0]), range(counts[0], 2 * counts[0]), strict=True) for k in pair]
        expected = found.dense().reshape([n for axis in axes for n in axis]).transpose(order).reshape(train.shape)
        np.testing.assert_allclose(train.dense(), expected, atol=1e-12)


def test_no_exact_way_says_which_there_are() -> None:
    found = TensorTrain.from_dense(random(AXES, 2), AXES, Ranks(given=1))
    with pytest.raises(TNCompileError, match="only to Ring"):
        convert(found, CP)


# ------------------------------------------------------------------------------------ metric


def test_a_metric_makes_the_svd_best_for_the_outputs() -> None:
    """Against the closed form: truncation of ``M**0.5 W``, and never worse on the samples than without."""
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((12, 10))
    inputs = generator.standard_normal((500, 12)) * np.logspace(0, -2, 12)
    metric = Metric.of_inputs(inputs, regularization=1e-9)
    plain = SVD.from_dense(weight, ranks=Ranks(given=3))
    aware = SVD.from_dense(weight, ranks=Ranks(given=3), metric=metric)

    def wrong(found: SVD) -> float:
        return float(np.linalg.norm(inputs @ (weight - found.dense())) / np.linalg.norm(inputs @ weight))

    values = np.linalg.svd(inputs @ weight, compute_uv=False)
    best = np.linalg.norm(values[3:]) / np.linalg.norm(values)
    assert wrong(aware) == pytest.approx(best, rel=1e-4)
    assert wrong(aware) < 0.8 * wrong(plain)
    assert aware.error(weight, metric) == pytest.approx(aware.bound, rel=1e-9)


@pytest.mark.parametrize("kind", [SVD, TensorTrain, MatrixTrain, Tucker, Hierarchical])
def test_a_metric_is_undone_exactly(kind: Any) -> None:
    axes = ((3, 4), (2, 5))
    metric = Metric.of_inputs(np.random.default_rng(4).standard_normal((40, 12)), axes[0])
    if kind is SVD:
        metric = Metric.of_inputs(np.random.default_rng(4).standard_normal((5, 12)))  # singular moments
        axes = ((12,), (10,))
    dense = random(axes, 5)
    assert kind.from_dense(dense, axes, ANY_SIZE, metric=metric).error(dense) <= 1e-10
    found = kind.from_dense(dense, axes, Ranks(given=2), metric=metric)
    assert found.error(dense, metric) <= found.bound + ROUNDING
    assert found.ranks == kind.from_dense(dense, axes, Ranks(given=2)).ranks


def test_the_metric_of_independent_modes_is_exact() -> None:
    generator = np.random.default_rng(6)
    parts = [a @ a.T for a in (generator.standard_normal((3, 3)), generator.standard_normal((4, 4)))]
    metric = Metric.of_moments(np.kron(*parts), (3, 4), regularization=1e-12)
    weight = generator.standard_normal((12, 5))
    expected = np.trace(weight.T @ np.kron(*parts) @ weight)
    assert np.sum(metric.weigh(weight) ** 2) == pytest.approx(expected, rel=1e-9)


def test_the_metric_of_many_inputs_is_a_root_of_their_moments() -> None:
    inputs = np.random.default_rng(7).standard_normal((300, 512))  # fewer samples than inputs: singular moments
    moments = inputs.T @ inputs / 300
    metric = Metric.of_moments(moments)
    (scale,), (inverse,) = metric.scales, metric.inverses
    np.testing.assert_allclose(scale.T @ scale, moments + 1e-6 * np.trace(moments) / 512 * np.eye(512), atol=1e-9)
    np.testing.assert_allclose(scale @ inverse, np.eye(512), atol=1e-6)


def test_what_a_metric_cannot_do_is_said() -> None:
    metric = Metric.of_moments(np.eye(12), (3, 4))
    with pytest.raises(TNCompileError, match="several cores"):
        BlockTrain.from_dense(np.ones((12, 10)), AXES, metric=metric)
    with pytest.raises(TNCompileError, match="does not fit"):
        TensorTrain.from_dense(np.ones((12, 10)), ((12,), (10,)), metric=metric)
    with pytest.raises(TNCompileError, match="symmetric"):
        Metric.of_moments(np.triu(np.ones((3, 3))))


# ------------------------------------------------------------------------------------ permutations


def test_correlation_finds_an_order_that_was_lost() -> None:
    """A smooth matrix with shuffled rows and columns: in order again, a TT-matrix of the same ranks is far nearer."""
    generator = np.random.default_rng(7)
    grid = np.linspace(0, 1, 48)
    smooth = np.exp(-8 * np.abs(grid[:, None] - grid[None, :36]))
    shuffled = smooth[generator.permutation(48)][:, generator.permutation(36)]
    axes = ((4, 3, 4), (3, 4, 3))
    plain = MatrixTrain.from_dense(shuffled, axes, Ranks(given=4))
    found, permutation = reorder(shuffled, lambda w: MatrixTrain.from_dense(w, axes, Ranks(given=4)))
    assert found.error(permutation.apply(shuffled)) < 0.2 * plain.error(shuffled)
    np.testing.assert_array_equal(permutation.undo(permutation.apply(shuffled)), shuffled)

    x = generator.standard_normal((5, 48))
    module = found.to_module("float64", bias=np.arange(36), permutation=permutation)
    expected = x @ permutation.undo(found.dense()) + np.arange(36)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12)
    back = module.permutation
    assert back is not None
    np.testing.assert_array_equal(back.rows, permutation.rows)
    np.testing.assert_array_equal(back.columns, permutation.columns)


def test_a_permutation_folds_into_the_layers_around() -> None:
    generator = np.random.default_rng(8)
    before, weight, after = (generator.standard_normal(s) for s in ((5, 6), (6, 7), (7, 4)))
    permutation = Permutation(generator.permutation(6), generator.permutation(7))
    x = generator.standard_normal((3, 5))
    inner = np.maximum(x @ permutation.into_previous(before), 0) @ permutation.apply(weight)
    got = np.maximum(inner, 0) @ permutation.into_next(after)
    np.testing.assert_allclose(got, np.maximum(np.maximum(x @ before, 0) @ weight, 0) @ after, atol=1e-12)


# ------------------------------------------------------------------------------------ randomized, out of core


def decaying(rows: int, columns: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A matrix with singular values 1, 1/2, 1/4, ..."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.standard_normal((n, 12)))[0] for n in (rows, columns))
    return np.asarray((left * 0.5 ** np.arange(12)) @ right.T)


def test_randomized_svd_is_near_the_best_and_knows_its_error() -> None:
    dense = decaying(60, 40, 10)
    found = randomized.svd(randomized.InMemory(dense), 5, oversample=3)
    best = math.sqrt(sum(0.25**k for k in range(5, 12)))
    wrong = float(np.linalg.norm(dense - (found.left * found.values) @ found.right))
    assert best * (1 - 1e-12) <= wrong <= 1.01 * best
    assert wrong <= math.sqrt(found.dropped) <= wrong + 1e-7
    spectral = float(np.linalg.norm(dense - found.left @ (found.left.T @ dense), 2))
    assert spectral <= randomized.spectral_error(randomized.InMemory(dense), found.left) <= 100 * spectral
    enough = randomized.svd_to(randomized.InMemory(dense), 1e-4)
    assert enough.dropped <= 1e-4 and len(enough.values) == 7


@settings(max_examples=20, deadline=None)
@given(lead=st.integers(1, 3), elements=st.integers(1, 200), seed=st.integers(0, 9))
def test_blocks_multiply_as_the_whole(lead: int, elements: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensor = generator.standard_normal((3, 4, 5, 2)).transpose(2, 0, 3, 1)
    matrix = Blocked(tensor, lead, elements)
    whole = tensor.reshape(matrix.shape)
    right, left = (generator.standard_normal((n, 2)) for n in reversed(matrix.shape))
    np.testing.assert_allclose(matrix.times(right), whole @ right, atol=1e-12)
    np.testing.assert_allclose(matrix.transposed_times(left), whole.T @ left, atol=1e-12)
    assert matrix.squared_norm() == pytest.approx(np.sum(whole**2))
    parts = np.zeros(matrix.shape)
    for chosen, block in matrix.columns():
        parts[:, chosen] = block
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("kind", [SVD, TensorTrain, MatrixTrain])
def test_a_tensor_larger_than_memory_is_read_in_blocks(kind: Any, tmp_path: Path, monkeypatch: Any) -> None:
    axes = ((8, 6), (4, 10))
    train = TensorTrain.from_dense(random(axes, 11), axes, Ranks(given=3)).dense()
    dense = train + 0.01 * np.std(train) * random(axes, 12)
    np.save(tmp_path / "w.npy", dense.astype(np.float32))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    for ranks in (Ranks(given=4), Ranks(error=0.2, larger=True)):
        inside = kind.from_dense(mapped, axes, ranks)
        outside = kind.from_dense(mapped, axes, ranks, memory=dense.size * 6)
        assert outside.error(dense) <= outside.bound + 1e-6  # float32 numbers
        assert outside.bound <= (1.1 * inside.bound + 1e-6 if ranks.given else 0.2)
    monkeypatch.setattr("tncompile.decomp.blocks.GRAM_ROWS", 1)  # then the range is found by sampling
    outside = kind.from_dense(mapped, axes, Ranks(given=4), memory=dense.size * 6)
    assert outside.error(dense) <= outside.bound + 1e-6
    if kind is not TensorTrain:
        sized = kind.from_dense(mapped, axes, Ranks(parameters=500), memory=dense.size * 6)
        assert 400 <= sized.parameters <= 500
    else:
        with pytest.raises(TNCompileError, match="larger than memory"):
            kind.from_dense(mapped, axes, Ranks(parameters=500), memory=dense.size * 6)


@pytest.mark.parametrize("kind", [TensorTrain, MatrixTrain, Hierarchical])
@pytest.mark.parametrize("ranks", [Ranks(error=0.1), Ranks(given=4)])
def test_out_of_core_goes_on_where_the_first_mode_cannot_shrink(kind: Any, ranks: Ranks) -> None:
    axes = ((4, 4, 6), (4, 4, 6))
    dense = kind.from_dense(random(axes, 13), axes, Ranks(given=4)).dense()
    dense = dense + 0.02 * np.std(dense) * random(axes, 14)
    found = kind.from_dense(dense, axes, ranks, memory=dense.size * 4)
    assert found.error(dense) <= found.bound + 1e-7 <= 0.1 + 1e-7
    assert [core.ndim for core in found.cores] == [len(names) for names in found.labels]


def test_large_matrices_keep_their_promises(monkeypatch: Any) -> None:
    """The faster ways, by Gram matrices and by sampling, against the same bounds."""
    dense = decaying(80, 70, 12)
    exact = np.sqrt(np.cumsum((0.25 ** np.arange(12))[::-1])[::-1] / np.sum(0.25 ** np.arange(12)))
    for size in (80, 8):
        monkeypatch.setattr("tncompile.decomp.cut.LARGE", size)
        for rank in (1, 4, 8):
            found = SVD.from_dense(dense, ranks=Ranks(given=rank))
            assert found.error(dense) <= found.bound + ROUNDING
            assert found.bound == pytest.approx(exact[rank], rel=1e-2)
        for error in (0.5, 0.1, 1e-3, 1e-6):
            found = SVD.from_dense(dense, ranks=Ranks(error=error))
            assert found.error(dense) <= found.bound + ROUNDING and found.bound <= error
        assert SVD.from_dense(dense).bound <= ROUNDING
        assert len(SVD.from_dense(dense).ranks) == 1 and SVD.from_dense(dense).ranks["r1"] == 12
