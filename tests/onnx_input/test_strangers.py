"""What files of other converters have: sizes of -1, sizes that only some numbers fit, outputs that are all but 0, and
branches that are alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.onnx_input.models import RNG, ints, model, node, tensor, weight
from tests.onnx_input.test_compile import agrees, compiled, operators
from tncompile.cli import main
from tncompile.frontend.onnx.importer import import_onnx
from tncompile.runtime import inputs


def test_branches_that_are_alike_are_joined_and_taken_apart_again() -> None:
    """No exporter writes the selections that are left: the last branch is read by something else, too."""
    count, width = 12, 24
    nodes, weights = [], []
    for k in range(count):
        weights += [weight(f"a{k}", width, width), weight(f"b{k}", width, width)]
        nodes += [node("MatMul", f"x a{k}", f"h{k}"), node("HardSigmoid", f"h{k}", f"g{k}", alpha=0.3, beta=0.4)]
        nodes += [node("MatMul", f"g{k} b{k}", f"s{k}"), node("Softmax", f"s{k}", f"y{k}", axis=k % 2)]
    proto = model(
        nodes,
        [tensor("x", ["batch", width])],
        [tensor(f"y{k}", ["batch", width]) for k in range(count)],
        weights,
    )
    result = compiled(proto)
    assert operators(result.onnx).count("HardSigmoid") == 1 and "Gather" in operators(result.onnx)
    agrees(proto, result, {"x": RNG.standard_normal((3, width)).astype(np.float32)})


def test_a_size_of_minus_one_is_one_that_nobody_named() -> None:
    proto = model([node("MatMul", "x w", "y")], [tensor("x", [-1, 8])], [tensor("y", [-1, 5])], [weight("w", 8, 5)])
    result = compiled(proto)
    agrees(proto, result, {"x": RNG.standard_normal((3, 8)).astype(np.float32)})
    shown = onnx.load_model_from_string(result.onnx).graph.input[0].type.tensor_type.shape.dim[0]
    assert shown.dim_value >= 0


def test_sizes_that_only_multiples_fit_are_checked_at_multiples() -> None:
    proto = model(
        [node("Reshape", "x s", "h"), node("MatMul", "h w", "y")],
        [tensor("x", ["batch", "n"])],
        [tensor("y", ["batch", "m", 3])],
        [ints("s", 0, -1, 4), weight("w", 4, 3)],
    )
    check = compiled(proto).report.check
    assert check is not None and check.passed and "cannot run" not in check.note
    assert len({run.partition("n=")[2] for run in check.runs}) > 1  # a size besides the typical one


def test_bench_runs_at_the_sizes_that_are_typical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, record = tmp_path / "given.onnx", tmp_path / "found.json"
    nodes = [node("Reshape", "x s", "h"), node("MatMul", "h w", "y")]  # of 48 columns; 32 are too few
    weights = [ints("s", 0, 48), weight("w", 48, 3)]
    proto = model(nodes, [tensor("x", ["batch", "n"])], [tensor("y", ["batch", 3])], weights)
    path.write_bytes(proto.SerializeToString())
    given = ["bench", str(path), "--batch", "2", "--seconds", "0.05", "--against", "exporter", "--json", str(record)]
    assert main([*given, "--dim", "n=48"]) == 0
    assert set(json.loads(record.read_text())["rows"][0]["ms"]) == {"tncompile", "exporter"}
    assert main([*given, "--dim", "m=48"]) == 1
    assert "m" in capsys.readouterr().err


def test_a_sigmoid_far_below_its_rounding_passes_and_is_told() -> None:
    far = numpy_helper.from_array(np.full(3, -17.0, np.float32), "b")
    proto = model(
        [node("MatMul", "x w", "h"), node("Add", "h b", "s"), node("Sigmoid", "s", "y")],
        [tensor("x", ["batch", 8])],
        [tensor("y", ["batch", 3])],
        [numpy_helper.from_array(0.1 * RNG.standard_normal((8, 3)).astype(np.float32), "w"), far],
    )
    check = compiled(proto).report.check
    assert check is not None and check.passed and "too little to tell" in check.note


def test_a_reference_that_is_too_large_is_computed_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model([node("Relu", "x", "y")], [tensor("x", ["batch", 100])], [tensor("y", ["batch", 100])])
    traced = import_onnx(proto.SerializeToString())
    monkeypatch.setattr(inputs, "MOST", 8000)  # ten rows of 100 numbers
    assert inputs.affordable(traced, {"batch": 32}) == {"batch": 10}
    assert inputs.affordable(traced, {"batch": 3}) == {"batch": 3}
