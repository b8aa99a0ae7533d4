"""ONNX files that are damaged, or written to do harm: each is refused with an error that says what it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_input.models import ints, model, node, tensor, tt_chain, weight
from tncompile.cli import main
from tncompile.errors import LoadError, TNCompileError
from tncompile.frontend.onnx.importer import import_onnx


def outside(location: str) -> onnx.ModelProto:
    proto = model([node("Add", "x w", "y")], [tensor("x", [4])], [tensor("y", [4])], [weight("w", 4)], 18)
    (w,) = proto.graph.initializer
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        w.external_data.add(key=key, value=value)
    return proto


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "link", ""])
def test_external_data_stay_in_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    os.symlink("/etc/passwd", folder / "link")
    path = folder / "model.onnx"
    path.write_bytes(outside(location).SerializeToString())
    with pytest.raises(LoadError, match="point outside its folder"):
        import_onnx(path)


def test_external_data_that_are_missing_or_short(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(outside("data").SerializeToString())
    with pytest.raises(LoadError, match="which is not there"):
        import_onnx(path)
    (tmp_path / "data").write_bytes(b"\0" * 15)
    with pytest.raises(LoadError, match="ends before the weight 'w' does"):
        import_onnx(path)
    with pytest.raises(LoadError, match="in another file"):
        import_onnx(path.read_bytes())


def test_truncated_files_and_garbage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tt_chain().SerializeToString()
    path = tmp_path / "model.onnx"
    for part in (
        data[: len(data) // 2],
        data[:-1],
        data[:40],
        data[:2] + b"\x3a" + os.urandom(200),
        b"\x08\x07\x42\xff",
    ):
        path.write_bytes(part)
        assert main([str(path), "-o", str(tmp_path / "out.onnx")]) == 1
        message = capsys.readouterr().err
        assert str(path) in message and "Traceback" not in message
        assert not (tmp_path / "out.onnx").exists()


def cyclic() -> onnx.ModelProto:
    return model([node("Add", "x b", "a"), node("Relu", "a", "b")], [tensor("x", [4])], [tensor("b", [4])])


def short_weight() -> onnx.ModelProto:
    proto = tt_chain(18)
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    return proto


def negative() -> onnx.ModelProto:
    proto = tt_chain(18)
    proto.graph.initializer[0].dims[0] = -4
    return proto


def sparse() -> onnx.ModelProto:
    proto = tt_chain(18)
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    return proto


def sequence() -> onnx.ModelProto:
    info = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    return model([node("SplitToSequence", "x", "y", axis=0)], [tensor("x", ["N", 4])], [info])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (cyclic, "not a valid ONNX model .*topologically sorted"),
        (short_weight, "damaged or cut off"),
        (negative, "negative size"),
        (sparse, "sparse weights"),
        (sequence, "is not a tensor"),
        (lambda: model([node("Nonsense", "x", "y")], [tensor("x", [4])], [tensor("y", [4])]), "not a valid ONNX model"),
        (lambda: model([node("Relu", "x", "y")], [tensor("x", [2**31, 2**31])], [tensor("y", None)]), "GB"),
        (
            lambda: model([node("Expand", "x s", "y")], [tensor("x", [1])], [tensor("y", None)], [ints("s", 10**12)]),
            "GB",
        ),
        (lambda: onnx.ModelProto(ir_version=8), "without a graph"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[], onnx.ModelProto], said: str) -> None:
    with pytest.raises(TNCompileError, match=said):
        import_onnx(make().SerializeToString())


def test_constants_that_unfold_are_not_computed() -> None:
    """A few bytes that would be terabytes: left to the one who runs the model."""
    nodes = [node("Range", "zero top one", "r"), node("ReduceSum", "r", "s", keepdims=0), node("Add", "x s", "y")]
    numbers = {"zero": 0, "top": 10**9, "one": 1}
    weights = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in numbers.items()]
    result = import_onnx(model(nodes, [tensor("x", [4])], [tensor("y", [4])], weights).SerializeToString())
    assert "onnx.Range" in str(result.program)
