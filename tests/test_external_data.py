"""Weights in a file of their own, weights mapped from the archive, and what a compile may take of memory for them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import tncompile
from tncompile.cli import main
from tncompile.emit import onnxfile
from tncompile.errors import LoadError, OutputError, TNCompileError
from tncompile.frontend.files.exported import load_exported
from tncompile.frontend.mapped import release_pages
from tncompile.runtime import stored
from tncompile.runtime.files import write_files
from tncompile.runtime.traced import run_traced

WIDTH = 512  # its weights are large enough to be written lazily


class Tied(nn.Module):
    """An embedding whose table is the last layer too, a buffer, and a dense layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(700, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 700, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("every_second", torch.randn(2 * WIDTH)[::2])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[batch, 5] -> [batch, 5, 700]``."""
        x = self.embedding(tokens) + self.shift
        return self.head(torch.relu(self.inner(x) * self.every_second))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    tokens = torch.randint(0, 700, (2, 5))
    program = torch.export.export(Tied().eval(), (tokens,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def apart(saved: Path) -> tncompile.CompiledModel:
    return tncompile.compile_file(saved, external_data=True)


def answer(path: Path, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {"tokens": tokens})[0]
    return result


def test_both_files_run_in_stock_onnxruntime_from_anywhere(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    alone, apart = folder / "alone.onnx", folder / "apart.onnx"
    assert main([str(saved), "-o", str(alone), "-q"]) == 0
    assert main([str(saved), "-o", str(apart), "--external-data"]) == 0
    assert "wrote" in (said := capsys.readouterr().out) and "its weights, apart.onnx.data" in said.replace("\n", " ")
    assert sorted(p.name for p in folder.iterdir()) == ["alone.onnx", "apart.onnx", "apart.onnx.data"]
    weights = 4 * (700 * WIDTH + WIDTH * WIDTH)  # the tied table once
    assert apart.stat().st_size < 60_000
    assert weights <= (folder / "apart.onnx.data").stat().st_size < weights + 30_000
    onnx.checker.check_model(str(apart), full_check=True)
    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 700, (3, 5))
    np.testing.assert_array_equal(answer(apart, tokens), answer(alone, tokens))
    with torch.no_grad():
        expected = Tied().eval().double()(torch.from_numpy(tokens)).numpy()
    assert np.abs(answer(apart, tokens) - expected).max() < 5e-6 * np.abs(expected).max()


def test_other_commands_take_both_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert main([str(saved), "-o", str(out), "--external-data", "-q", "--report", str(tmp_path / "r.json")]) == 0
    size = out.stat().st_size + stored.data_path(out).stat().st_size
    assert abs(json.loads((tmp_path / "r.json").read_text())["size"] - size) < 100  # the data file's name
    assert main(["verify", str(saved), str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["inspect", str(out), "--format", "optimized"]) == 0
    capsys.readouterr()
    data = stored.data_path(out)
    changed = bytearray(data.read_bytes())
    changed[-40_000:] = bytes(40_000)
    data.write_bytes(changed)
    assert main(["verify", str(saved), str(out)]) == 1
    data.unlink()
    capsys.readouterr()
    assert main(["verify", str(saved), str(out)]) == 1
    assert "ONNX Runtime cannot load it" in capsys.readouterr().err


def test_the_same_bytes_each_time_and_a_new_name(saved: Path, apart: tncompile.CompiledModel, tmp_path: Path) -> None:
    first = tncompile.compile_file(saved, external_data=True, check=False)
    first.save(tmp_path / "a.onnx")
    apart.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()
    assert (tmp_path / "a.onnx").read_bytes().replace(b"a.onnx.data", b"b.onnx.data") == (
        tmp_path / "b.onnx"
    ).read_bytes()
    tokens = torch.randint(0, 700, (2, 5))
    np.testing.assert_array_equal(apart.run(tokens), answer(tmp_path / "b.onnx", tokens.numpy()))
    with pytest.raises(TNCompileError, match="in a file of their own"):
        _ = first.onnx
    folder = stored.data_path(Path(first.stored.source)).parent  # type: ignore[arg-type]
    assert folder.is_dir()
    del first
    assert not folder.exists()


def test_weights_go_apart_where_one_file_cannot_hold_them(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxfile, "EXTERNAL_FROM", 1_000_000)
    out = tmp_path / "out.onnx"
    assert main([str(saved), "-o", str(out), "-q"]) == 0
    assert stored.data_path(out).is_file()
    monkeypatch.undo()
    assert main([str(saved), "-o", str(out), "-q"]) == 0  # a later file needs none: that of the old one goes
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_folded_layers_stay_their_cores_in_a_data_file(tmp_path: Path) -> None:
    class Train(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(16, 32, 24) / 20), nn.Parameter(torch.randn(24, 32, 16) / 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("zab,acr,rbd->zcd", x.reshape(-1, 16, 32), self.a, self.b).reshape(-1, WIDTH)

    x = torch.randn(4, WIDTH)
    model = Train().eval()
    sizes = {}
    for store in ("cores", "folded"):
        compiled = tncompile.compile(model, (x,), batch=256, passes=_dense(), store=store, external_data=True)
        compiled.save(tmp_path / f"{store}.onnx")
        sizes[store] = stored.data_path(tmp_path / f"{store}.onnx").stat().st_size
        assert compiled.report.storage is not None
        assert compiled.report.size == getattr(compiled.report.storage, f"{store}_bytes")
    assert sizes["cores"] < sizes["folded"] / 8
    assert sizes["folded"] == WIDTH * WIDTH * 4


def _dense() -> Any:
    from tncompile.passes import parse_passes

    return parse_passes("clean,fold,clean,dense,order")


# ------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("fails", ["out.onnx.data", "out.onnx"])
@pytest.mark.parametrize("old", [False, True])
def test_both_files_or_none(
    apart: tncompile.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, old: bool
) -> None:
    out = tmp_path / "out.onnx"
    if old:
        out.write_bytes(b"old model")
        stored.data_path(out).write_bytes(b"old data")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == fails and not str(source).endswith(".before"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        apart.save(out)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    apart.save(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    assert answer(out, np.zeros((1, 5), np.int64)).shape == (1, 5, 700)


def test_files_that_fail_while_they_are_written(tmp_path: Path) -> None:
    def broken(file: Any) -> None:
        file.write(b"half")
        raise OSError(5, "Input/output error")

    with pytest.raises(OutputError, match="second: cannot be written"):
        write_files({tmp_path / "first": b"whole", tmp_path / "second": broken})
    assert list(tmp_path.iterdir()) == []


def test_a_copy_where_no_link_can_be_made(
    apart: tncompile.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    apart.save(tmp_path / "out.onnx")
    apart.save(tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]


# ------------------------------------------------------------------------ mapped weights


def rewritten(path: Path, to: Path, compression: int) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return to


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_weights_are_those_that_torch_reads(saved: Path, tmp_path: Path, compression: int) -> None:
    ours = load_exported(rewritten(saved, tmp_path / "again.pt", compression))
    theirs = torch.export.load(io.BytesIO(saved.read_bytes()))
    release_pages()
    assert ours.state_dict.keys() == theirs.state_dict.keys()
    for name, weight in theirs.state_dict.items():
        mine = ours.state_dict[name]
        assert type(mine) is type(weight) and mine.stride() == weight.stride()
        assert torch.equal(mine, weight) and mine.requires_grad == weight.requires_grad
    tied = [ours.state_dict[n] for n in ("embedding.weight", "head.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_a_weight_that_was_damaged_or_that_reaches_beyond_its_bytes(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data[info.header_offset + info.file_size // 2] ^= 1
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(data)
    with pytest.raises(LoadError, match="checksum"):
        load_exported(damaged)
    beyond = tmp_path / "beyond.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(beyond, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("weights/model_weights_config.json"):
                config = json.loads(content)
                config["config"]["inner.weight"]["tensor_meta"]["sizes"][0]["as_int"] += 1
                content = json.dumps(config).encode()
            new.writestr(name, content)
    with pytest.raises(LoadError, match="cannot read this exported program"):
        load_exported(beyond)


def test_the_reference_widens_a_weight_only_where_it_is_used(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is not made float64 for a few of its rows, only for the layer that it is too."""
    from tncompile.compiler import import_file

    traced = import_file(saved)
    widened = []
    to = torch.Tensor.to

    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        widened.append(tuple(self.shape))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    tokens = np.arange(5).reshape(1, 5)
    (result,) = run_traced(traced, {"tokens": tokens}, torch.float64)
    assert result.dtype == np.float64
    assert widened.count((700, WIDTH)) == 1
