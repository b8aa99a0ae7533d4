"""A dense model made smaller within a budget, from the module or the file to the file that runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tncompile.cli import main
from tncompile.errors import OutputError, TNCompileError
from tncompile.runtime.session import Session
from tncompile.tensorizer import measure, prepare, run, ways
from tncompile.tensorizer.run import DENSE, OURS
from tncompile.tensorizer.tensorize import Tensorized

FEW = ("fp32", "int8-weights", "int8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times matter little here."""
    monkeypatch.setattr(measure, "SECONDS", 0.1)
    monkeypatch.setattr(ways, "TIMING", 0.5)
    monkeypatch.setattr(ways, "EACH", 0.02)
    monkeypatch.setattr(prepare, "SENSITIVITY", 2.0)


class Thin(nn.Module):
    """Two layers whose weights are of rank 6 but for one part in a thousand, and one that is not."""

    def __init__(self, rank: int | None = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(96, 128), nn.Linear(128, 96), nn.Linear(96, 10)
        if rank is not None:
            for layer in (self.first, self.second):
                rows, columns = layer.weight.shape
                low = torch.randn(rows, rank) @ torch.randn(rank, columns) / (rank * columns) ** 0.5
                layer.weight.data = low + 1e-3 * torch.randn(rows, columns) / columns**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(hidden)  # type: ignore[no-any-return]


def data(samples: int = 200) -> torch.Tensor:
    return torch.randn(samples, 96, generator=torch.Generator().manual_seed(1))


def error_of(made: Tensorized, module: nn.Module, inputs: torch.Tensor) -> float:
    """Relative, in the Frobenius norm, against the module in float64."""
    (found,) = Session(made.onnx).run({"x": inputs.numpy()}).values()
    with torch.no_grad():
        exact = module.double()(inputs.double()).numpy()
    module.float()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_low_rank_is_found_and_within_the_error() -> None:
    module = Thin().eval()
    made = tncompile.tensorize(module, data(), max_error=0.02, batch=(1, 16))
    ways = {way.name: way for way in made.report.ways}
    assert made.report.chosen == OURS
    assert ways[OURS].size < min(way.size for name, way in ways.items() if name != OURS)
    fresh = torch.randn(300, 96, generator=torch.Generator().manual_seed(2))
    assert error_of(made, module, fresh) < 0.03
    kept = {w.name: w.kept for w in made.report.weights}
    assert "r1=" in kept["first.weight"] and "r1=" in kept["second.weight"]


def test_what_cannot_be_made_smaller_is_left_and_said() -> None:
    module = Thin(rank=None).eval()
    made = tncompile.tensorize(module, data(), max_error=1e-6, bits=("fp32",), batch=(1, 16))
    assert made.report.chosen == DENSE
    assert made.report.verdict.startswith("nothing is better than the dense float32 model")
    assert error_of(made, module, data(20)) < 1e-6


def test_full_rank_weights_become_bits_alone() -> None:
    module = Thin(rank=None).eval()
    made = tncompile.tensorize(module, data(), max_error=0.01, prefer="size", bits=FEW, batch=(1, 16))
    assert error_of(made, module, data(50)) < 0.015
    assert all("r1=" not in w.kept for w in made.report.weights if w.name != "last.weight")
    assert {way.name for way in made.report.ways} >= {DENSE, "int8-weights", "int8"}


def test_a_metric_bounds_the_drop() -> None:
    module = Thin().eval()
    inputs = data(400)
    with torch.no_grad():
        labels = module(inputs).argmax(1)

    def accuracy(run: Callable[..., Any]) -> float:
        return float((run(inputs).argmax(1) == labels).float().mean())

    made = tncompile.tensorize(module, data(), metric=accuracy, max_drop=0.05, bits=FEW, batch=(1, 16))
    chosen = next(way for way in made.report.ways if way.name == made.report.chosen)
    assert chosen.drop is not None and chosen.drop <= 0.05
    (logits,) = Session(made.onnx).run({"x": inputs.numpy()}).values()
    assert (logits.argmax(1) == labels.numpy()).mean() >= 0.95


def test_a_size_gives_the_least_error() -> None:
    module = Thin().eval()
    made = tncompile.tensorize(module, data(), max_size=0.25, bits=FEW, batch=(1, 16))
    chosen = next(way for way in made.report.ways if way.name == made.report.chosen)
    dense = next(way for way in made.report.ways if way.name == DENSE)
    assert len(made.onnx) == chosen.size <= 0.25 * dense.size
    assert error_of(made, module, data(50)) < 0.02
    with pytest.raises(TNCompileError, match="nothing is within the budget"):
        tncompile.tensorize(module, data(), max_size=300, bits=("fp32",), batch=(1, 16))


def test_without_data_errors_are_those_of_weights() -> None:
    module = Thin().eval()
    made = tncompile.tensorize(module, example_inputs=(data(2),), max_error=0.02, batch=(1, 16))
    assert "errors are those of the weights" in made.report.data
    assert "r1=" in next(w.kept for w in made.report.weights if w.name == "first.weight")


def test_without_data_a_tight_error_is_kept_too() -> None:
    module = Thin(rank=None).eval()
    made = tncompile.tensorize(module, example_inputs=(data(2),), max_error=1e-6, bits=("fp32", "int4"), batch=(1, 16))
    assert "fp32" in made.report.chosen  # ours, or what torch's exporter writes
    made = tncompile.tensorize(module, example_inputs=(data(2),), max_size=0.3, bits=FEW, batch=(1, 16))
    chosen = next(way for way in made.report.ways if way.name == made.report.chosen)
    fitting = [w for w in made.report.ways if w.size <= 0.3 * made.report.ways[0].size and w.error is not None]
    assert chosen.error == min(w.error or 0.0 for w in fitting)


def test_what_won_is_what_is_saved(tmp_path: Path) -> None:
    made = tncompile.tensorize(Thin().eval(), data(), max_error=0.02, bits=FEW[1:], batch=(1, 16))
    assert {*made.bits} - {"fp32"}
    with pytest.raises(OutputError, match="a model to train is in float32"):
        made.save(tmp_path / "small.pt2")
    made = tncompile.tensorize(Thin(rank=None).eval(), data(), max_error=1e-6, bits=("fp32",), batch=(1, 16))
    made.save(tmp_path / "dense.pt2")
    assert "first.weight" in torch.export.load(tmp_path / "dense.pt2").state_dict


def test_healing_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search() -> Tensorized:
        healing = run.Healing(3.0, checkpoint=tmp_path / "healing")
        return tncompile.tensorize(
            Thin().eval(), data(), max_error=0.02, bits=("fp32",), batch=(1, 16), healing=healing
        )

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "heal", killed)
        with pytest.raises(KeyboardInterrupt):
            search()
    assert [path.name for path in tmp_path.iterdir()] == ["healing.0.plan"]
    made = search()
    assert f"resumed from {tmp_path / 'healing.0.plan'}" in made.report.notes
    assert any(note.startswith("healed: output error") for note in made.report.notes)
    made.discard()
    assert not [*tmp_path.iterdir()]


