"""TorchScript that decides by the values of its inputs: refused, unless it cannot matter or the user says so."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tncompile.cli import main
from tncompile.errors import TNCompileWarning, UnsupportedError
from tncompile.frontend.files.inputs import parse_input
from tncompile.frontend.load import LoadOptions, load
from tncompile.frontend.script.compare import compare
from tncompile.frontend.script.module import Scripted


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return -x


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x


class Through(nn.Module):
    """By an attribute, a list and arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps = int(x.abs().max()) + 1
        counts = [1, self.steps]
        for _ in range(counts[1]):
            x = x + 1
        return x


class View(nn.Module):
    """By a tensor of zeros that a view of it is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros([x.shape[0], 4])
        y[:, 0] = x[:, 0]
        if bool(y.sum() > 0):
            return y * 2
        return y


class Number(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.max())


class Returned(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, int(x.sum())


class Appended(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = [1.0]
        factors.append(float(x.max()))
        return x * factors[-1]


class Harmless(nn.Module):
    """Reads values, and nothing that it computes hangs on them; what does decide are shapes, weights and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.ones(1))
        self.last = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert bool((x < 1e9).all()), "too large"
        if x.max() > 1e6:
            print("large")
        self.last = float(x.mean())
        y = torch.zeros_like(x) + x.new_zeros(x.shape)
        if bool(y.sum() == 0) and bool(self.flag > 0) and x.shape[1] == 3:
            y = y + x
        return y


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def read(path: Path, **options: bool) -> torch.export.ExportedProgram:
    loaded = load(path, LoadOptions((parse_input("x:float32[batch,3]"),), **options))
    assert isinstance(loaded, torch.export.ExportedProgram)
    return loaded


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (Branch(), r"a branch at code/\S+:\d+ \(if bool\(torch.gt\(torch.sum\(x\), 0\)\):\)"),
        (Loop(), "a loop at .*while"),
        (Through(), r"a loop at .*for .* in range"),
        (View(), "a branch at .*torch.sum"),
        (Number(), "a number at .*torch.mul"),
        (Returned(), "a number that it returns"),
        (Appended(), "a number at .*torch.append"),
    ],
)
def test_a_choice_by_values_is_refused_unless_the_user_says_so(module: nn.Module, where: str, tmp_path: Path) -> None:
    path = saved(module, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=f"decides by the values of its inputs \\({where}.*--fix-choices"):
        read(path)
    with pytest.warns(TNCompileWarning, match=f"{where}.*compiled for inputs that decide as random"):
        program = read(path, fix_choices=True)
    assert program.range_constraints


def test_choices_that_cannot_matter_pass(tmp_path: Path) -> None:
    path = saved(Harmless(), tmp_path / "m.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TNCompileWarning)
        program = read(path)
    told = [str(w.message) for w in caught if issubclass(w.category, TNCompileWarning)]
    assert len(told) == 1
    assert re.search(r"refuses inputs by their values \(an assertion at .*the compiled one does not look", told[0])
    x = torch.randn(5, 3)
    torch.testing.assert_close(program.module()(x), x, rtol=0, atol=0)


def test_the_trace_is_compared_with_the_script_itself(tmp_path: Path) -> None:
    module = Scripted(torch.jit.load(saved(Branch(), tmp_path / "m.pt")))
    x = torch.ones(2, 3)
    assert module.record({"x": x})
    program = torch.export.export(module, (x,))  # of one branch
    compare(module, program, [((x + 1,), {})])
    with pytest.raises(UnsupportedError, match=r"computes something else than its trace .*\(output 0\)"):
        compare(module, program, [((x + 1,), {}), ((-x,), {})])


def test_each_comparison_starts_from_the_saved_state(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    program = read(saved(Counts(), tmp_path / "m.pt"))
    torch.testing.assert_close(program.module()(torch.ones(4, 3)), torch.ones(4, 3))


def test_the_flag_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = saved(Branch(), tmp_path / "m.pt"), tmp_path / "m.onnx"
    flags = [str(path), "-o", str(out), "--input", "x:float32[batch,3]"]
    assert main(flags) == 1
    assert "--fix-choices" in capsys.readouterr().err
    assert not out.exists()
    assert main([*flags, "--fix-choices"]) == 0
    assert out.exists()
