"""Dynamic sizes: first modes that are one batch, and the names that a user gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tncompile
from tncompile.cli import main
from tncompile.frontend.files.inputs import parse_input
from tncompile.frontend.load import LoadOptions
from tncompile.ir.dims import Dim

AXES = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}


class Masked(nn.Module):
    """Reads a mask at places that are counted, as transformers do: nothing says that its sizes are those of `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        kept = mask.bool()[torch.arange(b)[:, None], torch.arange(t)[None, :]]
        return self.layer(x) * kept[..., None]


class Limited(Masked):
    """Refuses long sequences, so that torch.export does not take a plain dynamic size for them."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, mask) + torch.arange(32.0)[: x.shape[1], None] * (x.shape[1] <= 32)


def shapes(compiled: tncompile.CompiledModel) -> list[tuple[Dim, ...]]:
    return [value.shape or () for value in compiled.program.inputs]


def test_first_modes_of_one_size_are_one_batch() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    compiled = tncompile.compile(model, (torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.int64)), batch=(1, 8))
    assert shapes(compiled) == [("batch", 6, 8), ("batch", 6)]
    x, mask = torch.randn(5, 6, 8), torch.randint(0, 2, (5, 6))
    np.testing.assert_allclose(compiled.run(x, mask), model(x, mask).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [Masked, Limited])
def test_equal_names_on_the_command_line_are_one_size(
    make: type[Masked], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also for what a first trace refuses; and no more is printed than the report."""
    path = tmp_path / "m.pt"
    loading = LoadOptions(
        tuple(map(parse_input, ("x:float32[batch,seq,8]", "mask:int64[batch,seq]<2"))), trust_pickle=True
    )
    torch.save(make().eval(), path)
    compiled = tncompile.compile_file(path, loading=loading, batch=(1, 8))
    assert shapes(compiled) == [("batch", "seq", 8), ("batch", "seq")]
    assert "seq=8" in str(compiled.report)
    assert "onnxruntime" not in capfd.readouterr().err


def test_a_file_whose_equal_sizes_have_two_symbols_is_checked_at_equal_sizes(tmp_path: Path) -> None:
    """torch.export with sizes of its own choice: the model itself runs only where they are equal."""
    auto = {0: torch.export.Dim.AUTO}
    inputs = (torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.int64))
    torch.export.save(torch.export.export(Masked().eval(), inputs, dynamic_shapes=(auto, auto)), tmp_path / "m.pt2")
    compiled = tncompile.compile_file(tmp_path / "m.pt2", batch=(1, 8))
    assert compiled.report.check is not None
    (largest,) = (run for run in compiled.report.check.runs if run.startswith("batch=8"))
    assert {size.partition("=")[2] for size in largest.split(", ")} == {"8"}


@pytest.mark.parametrize("by_file", [True, False])
def test_names_of_dimensions_stay(by_file: bool, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Softmax(1)).eval(), torch.randn(3, 5, 8)
    if by_file:
        tncompile.save(model, (x,), tmp_path / "m.pt", dynamic_shapes=(AXES,))
        assert torch.export.load(tmp_path / "m.pt")
        compiled = tncompile.compile_file(tmp_path / "m.pt", sizes={"seq": 7})
    else:
        compiled = tncompile.compile(model, (x,), dynamic_shapes=(AXES,), sizes={"seq": 7})
    assert shapes(compiled) == [("batch", "seq", 8)]
    assert compiled.report.sizes == {"seq": 7}
    assert compiled.run(torch.randn(2, 9, 8)).shape == (2, 9, 4)


def test_the_batch_is_what_is_called_so() -> None:
    axes = {0: torch.export.Dim("seq"), 1: torch.export.Dim("batch")}
    compiled = tncompile.compile(nn.Linear(8, 4).eval(), (torch.randn(5, 3, 8),), dynamic_shapes=({**axes},))
    assert shapes(compiled) == [("seq", "batch", 8)]


def test_names_reach_training() -> None:
    module = tncompile.to_torch(nn.Linear(8, 4), (torch.randn(3, 5, 8),), dynamic_shapes=(AXES,), sizes={"seq": 7})
    assert module(torch.randn(2, 6, 8)).shape == (2, 6, 4)


def test_an_input_that_the_model_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Masked().eval(), tmp_path / "m.pt")
    flags = ["--trust-pickle", "--input", "y:float32[batch,5,8]", "--input", "[batch,5]"]
    assert main([str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.onnx"), *flags]) == 1
    assert "the model has no input y; its inputs are x, mask" in capsys.readouterr().err
