from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tensorize.small import imported, mlp, nn
from tncompile.errors import TNCompileError
from tncompile.frontend.importer import TracedModel
from tncompile.tensorizer import arrays
from tncompile.tensorizer.data import collect, load


class Two(nn.Module):
    def forward(self, a: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return a * ids.to(a.dtype)


@pytest.fixture(scope="module")
def one() -> TracedModel:
    return imported(mlp(), torch.randn(4, 48))


@pytest.fixture(scope="module")
def two() -> TracedModel:
    return imported(Two(), torch.randn(4, 3), torch.ones(4, 3, dtype=torch.int64))


@pytest.fixture(scope="module")
def fixed() -> TracedModel:
    return imported(mlp(), torch.randn(4, 48), dynamic_shapes=None)


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 48)).astype(np.float32)


def test_single_array_of_any_name_or_none(one: TracedModel, tmp_path: Path) -> None:
    data = samples(100)
    np.savez(tmp_path / "a.npz", whatever=data)
    np.save(tmp_path / "b.npy", data)
    for found in (load(tmp_path / "a.npz", one), load(tmp_path / "b.npy", one), collect(torch.tensor(data), one)):
        assert found.samples == 100 and len(found) >= 10
        assert np.array_equal(np.concatenate([feeds["input"] for feeds in found]), data)


def test_by_name_in_any_order(two: TracedModel, tmp_path: Path) -> None:
    a, ids = samples(20)[:, :3], np.arange(60).reshape(20, 3)
    np.savez_compressed(tmp_path / "x.npz", ids=ids.astype(np.int32), a=a.astype(np.float64))
    found = load(tmp_path / "x.npz", two)
    assert np.array_equal(np.concatenate([f["ids"] for f in found]), ids)
    assert next(iter(found))["ids"].dtype == np.int64 and next(iter(found))["a"].dtype == np.float32
    for given in ((a, ids), {"ids": ids, "a": a}, [(a[:10], ids[:10]), [a[10:], ids[10:]]]):
        assert np.array_equal(np.concatenate([f["a"] for f in collect(given, two)]), a)


def test_folder_in_order_with_single_samples(one: TracedModel, tmp_path: Path) -> None:
    data = samples(7)
    np.save(tmp_path / "0.npy", data[:5])
    np.savez(tmp_path / "1.npz", input=data[5])
    np.savez(tmp_path / "2.npz", input=data[6:])
    (tmp_path / "notes.txt").write_text("not data")
    found = load(tmp_path, one)
    assert [run.samples for run in found.runs] == [5, 1, 1]
    assert np.array_equal(np.concatenate([f["input"] for f in found]), data)
    assert any("few" in note for note in found.notes)


def test_fixed_batch_is_cut(fixed: TracedModel) -> None:
    found = collect(samples(18), fixed)
    assert [feeds["input"].shape for feeds in found] == [(4, 48)] * 4
    assert found.samples == 16 and any("batch of 4" in note for note in found.notes)
    with pytest.raises(TNCompileError, match="too few samples: the model has a fixed batch of 4"):
        collect(samples(3), fixed)


def test_held_out_and_taken(one: TracedModel) -> None:
    found = collect(samples(200), one)
    chosen, held = found.split()
    assert chosen.samples + held.samples == 200 and 0.1 <= held.samples / 200 <= 0.3
    assert 50 <= found.take(50).samples <= 80
    assert collect(samples(5000), one, most=300).samples <= 332
    single = collect(samples(1), one)
    assert single.split()[1].samples == 1 and "hold any out" in single.split()[1].notes[-1]


@pytest.mark.parametrize("compressed", [False, True])
def test_large_arrays_are_mapped(
    one: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(arrays, "LARGE", 1000)
    data = np.asfortranarray(samples(50))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", x=data)
    (array,) = arrays.read_arrays(tmp_path / "a.npz").values()
    assert not array.flags.owndata and np.array_equal(array, data)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p: np.savez(p, x=np.zeros((5, 47), np.float32)),
            r"input has shape \[5, 47\]; the input's is \[batch, 48\]",
        ),
        (lambda p: np.savez(p, x=np.zeros((5, 48), np.uint8)), "input is uint8; the input is float32"),
        (lambda p: np.savez(p, x=np.zeros((0, 48), np.float32)), "input has no samples"),
        (lambda p: np.savez(p, x=np.full((5, 48), np.nan, np.float32)), "hold NaN"),
        (lambda p: np.savez(p, a=np.zeros(3), b=np.zeros(3)), "has a, b; the inputs are input"),
        (lambda p: np.savez(p), "holds no arrays"),
        (lambda p: np.savez(p, x=np.array([Evil()], dtype=object)), "not arrays that can be read"),
        (lambda p: p.write_bytes(b"PK\3\4 cut off"), "not arrays that can be read"),
        (lambda p: p.write_bytes(pickle.dumps(1)), "not arrays that can be read"),
        (lambda p: None, "cannot be read"),
    ],
)
def test_what_does_not_fit(
    one: TracedModel, tmp_path: Path, write: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.npz"
    write(path)  # type: ignore[operator]
    with pytest.raises(TNCompileError, match=message):
        load(path, one)
    assert "ran" not in capsys.readouterr().out


def test_other_refusals(one: TracedModel, two: TracedModel, tmp_path: Path) -> None:
    with pytest.raises(TNCompileError, match=r"an \.npz, an \.npy or a folder"):
        load(tmp_path / "x.csv", one)
    with pytest.raises(TNCompileError, match="a folder without"):
        load(tmp_path, one)
    with pytest.raises(TNCompileError, match="different numbers of samples: 4 of a, 5 of ids"):
        collect((np.zeros((4, 3), np.float32), np.zeros((5, 3), np.int64)), two)
    with pytest.raises(TNCompileError, match="has 0, 1; the inputs are input"):
        collect([(samples(4), samples(4))], one)
    with pytest.raises(TNCompileError, match="hold no samples"):
        collect([], one)
