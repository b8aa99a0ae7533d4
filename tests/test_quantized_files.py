"""Whole files in fewer bits: branches, weights stored as cores, metadata, what is refused, and what is left behind."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tncompile
from tests.helpers import feeds_for, nodes_of, program_of
from tests.quantizing import model_of, node, numbers, operators, run
from tests.test_store import folded_program, traced
from tests.test_switch import CONVOLUTIONS, DENSE, FIRST, emitted, layers, switched
from tncompile.emit.file import write
from tncompile.errors import LoadError, TNCompileError
from tncompile.runtime import quantized_time
from tncompile.runtime.quantize import BITS, STORED, quantizable, quantize, whole
from tncompile.runtime.quantized_time import seconds
from tncompile.runtime.tuner import CACHE

ERRORS = {"fp16": 2e-3, "int8": 0.04, "int8-static": 0.04, "int8-weights": 0.03, "int4": 0.25, "int4-weights": 0.25}
"""Relative errors of two layers of normal weights, with some room."""


def error(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


# --- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS[1:])
def test_both_branches_of_a_plan(bits: str) -> None:
    program = layers((12, 40), (5, 6))
    model = emitted(switched(program, ((4,), (FIRST, DENSE)), ((4,), (FIRST, DENSE)))).SerializeToString()
    assert {*quantizable(model)} == {"y0", "y1"}
    samples = [feeds_for(program, {"batch": batch}) for batch in (3, 8)]
    choice = {key: bits for key, can in quantizable(model).items() if bits in can}
    small = quantize(model, choice, samples)
    assert operators(small).count("If") == 2
    errors = [error(run(small, **sample), run(model, **sample)) for sample in samples]
    assert max(errors) < ERRORS[bits] and errors[1] > 1e-6  # the cores of the small branch are too small for some ways
    branches = [a.g for n in onnx.load_model_from_string(small).graph.node for a in n.attribute if n.op_type == "If"]
    kinds = {n.op_type for branch in branches for n in nodes_of(branch)}
    wanted = {"int8": "MatMulInteger", "int8-static": "QuantizeLinear", "int4": "MatMulNBits"}
    assert bits not in wanted or wanted[bits] in kinds
    assert not any(branch.initializer for branch in branches)  # weights stay in the main graph


@pytest.mark.parametrize("bits", ["int8-static", "int8-weights"])
def test_convolutions_in_both_branches(bits: str) -> None:
    """Each branch has its own Reshape of their one kernel, which keeps one scale for each of its 16 channels."""
    program = program_of(CONVOLUTIONS)
    model = emitted(program).SerializeToString()
    samples = [feeds_for(program, {"batch": batch}) for batch in (2, 3)]
    small = quantize(model, {"y": bits}, samples)
    for sample in samples:
        assert 1e-6 < error(run(small, **sample), run(model, **sample)) < ERRORS[bits]
    kept = [math.prod(t.dims) for t in onnx.load_model_from_string(small).graph.initializer]
    assert max(size for size in kept if size < 16 * 16 * 3 * 3) == 16


@pytest.mark.parametrize("bits", BITS[1:])
def test_weights_stored_as_cores(bits: str) -> None:
    """In the file alone the cores are rounded; to compute in fewer bits they are contracted first."""
    program = folded_program()
    model = write(program, traced(program), "cores").data
    sample = feeds_for(program, {"batch": 4})
    small = quantize(model, {"y": bits}, [sample])
    names = {t.name for t in onnx.load_model_from_string(small).graph.initializer}
    assert not {"a", "b"} & names
    assert 1e-6 < error(run(small, **sample), run(model, **sample)) < ERRORS[bits]
    assert ("Reshape" in operators(small)) == (bits in STORED)


def test_a_branch_of_the_model_itself() -> None:
    """What a model's own If runs need not run on a sample, so that no range is known; the rest is as outside."""
    inner = [node("MatMul", "x W", "m")]
    result = [onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, ["b", 40])]
    other = [onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, ["b", 40])]
    branches = {
        "then_branch": onnx.helper.make_graph(inner, "then", [], result),
        "else_branch": onnx.helper.make_graph([node("Identity", "x", "o")], "else", [], other),
    }
    nodes = [
        node("ReduceSum", "x axes", "sum", keepdims=0),
        node("Greater", "sum zero", "flag"),
        node("If", "flag", "y", **branches),
    ]
    constants = {"W": numbers(40, 40), "axes": np.array([0, 1]), "zero": np.zeros(())}
    model = model_of(nodes, constants, ["b", 40], ["b", 40])
    assert quantizable(model) == {"m": ("fp32", "fp16", "int8-weights", "int8", "int4")}
    x = np.abs(numbers(3, 40))
    small = quantize(model, {"m": "int8"})
    assert 1e-6 < error(run(small, x=x), run(model, x=x)) < 0.02
    np.testing.assert_array_equal(run(small, x=-x), -x)


