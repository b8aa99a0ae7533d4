"""What the command line says to words that it does not take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import tncompile
from tests.tensorize.small import imported
from tncompile.cli import main
from tncompile.errors import CheckError
from tncompile.tensorizer.data import load


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max-memory", "5XB"], "'5XB': give a size of at least a byte in B, kB, MB, GB or TB"),
        (["--max-memory", "0"], "like 500MB"),
        (["--batch", "0"], "'0': give sizes of at least 1, with commas between them, like 1,32"),
        (["--batch", "1,x"], "'1,x': give sizes"),
        (["--max-error", "5%"], "'5%': give a number above 0, like 0.05 for 5%"),
        (["--max-error", "nan"], "give a number above 0, like 0.01"),
        (["--max-size", "130%"], "give a share below 100%, or a size like 5MB"),
        (["--max-size", "x%"], "give a number above 0"),
    ],
)
def test_a_wrong_value_says_what_is_taken(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["model.pt", "-o", "model.onnx", *flags])
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_kilobytes_in_either_case() -> None:
    from tncompile.commands.options import memory

    assert [memory(text) for text in ("1KB", "1kB", "1KiB", "2GiB")] == [1000, 1000, 1024, 2 << 30]


def test_each_dtype_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model.pt", "-o", "model.onnx", "--input", "x:float33[batch]"])
    text = capsys.readouterr().err
    assert "no dtype 'float33'" in text
    assert text.count("float32") == text.count("int64") == 1


def test_a_mistyped_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspec", "model.pt"]) == 2
    assert "no file and no command 'inspec'; did you mean inspect?" in capsys.readouterr().err
    Path("inspec").write_bytes(b"x")  # then it is a model
    assert main(["inspec", "-o", "out.onnx"]) == 1
    assert "did you mean" not in capsys.readouterr().err


def test_calibration_data_of_another_name_say_so(tmp_path: Path) -> None:
    model = imported(nn.Linear(3, 2), torch.randn(4, 3))
    for name, told in (("x", True), ("input", False), ("arr_0", False)):
        np.savez(tmp_path / "a.npz", **{name: np.ones((40, 3), np.float32)})
        notes = load(tmp_path / "a.npz", model).notes
        assert any("the array x is taken for the input input" in note for note in notes) == told


def test_an_onnx_model_that_does_not_run_itself(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mystery", ["x"], ["y"], domain="my.own")], "g", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.own", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    with pytest.raises(CheckError, match=r"does not run this model before it is compiled either: .*Mystery"):
        tncompile.compile_file(path)


def test_equal_steps_are_told_once() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = torch.tanh(self.u(x))
            return x

    text = str(tncompile.compile(Steps().eval(), (torch.randn(2, 6),)).report)
    lines = [line for line in text.splitlines() if line.startswith("u")]
    assert len(lines) == len(set(lines))
    assert sum("×" in line for line in lines) >= 1
