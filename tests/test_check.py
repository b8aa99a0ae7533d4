"""The check of a compiled file: what is wrong must not pass, and what cannot be checked must be said."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import tncompile
from tests.helpers import program_of
from tncompile import compiler
from tncompile.cli import main
from tncompile.compiler import CompiledModel
from tncompile.emit.file import Written
from tncompile.emit.onnxfile import OnnxFile
from tncompile.errors import CheckError, TNCompileError
from tncompile.passes import DEFAULT, Context, Pass
from tncompile.runtime import check as check_module
from tncompile.runtime import traced as traced_module
from tncompile.runtime.accuracy import FACTOR, OutputCheck, relative_error
from tncompile.runtime.check import check
from tncompile.runtime.inputs import random_inputs
from tncompile.runtime.session import Session
from tncompile.runtime.traced import run_traced

# ------------------------------------------------------------------------ relative_error

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("result", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, -4.0], 7 / 4),
        ([0.5, 0.0], [0.0, 0.0], 0.5),  # of nothing: the distance itself
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([-INF, 1.5], [-INF, 1.0], 0.5),
        ([NAN, 3.0], [NAN, 2.0], 0.5),
        ([INF, 1.0], [-INF, 1.0], NAN),
        ([NAN, 1.0], [INF, 1.0], NAN),
        ([NAN, 1.0], [2.0, 1.0], NAN),
        ([INF, 1.0], [2.0, 1.0], NAN),
        ([1e30, 1.0], [INF, 1.0], NAN),
        ([0.0, 1.0], [NAN, 1.0], NAN),
        ([], [], 0.0),
    ],
)
def test_relative_error(result: list[float], reference: list[float], expected: float) -> None:
    found = relative_error(np.array(result), np.array(reference))
    assert found == pytest.approx(expected, nan_ok=True)


def test_relative_error_is_taken_in_float64() -> None:
    a, b = np.array([60000], np.float16), np.array([-60000], np.float16)
    assert relative_error(a, b) == 2.0  # the difference is no float16


def test_an_error_that_is_no_number_does_not_pass() -> None:
    assert OutputCheck("y", 1e-7, 1e-7, 1e-6).passed
    assert not OutputCheck("y", 1e-5, 1e-7, 1e-6).passed
    assert not OutputCheck("y", math.nan, 0.0, math.inf).passed


# ------------------------------------------------------------------------ tampered files


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return tncompile.compile(model_of(), (torch.randn(4, 6),), batch=(1, 8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "model.pt"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model_of(), (torch.randn(4, 6),), dynamic_shapes=shapes), path)
    return path


def tampered(data: bytes, factor: float = 1.001) -> bytes:
    """The file with one number of its largest initializer changed by a thousandth of the largest."""
    model = onnx.load_model_from_string(data)
    tensor = max(model.graph.initializer, key=lambda t: math.prod(t.dims))
    array = numpy_helper.to_array(tensor).copy()
    at = np.unravel_index(np.abs(array).argmax(), array.shape)
    array[at] *= factor
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model.SerializeToString()


def renamed(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    for node in model.graph.node:
        node.output[:] = ["other" if o == "output" else o for o in node.output]
    model.graph.output[0].name = "other"
    return model.SerializeToString()


def test_the_file_as_it_is_passes(compiled: CompiledModel) -> None:
    result = check(Session(compiled.onnx), compiled.traced, (1, 5))
    assert result.passed and result.runs == ("batch=1", "batch=5")
    (output,) = result.outputs
    assert output.name == "output" and 0 < output.error < 1e-6
    assert output.bound >= FACTOR * output.eager > 0


def test_a_wrong_number_fails_the_check(compiled: CompiledModel) -> None:
    result = check(Session(tampered(compiled.onnx)), compiled.traced)
    assert not result.passed and 1e-5 < result.outputs[0].error < 1e-2
    assert not check(Session(tampered(compiled.onnx, math.nan)), compiled.traced).passed


def test_the_reference_does_not_go_through_the_program(compiled: CompiledModel) -> None:
    """A network that was wrong from the import on would be found, too."""
    text = str(compiled.program)
    traced = dataclasses.replace(compiled.traced, program=program_of(text, **{"0.bias": 0.0}))
    assert check(Session(compiled.onnx), traced).passed
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    (found,) = run_traced(traced, {"input": x}, torch.float64)
    with torch.no_grad():
        expected = model_of().double()(torch.from_numpy(x).double()).numpy()
    assert found.dtype == np.float64 and relative_error(found, expected) < 1e-14


def test_a_file_of_other_outputs_is_refused(compiled: CompiledModel) -> None:
    with pytest.raises(CheckError, match=r"has inputs input and outputs other; the model has input and output"):
        check(Session(renamed(compiled.onnx)), compiled.traced)


def test_a_file_of_other_shapes_is_refused(compiled: CompiledModel) -> None:
    """The first output twice as wide."""
    model = onnx.load_model_from_string(compiled.onnx)
    last = next(n for n in model.graph.node if "output" in n.output)
    last.output[:] = ["half"]
    model.graph.node.append(onnx.helper.make_node("Concat", ["half", "half"], ["output"], axis=1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6
    with pytest.raises(CheckError, match=r"output output has shape \(1, 6\) at batch=1, the model's has \(1, 3\)"):
        check(Session(model.SerializeToString()), compiled.traced)


class Wrong(Pass):
    """Loses a little of every core: a pass with a fault that the verifier cannot see."""

    @classmethod
    def name(cls) -> str:
        return "wrong"

    def run(self, program: Any, context: Context) -> Any:
        def scaled(tensor: Any) -> Any:
            return tensor if tensor.data is None else dataclasses.replace(tensor, data=tensor.data * np.float32(1.001))

        nodes = []
        for node in program.nodes:
            if hasattr(node, "terms"):
                terms = [dataclasses.replace(t, tensors=tuple(map(scaled, t.tensors))) for t in node.terms]
                node = dataclasses.replace(node, terms=tuple(terms))
            nodes.append(node)
        return dataclasses.replace(program, nodes=tuple(nodes)), ()


def test_a_compile_with_a_faulty_pass_raises() -> None:
    inputs = (torch.randn(4, 6),)
    with pytest.raises(CheckError, match="not as exact as it must be: output: error"):
        tncompile.compile(model_of(), inputs, passes=(Wrong(), *DEFAULT))
    tncompile.compile(model_of(), inputs, passes=(Wrong(), *DEFAULT), check=False)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 1 << 14))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(torch.tanh(x) * self.scale, -1)[:, -1:]


def test_an_error_of_onnx_runtimes_own_operators_is_no_error_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds up numbers one by one; eager PyTorch does not. What is off by more than rounding is refused all the same,
    also where the exporter errs with it."""
    inputs = (torch.randn(2, 1 << 14),)
    compiled = tncompile.compile(Summed(), inputs)
    (output,) = compiled.report.check.outputs
    assert output.exported is not None and FACTOR * output.eager < output.error <= output.bound <= 1e-4
    assert "torch's own export's" in str(output)

    def wrong(exported: Any, path: Path) -> None:
        path.write_bytes(bad)

    bad = tampered(compiled.onnx, 1e4)
    assert not check(Session(bad), compiled.traced).passed
    monkeypatch.setattr(check_module, "export_plain", wrong)
    assert not check(Session(bad), compiled.traced).passed