def test_shared_weights() -> None:
    """A weight that two read is smaller in the file where both are chosen, and rounded once for both."""
    nodes = [node("MatMul", "x W", "a", "one"), node("Relu", "a", "r"), node("MatMul", "r W", "y", "two")]
    model = model_of(nodes, {"W": numbers(40, 40)}, ["b", 40], ["b", 40])
    assert len(quantize(model, {"one": "fp16"})) >= len(model)
    assert len(quantize(model, {"one": "fp16", "two": "fp16"})) < 0.7 * len(model)
    assert len(quantize(model, {"one": "int8", "two": "int8"})) < 0.6 * len(model)
    x = numbers(3, 40)
    one = quantize(model, {"one": "int8"})
    assert {"MatMul", "MatMulInteger"} <= {*operators(one)}
    assert 1e-6 < error(run(one, x=x), run(model, x=x)) < 0.02


def test_names_that_are_taken() -> None:
    """What the library would call a scale is a weight of the model."""
    weights = {"W": numbers(40, 40), "W_scale": numbers(40, 40, seed=1), "x_scale": numbers(40, seed=2)}
    nodes = [node("MatMul", "x W", "a", "one"), node("Mul", "a x_scale", "b"), node("MatMul", "b W_scale", "y", "two")]
    model = model_of(nodes, weights, ["b", 40], ["b", 40])
    x = numbers(3, 40)
    for bits in ("int8", "int8-static", "int4"):
        for choice in ({"one": bits}, {"two": bits}, {"one": bits, "two": bits}):
            assert 1e-6 < error(run(quantize(model, choice, [{"x": x}]), x=x), run(model, x=x)) < ERRORS[bits]


# --- compiled models -------------------------------------------------------------------------------------------


class Reader(torch.nn.Module):
    """A table, attention and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(60, 32)
        self.attention = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = torch.nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.head(self.attention(self.table(ids)).mean(1))
        return head


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (3, 7))
    path = tmp_path_factory.mktemp("reader") / "model.onnx"
    tncompile.compile(Reader().eval(), (ids,), batch=(1, 32)).save(path)
    return path.read_bytes(), {"ids": ids.numpy()}


@pytest.mark.parametrize("bits", BITS[1:])
def test_a_compiled_model(bits: str, reader: tuple[bytes, dict[str, np.ndarray]]) -> None:
    model, sample = reader
    before = onnx.load_model_from_string(model)
    small = whole(model, bits, [sample])
    after = onnx.load_model_from_string(small)
    assert len(small) < len(model)
    assert 1e-6 < error(run(small, **sample), run(model, **sample)) < 0.5 * ERRORS[bits]
    onnx.checker.check_model(after)
    assert {p.key: p.value for p in after.metadata_props} == {p.key: p.value for p in before.metadata_props}
    assert [i.name for i in after.graph.input] == [i.name for i in before.graph.input]
    assert [o.name for o in after.graph.output] == [o.name for o in before.graph.output]
    names = [n.name for n in nodes_of(after.graph)]
    assert len({*names}) == len(names)

    def layers_of(proto: onnx.ModelProto) -> set[tuple[str, str]]:
        return {(p.key, p.value) for n in nodes_of(proto.graph) for p in n.metadata_props}

    assert layers_of(before) <= layers_of(after)


@pytest.mark.parametrize("bits", BITS[1:])
def test_the_same_bytes_and_nothing_else(
    bits: str,
    reader: tuple[bytes, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No file stays behind, nothing is printed, and logging is as it was."""
    model, sample = reader
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = (logging.getLogger().level, [*logging.getLogger().handlers], logging.root.manager.disable)
    assert whole(model, bits, [sample]) == whole(model, bits, [sample])
    assert (logging.getLogger().level, [*logging.getLogger().handlers], logging.root.manager.disable) == before
    assert [*tmp_path.iterdir()] == []
    assert capfd.readouterr() == ("", "")


