"""Every format: exact at full rank, within its bound when truncated, to PyTorch and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.decomp.strategies import FORMATS, ROUNDING, TREES, axes_for, matrices, random
from tncompile.decomp import BlockTrain, MatrixTrain, NoGainError, Ranks, TensorTrain, Tucker, inflate, truncate
from tncompile.errors import TNCompileError
from tncompile.ir import Program, Value, evaluate, verify

ANY_SIZE = Ranks(larger=True)
few = settings(max_examples=8, deadline=None)


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data())
def test_exact_at_full_rank(kind: Any, data: st.DataObject) -> None:
    dense, axes = data.draw(matrices(kind))
    found = kind.from_dense(dense, axes, ANY_SIZE)
    np.testing.assert_allclose(found.dense(), dense, rtol=0, atol=ROUNDING * max(1.0, np.linalg.norm(dense)))
    assert found.bound <= ROUNDING
    assert found.shape == dense.shape


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data(), rank=st.integers(1, 3))
def test_the_error_at_given_ranks_is_within_the_bound(kind: Any, data: st.DataObject, rank: int) -> None:
    dense, axes = data.draw(matrices(kind))
    found = kind.from_dense(dense, axes, Ranks(given=rank, larger=True))
    assert found.error(dense) <= found.bound + ROUNDING
    assert all(size <= rank for size in found.ranks.values())


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data(), error=st.floats(0.01, 0.9))
def test_the_error_is_at_most_what_is_asked(kind: Any, data: st.DataObject, error: float) -> None:
    dense, axes = data.draw(matrices(kind))
    found = kind.from_dense(dense, axes, Ranks(error=error, larger=True))
    assert found.error(dense) <= found.bound + ROUNDING <= error + 2 * ROUNDING
    # and never larger than the exact one
    assert found.parameters <= kind.from_dense(dense, axes, ANY_SIZE).parameters


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data(), share=st.floats(0.05, 0.95))
def test_never_more_parameters_than_asked_nor_than_dense(kind: Any, data: st.DataObject, share: float) -> None:
    dense, axes = data.draw(matrices(kind))
    limit = max(1, int(share * dense.size))
    try:
        found = kind.from_dense(dense, axes, Ranks(parameters=limit))
    except NoGainError:
        with pytest.raises(NoGainError):  # then not even rank 1 fits
            found = kind.from_dense(dense, axes, Ranks(given=1, larger=True))
            Ranks().require_gain("", found.parameters, min(limit + 1, dense.size))
        return
    assert found.parameters <= limit < dense.size
    assert found.error(dense) <= found.bound + ROUNDING


@pytest.mark.parametrize("kind", TREES)
@few
@given(data=st.data(), rank=st.integers(1, 3))
def test_truncation_is_quasi_optimal(kind: Any, data: st.DataObject, rank: int) -> None:
    """Near a network of these ranks, the error is at most the root of the number of bonds times the distance to it."""
    axes = data.draw(axes_for(kind))
    network = kind.from_dense(random(axes, 1), axes, Ranks(given=rank, larger=True))
    noise = 0.1 * random(axes, 2)
    dense = network.dense() + noise
    found = kind.from_dense(dense, axes, Ranks(given=tuple(network.ranks.values()), larger=True))
    distance = np.linalg.norm(noise) / np.linalg.norm(dense)
    assert found.error(dense) <= np.sqrt(len(network.bonds)) * distance + ROUNDING


@pytest.mark.parametrize("kind", TREES)
@few
@given(data=st.data())
def test_canonical_form_is_an_isometry_around_the_center(kind: Any, data: st.DataObject) -> None:
    axes = data.draw(axes_for(kind))
    found = kind.from_dense(random(axes, 3), axes, Ranks(given=2, larger=True))
    center = data.draw(st.integers(-len(found.cores), len(found.cores) - 1))
    form = found.canonical(center)
    assert form.error(found.dense()) <= ROUNDING
    # so the norm of the tensor is that of the center
    assert np.linalg.norm(form.cores[center]) == pytest.approx(np.linalg.norm(found.dense()), rel=1e-12)
    for edge in form.tree(center).edges:
        core, names = form.cores[edge.child], form.labels[edge.child]
        count = len(edge.batch) + 1
        rows = np.moveaxis(core, [names.index(n) for n in (*edge.batch, edge.bond)], range(count))
        flat = rows.reshape(-1, form.ranks[edge.bond], int(np.prod(rows.shape[count:])))
        gram = flat @ flat.transpose(0, 2, 1)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=ROUNDING)


@pytest.mark.parametrize("kind", [k for k in TREES if k is not BlockTrain])
@few
@given(data=st.data())
def test_spectra_are_the_singular_values_of_the_unfoldings(kind: Any, data: st.DataObject) -> None:
    axes = data.draw(axes_for(kind))
    dense = random(axes, 4)
    found = kind.from_dense(dense, axes, ANY_SIZE)
    modes = dense.reshape(list(found.modes.values()))
    names = list(found.modes)
    for edge in found.tree().edges:
        inside = [names.index(n) for n in names if n in edge.below]
        others = [k for k in range(len(names)) if k not in inside]
        unfolded = modes.transpose(inside + others).reshape(int(np.prod([modes.shape[k] for k in inside])), -1)
        expected = np.linalg.svd(unfolded, compute_uv=False)
        values = found.spectra()[edge.bond]
        np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-10, atol=1e-12)
        assert np.all(expected[len(values) :] < 1e-12 * expected[0])


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data(), seed=st.integers(0, 9))
def test_to_pytorch_and_back(kind: Any, data: st.DataObject, seed: int) -> None:
    axes = data.draw(axes_for(kind))
    found = kind.from_dense(random(axes, seed), axes, Ranks(given=2, larger=True))
    module = found.to_module("float64", bias=np.arange(found.shape[1]))
    assert [n for n, _ in module.named_parameters() if n != "bias"] == list(found.core_names)
    back = module.factorized()
    assert type(back) is kind and back.axes == found.axes
    for ours, theirs in zip(found.cores, back.cores, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    x = np.random.default_rng(seed).standard_normal((2, 3, found.shape[0]))
    y = module(torch.from_numpy(x)).detach().numpy()
    expected = x @ found.dense() + np.arange(found.shape[1])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11 * (1 + np.abs(expected).max()))
    other = kind.from_dense(random(axes, seed + 1), axes, Ranks(given=tuple(found.ranks.values()), larger=True))
    assume(other.ranks == found.ranks)
    module.load_state_dict(other.to_module("float64", bias=np.zeros(found.shape[1])).state_dict())
    np.testing.assert_array_equal(module.factorized().dense(), other.dense())


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data())
def test_the_network_computes_the_layer(kind: Any, data: st.DataObject) -> None:
    axes = data.draw(axes_for(kind))
    found = kind.from_dense(random(axes, 5), axes, Ranks(given=2, larger=True))
    x = np.random.default_rng(6).standard_normal((3, found.shape[0]))
    network = found.network("fc", "float64")
    verify(Program((Value("x", "float64", ("batch", found.shape[0])),), (network,), (("y", "y"),)))
    value = evaluate(network, {"x": x})
    np.testing.assert_allclose(value, x @ found.dense(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", FORMATS)
@few
@given(data=st.data(), error=st.floats(0.05, 0.6))
def test_bonds_grow_without_change_and_shrink_to_an_error(kind: Any, data: st.DataObject, error: float) -> None:
    axes = data.draw(axes_for(kind))
    dense = random(axes, 7)
    found = kind.from_dense(dense, axes, Ranks(given=2, larger=True))
    assume(found.bonds)
    bond = data.draw(st.sampled_from(found.bonds))
    larger = inflate(found, bond, found.ranks[bond] + 2)
    assert larger.ranks == {**found.ranks, bond: found.ranks[bond] + 2}
    np.testing.assert_allclose(larger.dense(), found.dense(), rtol=0, atol=1e-13)
    smaller = truncate(larger, Ranks(error=error))
    assert smaller.parameters <= larger.parameters
    assert smaller.error(found.dense()) <= error + ROUNDING
    assert smaller.error(dense) <= smaller.bound + ROUNDING


@pytest.mark.parametrize("kind", TREES)
def test_what_was_inflated_shrinks_back_without_error(kind: Any) -> None:
    axes = ((4, 3), (3, 4))
    found = kind.from_dense(random(axes, 8), axes, Ranks(given=2, larger=True))
    larger = inflate(found, found.bonds[0], 9)
    back = truncate(larger, Ranks())
    assert back.parameters <= found.parameters
    assert back.error(found.dense()) <= ROUNDING


def test_inflated_modules_compute_the_same_and_can_be_trained() -> None:
    axes = ((4, 3), (3, 4))
    module = TensorTrain.from_dense(random(axes, 9), axes, Ranks(given=2)).to_module("float64", bias=np.ones(12))
    larger = inflate(module, "r2", 5)
    x = torch.from_numpy(random(axes, 10))
    torch.testing.assert_close(larger(x), module(x), rtol=0, atol=1e-13)
    larger(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in larger.parameters())
    smaller = truncate(larger, Ranks(given=2))
    torch.testing.assert_close(smaller(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_tensor_gives_the_same_cores(kind: Any) -> None:
    axes = ((4, 6), (6, 4))
    dense = random(axes, 16)
    for ranks in (Ranks(given=4, larger=True), Ranks(error=0.7), Ranks(parameters=400)):
        first, second = (kind.from_dense(dense, axes, ranks) for _ in range(2))
        assert [c.tobytes() for c in first.cores] == [c.tobytes() for c in second.cores]


def test_modes_are_balanced_where_none_are_named() -> None:
    dense = random(((24,), (36,)), 15)
    assert MatrixTrain.from_dense(dense, ranks=Ranks(given=2)).axes == ((4, 6), (6, 6))
    assert BlockTrain.from_dense(dense, ranks=Ranks(given=1)).axes == ((4, 6), (6, 6))


def test_ranks_above_the_useful_one_are_clamped_and_said() -> None:
    axes = ((2, 2), (2, 2))
    found = TensorTrain.from_dense(random(axes, 11), axes, Ranks(given=100, larger=True))
    assert found.ranks == {"r1": 2, "r2": 4, "r3": 2}
    assert any("rank 100 of r2 is 4" in note for note in found.notes)
    low = MatrixTrain.from_dense(np.ones((4, 4)), axes, Ranks(given=3))
    assert low.ranks == {"r1": 1} and low.parameters == 8
    assert any("rank 3 of r1 is 1" in note for note in low.notes)


def test_no_result_has_as_many_parameters_as_dense() -> None:
    axes = ((2, 4), (4, 2))
    for ranks in (Ranks(), Ranks(given=8), Ranks(error=0.01)):
        with pytest.raises(NoGainError, match="no gain"):
            TensorTrain.from_dense(random(axes, 12), axes, ranks)
    with pytest.raises(NoGainError, match="rank 1"):
        TensorTrain.from_dense(random(axes, 12), axes, Ranks(parameters=5))


def test_monarch_is_the_best_rank_one_of_each_block() -> None:
    """The projection of Dao et al. 2022: one singular triple for each pair of the shared modes."""
    rng = np.random.default_rng(13)
    left, right = rng.standard_normal((3, 4, 5)), rng.standard_normal((4, 5, 6))  # [i1, i2, o1], [i2, o1, o2]
    exact = np.einsum("abc,bcd->abcd", left, right).reshape(12, 30)
    found = BlockTrain.from_dense(exact, ((3, 4), (5, 6)), Ranks(given=1))
    assert found.parameters == 60 + 120
    assert found.error(exact) <= ROUNDING
    blocks = rng.standard_normal((3, 4, 5, 6))
    squares = np.linalg.svd(blocks.transpose(1, 2, 0, 3), compute_uv=False)[..., 1:]
    projected = BlockTrain.from_dense(blocks.reshape(12, 30), ((3, 4), (5, 6)), Ranks(given=1))
    assert projected.bound == pytest.approx(np.linalg.norm(squares) / np.linalg.norm(blocks), rel=1e-12)
    assert projected.error(blocks.reshape(12, 30)) == pytest.approx(projected.bound, rel=1e-12)


def test_tucker_2_keeps_the_window_and_hooi_lowers_the_error() -> None:
    kernel = np.random.default_rng(14).standard_normal((8, 6, 3, 3))
    found = Tucker.from_dense(kernel, ranks=Ranks(given=(4, 3)), factored=(0, 1))
    assert [c.shape for c in found.cores] == [(8, 4), (6, 3), (4, 3, 3, 3)]
    better = Tucker.from_dense(kernel, ranks=Ranks(given=(4, 3)), factored=(0, 1), iterations=30)
    assert better.error(kernel) <= found.error(kernel)
    assert better.error(kernel) <= better.bound + ROUNDING
    module = found.to_module("float64")
    np.testing.assert_allclose(module().detach().numpy(), found.dense(), atol=1e-13)
    assert module.factorized().dense().shape == kernel.shape


def test_mistakes_say_what_is_wrong() -> None:
    dense = np.ones((4, 6))
    with pytest.raises(TNCompileError, match="shape"):
        TensorTrain.from_dense(dense, ((2, 2), (5,)))
    with pytest.raises(TNCompileError, match="finite"):
        TensorTrain.from_dense(dense * np.nan, ((2, 2), (2, 3)))
    with pytest.raises(TNCompileError, match="2 ranks for 3 bonds"):
        TensorTrain.from_dense(dense, ((2, 2), (2, 3)), Ranks(given=(1, 2)))
    with pytest.raises(TNCompileError, match="name one"):
        Ranks(given=2, error=0.1)
    with pytest.raises(TNCompileError, match="as many modes"):
        BlockTrain.from_dense(dense, ((2, 2), (6,)))
    with pytest.raises(TNCompileError, match="no bond r9"):
        inflate(TensorTrain.from_dense(dense, ((2, 2), (2, 3)), Ranks(given=1)), "r9", 4)
    with pytest.raises(TNCompileError, match="disagree"):
        MatrixTrain((np.ones((1, 2, 2, 2)), np.ones((3, 2, 3, 1))), ((2, 2), (2, 3)))
