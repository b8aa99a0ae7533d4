"""Cores in the place of initializers of an ONNX model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import assert_close
from tests.onnx_input.models import expected, model, node, tensor, weight
from tncompile.compiler import compile_exported
from tncompile.decomp import MatrixTrain, Ranks, balanced
from tncompile.errors import TNCompileError
from tncompile.frontend.factors import substitute
from tncompile.frontend.onnx.importer import OnnxModel, import_onnx
from tncompile.ir import Array
from tncompile.tensorizer.sites import Replacement, Site, composed, sites_of

FLOAT32 = 1e-5
EXACT = Ranks(larger=True)


def train(site: Site) -> Replacement:
    rows, columns = site.matrix.shape
    return Replacement(site, MatrixTrain.from_dense(site.matrix, (balanced(rows, 2), balanced(columns, 2)), EXACT))


def replaced(source: OnnxModel, build: Callable[[Site], Replacement] = train) -> OnnxModel:
    found = sites_of(composed(source), 64)
    assert found
    return substitute(source, [f for site in found for f in build(site).factors()])


def initializers(proto: onnx.ModelProto) -> set[str]:
    return {t.name for t in proto.graph.initializer}


def check_same(new: OnnxModel, proto: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    """The new file in onnx's reference and what is compiled of it, against the old file."""
    before = expected(proto, feeds)
    for old, now in zip(before, expected(onnx.load_from_string(new.original), feeds), strict=True):
        assert_close(now, old, tolerance=FLOAT32, what="the new file")
    compiled = compile_exported(new, batch=3)
    outputs = compiled.run(**feeds)
    for old, now in zip(before, outputs.values() if isinstance(outputs, dict) else [outputs], strict=True):
        assert_close(now, old, tolerance=FLOAT32, what="compiled")


X = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)


def gemm(opset: int = 18) -> onnx.ModelProto:
    nodes = [node("Gemm", "x w b", "h", transB=1), node("Relu", "h", "r"), node("MatMul", "r v", "y")]
    weights = [weight("w", 20, 16), weight("b", 20), weight("v", 20, 12)]
    return model(nodes, [tensor("x", ["N", 16])], [tensor("y", ["N", 12])], weights, opset)


def test_initializers_become_cores() -> None:
    proto = gemm()
    new = replaced(import_onnx(proto.SerializeToString()))
    assert {"w.core_0", "w.core_1", "v.core_0", "b"} <= initializers(new.file) and not {"w", "v"} & initializers(
        new.file
    )
    assert [n.op_type for n in new.file.graph.node if "w" in n.output] == ["Reshape"]
    assert all(len(n.input) == 2 for n in new.file.graph.node if n.op_type == "Einsum")
    check_same(new, proto, {"x": X})


def test_an_operator_set_without_einsum_and_weights_among_the_inputs() -> None:
    proto = gemm(9)
    proto.ir_version = 3
    proto.graph.input.extend(
        helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in proto.graph.initializer
    )
    new = replaced(import_onnx(proto.SerializeToString()))
    assert [v.name for v in new.file.graph.input] == ["x"]
    check_same(new, gemm_like(proto), {"x": X})


def gemm_like(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same without weights among the inputs, which onnx's reference wants to be given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.input[1:]
    copy.ir_version = 8
    return copy


def test_external_data(tmp_path: Path) -> None:
    proto = gemm()
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    source = import_onnx(tmp_path / "m.onnx")
    (site,) = [s for s in sites_of(composed(source), 64) if s.name == "w"]
    new = substitute(source, train(site).factors())
    outside = {t.name for t in new.file.graph.initializer if t.external_data}
    assert outside == {"b", "v"}  # as they were, and still read from there
    check_same(new, onnx.load(tmp_path / "m.onnx"), {"x": X})


def test_a_weight_that_branches_read_too_and_that_the_model_shows() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        return helper.make_graph([node(op, "h w", name)], name, [], [tensor(name, ["N", 16])])

    nodes = [
        node("MatMul", "x w", "h"),
        node("If", "yes", "y", then_branch=branch("a", "MatMul"), else_branch=branch("c", "Add")),
        node("Identity", "w", "shown"),
    ]
    inputs = [tensor("x", ["N", 16]), tensor("yes", [], TensorProto.BOOL)]
    proto = model(nodes, inputs, [tensor("y", ["N", 16]), tensor("shown", [16, 16])], [weight("w", 16, 16)])
    new = replaced(import_onnx(proto.SerializeToString()))
    assert "w" not in initializers(new.file)
    before = expected(proto, {"x": X, "yes": np.array(True)})
    after = expected(new.file, {"x": X, "yes": np.array(True)})
    for old, now in zip(before, after, strict=True):
        assert_close(now, old, tolerance=FLOAT32, what="with branches")


def test_weights_that_nodes_compute() -> None:
    """Of constants, of a function's body, and of others; what they were computed from goes too."""
    constant = numpy_helper.from_array(np.random.default_rng(1).standard_normal((16, 20)).astype(np.float32), "k")
    nodes = [
        helper.make_node("Constant", [], ["k"], value=constant),
        node("MatMul", "x k", "h"),
        node("Relu", "h", "r"),
        node("Tanh", "raw", "t"),
        node("MatMul", "r t", "y"),
    ]
    proto = model(nodes, [tensor("x", ["N", 16])], [tensor("y", ["N", 12])], [weight("raw", 20, 12)])
    new = replaced(import_onnx(proto.SerializeToString()))
    assert {"k.core_0", "t.core_0"} <= initializers(new.file)
    assert "raw" not in initializers(new.file)
    assert not {"Constant", "Tanh"} & {n.op_type for n in new.file.graph.node}
    check_same(new, proto, {"x": X})


def test_tables_are_no_sites() -> None:
    """Rows are gathered from cores in exported programs only: here the table would be computed again."""
    nodes = [node("Gather", "table ids", "rows"), node("Relu", "rows", "y")]
    table = weight("table", 120, 24)
    proto = model(nodes, [tensor("ids", ["N", 5], TensorProto.INT64)], [tensor("y", ["N", 5, 24])], [table])
    assert not sites_of(composed(import_onnx(proto.SerializeToString())), 64)


def test_refusals() -> None:
    source = import_onnx(gemm().SerializeToString())
    site = next(s for s in sites_of(composed(source), 64) if s.name == "w")
    (factors,) = train(site).factors()
    taken = weight("w.core_0", 3)
    proto = gemm()
    proto.graph.initializer.append(taken)
    proto.graph.node.append(node("Identity", "w.core_0", "also"))
    proto.graph.output.append(tensor("also", [3]))
    with pytest.raises(TNCompileError, match=r"has a value w\.core_0 already"):
        substitute(import_onnx(proto.SerializeToString()), [factors])
    other = model([node("Relu", "x", "y")], [tensor("x", ["N", 16])], [tensor("y", ["N", 16])])
    with pytest.raises(TNCompileError, match="has no weight w"):
        substitute(import_onnx(other.SerializeToString()), [factors])