def test_where_eager_is_no_number_the_bound_is_that_of_the_dtype(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager may overflow where the composed network does not."""

    def overflows(traced: Any, feeds: Any, dtype: Any) -> Any:
        return [y if dtype else y * np.float32(np.nan) for y in run_traced(traced, feeds, dtype)]

    monkeypatch.setattr(traced_module, "run_traced", overflows)
    (output,) = check(Session(compiled.onnx), compiled.traced).outputs
    assert output.passed and math.isnan(output.eager) and 0 < output.bound < 1e-5
    assert not check(Session(tampered(compiled.onnx)), compiled.traced).passed


# ------------------------------------------------------------------------ the command line


def test_verify(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    assert main([str(saved), "-o", str(good), "-q"]) == 0
    data = good.read_bytes()
    assert main(["verify", str(saved), str(good), "--batch", "2,7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"passed: {good}") and "batch=2; batch=7" in out
    bad.write_bytes(wrong := tampered(data))
    assert main(["verify", str(saved), str(bad)]) == 1
    assert capsys.readouterr().out.startswith(f"FAILED: {bad}")
    assert good.read_bytes() == data and bad.read_bytes() == wrong
    bad.write_bytes(renamed(data))
    assert main(["verify", str(saved), str(bad)]) == 1
    assert f"tncompile: {saved}: the compiled model has inputs" in capsys.readouterr().err
    assert main(["verify", str(good), str(saved)]) == 1
    assert "not an ONNX file; give the model first" in capsys.readouterr().err


def test_a_compile_that_fails_its_check_leaves_the_output(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    output.write_bytes(b"what was there")
    write = compiler.write

    def wrong(*args: Any) -> Written:
        file = write(*args)
        return Written(OnnxFile(tampered(file.data)), file.storage)

    monkeypatch.setattr(compiler, "write", wrong)
    assert main([str(saved), "-o", str(output), "--report", str(report), "-q"]) == 1
    assert "not as exact as it must be" in capsys.readouterr().err
    assert output.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert main([str(saved), "-o", str(output), "--no-check", "-q"]) == 0
    assert output.read_bytes() != b"what was there"


# ------------------------------------------------------------------------ examples

EXAMPLES: list[tuple[dict[str, Any], str]] = [
    ({"x": np.ones((2, 6))}, r"the example has x; the inputs are input"),
    ({}, r"the example has no arrays; the inputs are input"),
    ({"input": np.ones((2, 6)), "y": np.ones(1)}, r"the example has input, y; the inputs are input"),
    ({"input": np.ones((2, 5))}, r"the example's input has shape \(2, 5\); the input's is \[batch 6\]"),
    ({"input": np.ones(6)}, r"the example's input has shape \(6,\); the input's is \[batch 6\]"),
    ({"input": np.ones((2, 6), int)}, r"the example's input is int64; the input is float32"),
    ({"input": np.full((2, 6), "a")}, r"the example's input is <U1; the input is float32"),
]


@pytest.mark.parametrize(("example", "message"), EXAMPLES)
def test_examples_that_do_not_fit_are_refused(compiled: CompiledModel, example: Any, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(Session(compiled.onnx), compiled.traced, examples=[example])


def test_examples_are_what_is_run(compiled: CompiledModel, saved: Path, tmp_path: Path) -> None:
    """In the input's dtype, at the example's batch, and nothing random besides."""
    good = {"input": np.ones((9, 6))}
    result = check(Session(compiled.onnx), compiled.traced, (1, 2), examples=[good, good])
    assert result.passed and result.runs == ("example 0", "example 1")
    # what is wrong for some inputs only is found by an example of those
    np.savez(tmp_path / "zeros.npz", input=np.zeros((2, 6), np.float32))
    (tmp_path / "model.onnx").write_bytes(tampered(compiled.onnx))
    arguments = ["verify", str(saved), str(tmp_path / "model.onnx")]
    assert main(arguments) == 1
    assert main([*arguments, "--example", str(tmp_path / "zeros.npz")]) == 0


def test_an_example_that_the_model_cannot_run_is_said_so() -> None:
    model = nn.Embedding(5, 3)
    compiled = tncompile.compile(model, (torch.tensor([[1, 2], [3, 4]]),))
    with pytest.raises(TNCompileError, match=r"(traced model itself cannot run|ONNX Runtime fails at example 0)"):
        check(Session(compiled.onnx), compiled.traced, examples=[{"input": np.array([[7, 9]])}])


def test_random_integers_are_drawn_from_the_example() -> None:
    compiled = tncompile.compile(nn.Embedding(5, 3), (torch.tensor([[1, 3], [3, 4]]),))
    for batch in (1, 30):
        tokens = random_inputs(compiled.traced, {"batch": batch}, np.random.default_rng(0))["input"]
        assert tokens.shape == (batch, 2) and tokens.dtype == np.int64
        assert {*tokens.flat} <= {1, 3, 4}


# ------------------------------------------------------------------------ what cannot be checked


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + torch.randn_like(x[:, :3])


def test_random_models_are_refused_with_the_line() -> None:
    with pytest.raises(CheckError, match=r"draws random numbers \(aten\.randn_like.*--no-check") as caught:
        tncompile.compile(Noisy(), (torch.randn(4, 6),))
    assert caught.value.source is not None and caught.value.source.file == __file__
    assert "torch.randn_like(x[:, :3])" in str(caught.value)


def test_dropout_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).train()
    with pytest.raises(CheckError, match=r"draws random numbers .*model\.eval\(\)"):
        tncompile.compile(model, (torch.randn(4, 6),))
    assert tncompile.compile(model.eval(), (torch.randn(4, 6),)).report.check is not None


def test_a_model_of_numbers_that_are_not_finite_passes() -> None:
    """-inf of a mask is what it is on both sides."""

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.relu(x)) * 2

    compiled = tncompile.compile(Masked(), (torch.randn(4, 6),))
    assert compiled.report.check is not None and compiled.report.check.passed
    assert np.isinf(compiled.run(-np.ones((2, 6), np.float32))).all()
