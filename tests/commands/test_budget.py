"""The options of a budget: what does not go together is said before any work is done."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import tncompile
from tncompile.cli import main
from tncompile.commands import compile, tensorize
from tncompile.commands.budget import BITS, budget_of, is_asked, size
from tncompile.decomp import Factorized
from tncompile.errors import OutputError, first_line
from tncompile.runtime import quantize
from tncompile.tensorizer import families, ladders
from tncompile.tensorizer.budget import FORMATS, kind_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both kinds of file, and calibration data."""
    found = tmp_path_factory.mktemp("models")
    tncompile.save(nn.Linear(40, 40).eval(), (torch.randn(2, 40),), found / "model.pt2")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), found / "model.onnx")
    np.savez(found / "data.npz", input=np.zeros((4, 40), np.float32))
    return found


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""

    def fail(*arguments: object, **options: object) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr("tncompile.tensorizer.tensorize.load", fail)
    monkeypatch.setattr("tncompile.compiler.compile_file", fail)


def told(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that ends with 1 says."""
    made = [a.replace("DATA", str(folder / "data.npz")).replace("OUT", str(folder / "out")) for a in arguments]
    command = [str(folder / a) if a.startswith("model.") else a for a in made]
    assert main(command) == 1
    assert not [*folder.glob("out*")]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(("--prefer", "size"), ("--prefer", "both"), ("--formats", "svd"), ("--bits", "int8"), ("--end-to-end",)),
        *(("--calibrate", "DATA"), ("--heal", "5"), ("--checkpoint", "OUT.kept"), ("--max-drop", "0.1")),
    ],
)
def test_compiling_takes_no_option_of_a_budget_alone(
    option: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tensorizing needs a budget" in told(folder, capsys, "model.pt2", "-o", "OUT.onnx", *option)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        (("--tune",), "--tune does not go with a budget: the search measures"),
        (("--tune", "5"), "--tune does not go with a budget"),
        (("--store", "folded"), "--store does not go with a budget"),
        (("--external-data",), "--external-data does not go with a budget"),
        (("--device", "cuda"), "leave --device out"),
    ],
)
def test_compiling_options_that_a_search_decides_itself(
    option: tuple[str, ...], answer: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in told(folder, capsys, "model.pt2", "-o", "OUT.onnx", "--max-error", "0.1", *option)


HEAL = ("--heal", "5", "--calibrate", "DATA")


@pytest.mark.parametrize("command", [("tensorize",), ()])
@pytest.mark.parametrize(
    ("model", "output", "options", "answer"),
    [
        ("model.pt2", "OUT.txt", (), "name a file that ends in .onnx, or in .pt2"),
        ("model.pt2", "OUT", (), "name a file that ends in .onnx, or in .pt2"),
        ("model.onnx", "OUT.pt2", (), "came in as ONNX, and so it can only be written as .onnx"),
        ("model.none", "OUT.onnx", (), "no such file"),
        ("model.pt2", "OUT.onnx", ("--end-to-end",), "--end-to-end is about healing"),
        ("model.pt2", "OUT.onnx", ("--checkpoint", "OUT.kept"), "--checkpoint is about healing"),
        ("model.pt2", "OUT.onnx", ("--heal", "5"), "name them with --calibrate"),
        ("model.pt2", "OUT.onnx", ("--heal", "5", "--calibrate", "no.npz"), "no.npz: no such file or folder"),
        ("model.onnx", "OUT.onnx", HEAL, "an ONNX model cannot be trained"),
        ("model.pt2", "OUT.pt2", ("--bits", "fp32,int8"), "keeps float32"),
    ],
)
def test_what_does_not_go_together(
    command: tuple[str, ...],
    model: str,
    output: str,
    options: tuple[str, ...],
    answer: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert answer in told(folder, capsys, *command, model, "-o", output, "--max-error", "0.1", *options)


def test_what_goes_together_is_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def search(*arguments: object, **options: Any) -> None:
        asked.append({**options, "budget": arguments[2]})
        raise Stop

    monkeypatch.setattr("tncompile.tensorizer.tensorize.tensorize_file", search)
    more = ["--max-error", "0.1", "--calibrate", str(folder / "data.npz")]
    healing = ["--heal", "5", "--end-to-end", "--checkpoint", str(folder / "kept")]
    model = str(folder / "model.pt2")
    for command in (
        ["tensorize", model, "-o", str(folder / "out.onnx"), *more],
        [model, "-o", str(folder / "out.onnx"), *more, "--bits", "int8,fp32", "--formats", "cp", "--prefer", "size"],
        ["tensorize", model, "-o", str(folder / "out.pt2"), *more, *healing, "--bits", "fp32"],
    ):
        with pytest.raises(Stop):
            main([*command, "-q"])
    first, second, third = asked
    assert (first["formats"], first["bits"], first["budget"].prefer) == (tuple(FORMATS), BITS, "both")
    assert (second["formats"], second["bits"], second["budget"].prefer) == (("cp",), ("int8", "fp32"), "size")
    assert {"store", "tune"}.isdisjoint(second)
    assert third["bits"] == ("fp32",)
    kept = third["healing"]
    assert (kept.seconds, kept.end_to_end, kept.checkpoint) == (5.0, True, folder / "kept")


def options_of(*arguments: str) -> argparse.Namespace:
    return compile.parser().parse_args(["model", "-o", "out.onnx", *arguments])


def test_a_plain_compile_asks_for_no_budget() -> None:
    assert not is_asked(options_of("--tune", "--store", "cores", "--batch", "4"))
    assert is_asked(options_of("--max-size", "5MB"))
    assert budget_of(options_of("--max-size", "5MB")).max_size == 5e6


def test_names_are_those_of_the_library() -> None:
    assert sorted(BITS) == sorted(quantize.BITS)
    made = {
        kind.KIND
        for kind in (*vars(families).values(), *vars(ladders).values())
        if isinstance(kind, type) and issubclass(kind, Factorized) and hasattr(kind, "KIND")
    }
    assert {kind for kinds in FORMATS.values() for kind in kinds} == made
    for parser in (compile.parser(), tensorize.parser()):
        assert all(name in parser.format_help() for name in (*FORMATS, *BITS))


@pytest.mark.parametrize(("text", "value"), [("5MB", 5e6), ("25%", 0.25), ("1.5 kB", 1500.0), ("300", 300.0)])
def test_sizes(text: str, value: float) -> None:
    assert size(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "0", "100%", "12XB", "MB", "-5MB", "0.5", "infMB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_kinds_of_files() -> None:
    assert [kind_of(name) for name in ("a.onnx", Path("b.pt"), "c.onnx.pt2")] == ["onnx", "pt", "pt"]
    for name in ("a", "a.txt", "onnx"):
        with pytest.raises(OutputError, match=name):
            kind_of(name)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n  three \n"), "three"),
        (ValueError(""), "ValueError"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError("\n"), "MemoryError"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