# --- what is refused -------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = model_of([node("MatMul", "x W", "y", "n")], {"W": numbers(40, 40)}, ["b", 40], ["b", 40])
    for arguments, message in (
        (({"m": "int8"},), "'m' in this model; it has n"),
        (({"n": "int3"},), "'int3' is no way to store a weight; it is one of fp32, fp16"),
        (({"n": "int4-weights"},), "n cannot be computed in int4-weights, only in fp32, fp16, int8"),
        (({"n": "int8-static"},), "needs calibration data"),
        (({"n": "int8-static"}, [{"x": numbers(2, 41)}]), "sample 0: the model does not run on it"),
        (({"n": "int8-static"}, [{"x": numbers(2, 40)}, {"x": np.full((2, 40), np.nan, np.float32)}]), "sample 1: the"),
    ):
        with pytest.raises(TNCompileError, match=message):
            quantize(model, *arguments)
    with pytest.raises(TNCompileError, match="'half' is no way"):
        whole(model, "half")
    for data in (b"", b"no model at all"):
        with pytest.raises(LoadError, match="not a readable ONNX model"):
            quantizable(data)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    data = model_of([node("MatMul", "x W", "y", "n")], {"W": numbers(40, 40)}, ["b", 40], ["b", 40])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load_model_from_string(data), path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(LoadError, match="in a file of their own"):
        quantize(path.read_bytes(), {"n": "int8"})
    assert quantize(onnx.load(path).SerializeToString(), {"n": "int8"})


def test_nothing_to_quantize() -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["b", 40], ["b", 40])
    assert quantizable(model) == {}
    assert whole(model, "int8") == model
    with pytest.raises(TNCompileError, match="it has nothing"):
        quantize(model, {"y": "int8"})


# --- times -----------------------------------------------------------------------------------------------------


def test_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is smaller in the file alone takes the same time; equal shapes are timed once, whatever they are called."""
    monkeypatch.setenv(CACHE, str(tmp_path))

    def model(name: str, columns: int, seed: int) -> bytes:
        weight = numbers(40, columns, seed=seed)
        return model_of([node("MatMul", f"x {name}", "y", name)], {name: weight}, ["b", 40], ["b", columns])

    feeds = {"x": numbers(4, 40)}
    times = seconds(model("W", 30, 0), BITS, feeds, budget_s=0.05)
    assert times["fp32"] == times["fp16"] == times["int8-weights"] and math.isinf(times["int4-weights"])
    assert all(0 < times[bits] < 1 for bits in ("fp32", "int8", "int8-static", "int4"))
    with monkeypatch.context() as patched:
        patched.setattr(quantized_time, "race", lambda *_, **__: pytest.fail("timed again"))
        assert seconds(model("V", 30, 1), BITS, feeds) == times
        assert seconds(model("V", 30, 1), ("int8",), feeds) == {"int8": times["int8"]}
        with pytest.raises(pytest.fail.Exception):
            seconds(model("W", 31, 0), BITS, feeds)
        with pytest.raises(pytest.fail.Exception):
            seconds(model("W", 30, 0), BITS, {"x": numbers(5, 40)})
        with pytest.raises(pytest.fail.Exception):
            seconds(model("W", 30, 0), BITS, feeds, threads=1)
        with pytest.raises(pytest.fail.Exception):
            seconds(model("W", 30, 0), BITS, feeds, stored=False)
    with pytest.raises(TNCompileError, match="'int3'"):
        seconds(model("W", 30, 0), ("int3",), feeds)