def test_what_is_too_large_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LARGEST", 1000)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("works"))
    with pytest.raises(TNCompileError, match="cannot be tensorized yet"):
        tncompile.tensorize(Thin().eval(), data(), max_error=0.1)


def test_wrong_data_and_names_are_told() -> None:
    module = Thin().eval()
    with pytest.raises(TNCompileError, match="no calibration data"):
        tncompile.tensorize(module, iter([]), max_error=0.1)
    with pytest.raises(TNCompileError, match="example_inputs"):
        tncompile.tensorize(module, "data.npz", max_error=0.1)
    with pytest.raises(TNCompileError, match="int3"):
        tncompile.tensorize(module, data(), max_error=0.1, bits=("int3",))


def test_a_loader_is_not_robbed_of_its_first_batch() -> None:
    batches = (batch for batch in torch.split(data(96), 32))
    made = tncompile.tensorize(Thin().eval(), batches, max_error=0.05, bits=("fp32",), batch=(1, 16))
    assert "64 samples; errors are on 32 others" in made.report.data


def test_a_model_to_train_further(tmp_path: Path) -> None:
    module = Thin().eval()
    made = tncompile.tensorize(module, data(), max_error=0.02, bits=("fp32",), batch=(1, 16))
    made.save(tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    names = {*loaded.state_dict}
    assert {"first.weight.core_0", "first.weight.core_1", "last.bias"} <= names and "first.weight" not in names
    compiled = tncompile.compile_file(tmp_path / "small.pt2", batch=(1, 16))
    assert compiled.report.check is not None and compiled.report.check.passed
    trainable = tncompile.to_torch(loaded)
    optimizer = torch.optim.SGD(trainable.parameters(), 1e-2)
    before = trainable(data(64)).square().mean()
    before.backward()
    optimizer.step()
    assert trainable(data(64)).square().mean() < before
    with pytest.raises(OutputError, match=r"\.onnx"):
        made.save(tmp_path / "small.txt")


def test_from_file_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Thin().eval()
    tncompile.save(module, (data(4),), tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=data().numpy())
    command = [str(tmp_path / "model.pt2"), "-o", str(tmp_path / "small.onnx"), "--max-error", "0.02"]
    command += ["--calibrate", str(tmp_path / "data.npz"), "--batch", "1,16", "--report", str(tmp_path / "r.json")]
    assert main(["tensorize", *command, "--bits", ",".join(FEW)]) == 0
    told = capsys.readouterr().out
    assert "tensorized" in told and "dense, fp32" in told and f"wrote {tmp_path / 'small.onnx'}" in told
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["chosen"] == OURS
    onnx.checker.check_model(str(tmp_path / "small.onnx"))
    assert main([*command, "--bits", "fp32", "-q"]) == 0  # the same by the compile command


def test_an_onnx_model_is_taken(tmp_path: Path) -> None:
    module = Thin().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.onnx.export(module, (data(4),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", data().numpy())
    command = ["tensorize", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "small.onnx"), "--max-error", "0.02"]
    assert main([*command, "--calibrate", str(tmp_path / "data.npy"), "--batch", "1,16", "-q", "--bits", "fp32"]) == 0
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * (tmp_path / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "name a budget"),
        (("--max-error", "-1"), 2, "give a number above 0"),
        (("--max-size", "12XB"), 2, "give a size"),
        (("--max-error", "0.1", "--bits", "int3"), 2, "no int3"),
        (("--max-drop", "0.1"), 2, "name a budget"),
        (("--metric", "nowhere:accuracy"), 1, "no module nowhere"),
        (("--max-error", "0.1", "--calibrate", "missing.npz"), 1, "missing.npz: no such file or folder"),
        (("--max-error", "0.1", "-o", "out.txt"), 1, "ends in .onnx"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.pt2"
    tncompile.save(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), model)
    command = ["tensorize", str(model), "-o", str(tmp_path / "out.onnx"), *arguments]
    try:
        found = main(command)
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_nothing_large_enough_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tncompile.save(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), tmp_path / "model.pt2")
    command = ["tensorize", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "out.onnx"), "--max-error", "0.1"]
    assert main(command) == 1
    assert "no weights of 1,024 numbers or more" in capsys.readouterr().err
