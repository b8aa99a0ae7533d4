"""ONNX models through the whole compiler: the file that comes out, its interface, its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_input.models import RNG, expected, ints, model, node, tensor, tt_chain, weight
from tncompile import compiler
from tncompile.cli import main
from tncompile.compiler import CompiledModel, compile_exported, compile_file
from tncompile.errors import CheckError
from tncompile.frontend.onnx.importer import import_onnx
from tncompile.ir import Array, Switch
from tncompile.runtime.reference import OnnxReference, widened
from tncompile.runtime.session import Session


def compiled(proto: onnx.ModelProto, **options: object) -> CompiledModel:
    return compile_exported(import_onnx(proto.SerializeToString()), batch=(1, 4), **options)  # type: ignore[arg-type]


def agrees(proto: onnx.ModelProto, result: CompiledModel, feeds: Mapping[str, Array], tolerance: float = 2e-5) -> None:
    """The compiled file against onnx's reference on the original."""
    found = Session(result.onnx).run(feeds)
    assert [*found] == [v.name for v in proto.graph.output]
    for ours, theirs in zip(found.values(), expected(proto, feeds), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def operators(data: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_model_from_string(data).graph.node]


def interface(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {w.name for w in proto.graph.initializer}
    return [*(v for v in proto.graph.input if v.name not in weights), *proto.graph.output]


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 15, 17, 18, 20, 21])
def test_every_operator_set(opset: int) -> None:
    proto = tt_chain(opset)
    if opset == 7:  # as exporters of that time wrote it: weights are inputs too
        proto.ir_version = 3
        for w in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(w.name, w.data_type, w.dims))
    result = compiled(proto)
    assert operators(result.onnx) == ["Gemm", "Relu", "Gemm"]
    out = onnx.load_model_from_string(result.onnx)
    assert interface(out) == interface(proto)
    assert out.opset_import[0].version == max(opset, 18)
    agrees(proto, result, {"x": RNG.standard_normal((3, 16)).astype(np.float32)})
    assert result.report.check is not None and not result.report.check.note
    assert result.report.check.outputs[0].baseline == "the original file's"


def test_an_einsum_of_many_operands_is_ordered_and_its_original_is_never_run_left_to_right() -> None:
    """17 billion products from left to right, a few thousand in a good order."""
    letters, rank = "abcdefgh", 16
    cores = [weight(f"w{k}", 4, rank) for k in range(len(letters))]
    equation = "n" + letters + "," + ",".join(f"{c}{d}" for c, d in zip(letters, "zyxwvuts", strict=True)) + "->nz"
    operands = " ".join(["x", *(c.name for c in cores)])
    x = tensor("x", ["N", *(4,) * len(letters)])
    proto = model([node("Einsum", operands, "y", equation=equation)], [x], [tensor("y", ["N", rank])], cores)
    result = compile_exported(import_onnx(proto.SerializeToString()), batch=1)
    assert "Einsum" not in operators(result.onnx)
    assert result.report.check is not None and result.report.check.passed


def branch(op: str, inputs: str, name: str) -> onnx.GraphProto:
    return helper.make_graph([node(op, inputs, name)], name, [], [tensor(name, ["N", 4])])


def with_branches() -> onnx.ModelProto:
    """If and Loop that read values of the main graph: one that a network computes, one constant that one computes."""
    body = helper.make_graph(
        [node("MatMul", "state w2", "m"), node("Add", "m h", "next"), node("Identity", "going", "still")],
        "body",
        [tensor("i", [], TensorProto.INT64), tensor("going", [], TensorProto.BOOL), tensor("state", ["N", 4])],
        [tensor("still", [], TensorProto.BOOL), tensor("next", ["N", 4])],
    )
    nodes = [
        node("MatMul", "x w", "h0"),
        node("Identity", "h0", "h"),
        node("MatMul", "w w", "w2"),
        node("If", "flag", "chosen", then_branch=branch("Add", "h w0", "a"), else_branch=branch("MatMul", "h w2", "b")),
        node("Loop", "three _ chosen", "y", body=body),
    ]
    inputs = [tensor("x", ["N", 4]), tensor("flag", [], TensorProto.BOOL)]
    three = numpy_helper.from_array(np.asarray(3, np.int64), "three")
    weights = [numpy_helper.from_array(0.3 * numpy_helper.to_array(weight("w", 4, 4)), "w"), weight("w0", 4), three]
    return model(nodes, inputs, [tensor("y", ["N", 4])], weights)


@pytest.mark.parametrize("flag", [True, False])
def test_subgraphs_read_the_values_that_took_the_place_of_theirs(flag: bool) -> None:
    proto = with_branches()
    result = compiled(proto)
    assert {"If", "Loop"} <= {*operators(result.onnx)}
    feeds = {"x": RNG.standard_normal((3, 4)).astype(np.float32), "flag": np.asarray(flag)}
    wanted = Session(proto.SerializeToString(), optimize=False).run(feeds)["y"]  # onnx's evaluator has Loop wrong
    np.testing.assert_allclose(Session(result.onnx).run(feeds)["y"], wanted, rtol=1e-5, atol=1e-5)


def test_sizes_of_batch_and_sequence_stay_dynamic_under_their_own_names() -> None:
    nodes = [
        node("Reshape", "x heads", "v"),
        node("Transpose", "v", "t", perm=[0, 2, 1, 3]),
        node("MatMul", "t w", "m"),
        node("Softmax", "m", "s"),
        node("Transpose", "s", "back", perm=[0, 2, 1, 3]),
        node("Reshape", "back flat", "y"),
    ]
    weights = [ints("heads", 0, 0, 2, 4), ints("flat", 0, 0, 8), weight("w", 4, 4)]
    proto = model(nodes, [tensor("x", ["items", "words", 8])], [tensor("y", ["items", "words", 8])], weights)
    result = compiled(proto)
    assert interface(onnx.load_model_from_string(result.onnx)) == interface(proto)
    for shape in ((1, 1, 8), (3, 7, 8)):
        agrees(proto, result, {"x": RNG.standard_normal(shape).astype(np.float32)})


def test_a_plan_for_each_range_of_batches_is_an_if() -> None:
    program = None
    for size in (256, 512, 1024):
        ranks = 2
        cores = [weight("g0", 32, 32, ranks), weight("g1", ranks, size // 32, size // 32)]
        nodes = [
            node("Reshape", "x s", "x3"),
            node("Einsum", "x3 g0 g1", "h", equation="nab,apr,rbq->npq"),
            node("Relu", "h", "y"),
        ]
        shape = ints("s", -1, 32, size // 32)
        proto = model(nodes, [tensor("x", ["N", size])], [tensor("y", ["N", 32, size // 32])], [*cores, shape])
        result = compile_exported(import_onnx(proto.SerializeToString()), batch=(1, 512), check=False)
        agrees(proto, result, {"x": RNG.standard_normal((5, size)).astype(np.float32)}, 1e-4)
        program = result.program if any(isinstance(n, Switch) for n in result.program.nodes) else program


def test_unknown_and_microsoft_operators_are_kept_and_checked_against_onnx_runtime() -> None:
    nodes = [
        node("MatMul", "x w", "h"),
        node("FusedMatMul", "h w", "f", domain="com.microsoft", alpha=0.5),
        node("Mul", "f w0", "y"),
    ]
    proto = model(
        nodes, [tensor("x", ["N", 4])], [tensor("y", ["N", 4])], [weight("w", 4, 4), weight("w0", 4)], com_microsoft=1
    )
    result = compiled(proto)
    assert "FusedMatMul" in operators(result.onnx)
    check = result.report.check
    assert check is not None and check.passed and "onnx's evaluator cannot run the original" in check.note
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    wanted = Session(proto.SerializeToString()).run({"x": x})["y"]
    np.testing.assert_allclose(Session(result.onnx).run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)


def test_weights_inputs_and_one_value_twice_as_outputs() -> None:
    nodes = [node("Add", "x w", "a"), node("Identity", "a", "b"), node("Exp", "w", "e")]
    outputs = [tensor(n, ["N", 3] if n in "ab" else [3]) for n in "abe"] + [tensor("w", [3])]
    proto = model(nodes, [tensor("x", ["N", 3])], outputs, [weight("w", 3)])
    result = compiled(proto)
    assert interface(onnx.load_model_from_string(result.onnx)) == interface(proto)
    agrees(proto, result, {"x": RNG.standard_normal((2, 3)).astype(np.float32)})


def test_the_file_keeps_its_metadata_and_the_same_input_gives_the_same_bytes() -> None:
    proto = tt_chain(18)
    proto.metadata_props.add(key="labels", value="cat,dog")
    proto.doc_string = "a model"
    first = compiled(proto)
    assert compiled(proto).onnx == first.onnx
    out = onnx.load_model_from_string(first.onnx)
    assert {p.key for p in out.metadata_props} == {"labels", "tncompile.program"} and out.doc_string == "a model"
    assert out.producer_name == "tncompile"


def test_what_tncompile_wrote_compiles_again() -> None:
    first = compiled(tt_chain())
    again = compiled(onnx.load_model_from_string(first.onnx))
    assert operators(again.onnx) == operators(first.onnx)
    agrees(onnx.load_model_from_string(first.onnx), again, {"x": RNG.standard_normal((3, 16)).astype(np.float32)})


def test_external_data(tmp_path: Path) -> None:
    proto = tt_chain(18)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.ModelProto.FromString(proto.SerializeToString()), path, save_as_external_data=True, size_threshold=0)
    result = compile_file(path, batch=(1, 4))
    assert len(onnx.load_model_from_string(result.onnx).graph.initializer) and result.report.check is not None
    agrees(proto, result, {"x": RNG.standard_normal((3, 16)).astype(np.float32)})


@pytest.mark.parametrize("dynamo", [True, False])
def test_what_torch_exports_comes_in_through_onnx(dynamo: bool, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(12, 8)
            self.norm = torch.nn.BatchNorm1d(8)
            self.a, self.b = (torch.nn.Parameter(torch.randn(s)) for s in ((4, 3, 2), (2, 2, 3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.norm(self.first(x))).view(-1, 4, 2)
            return torch.einsum("nij,ipr,rjq->npq", h, self.a, self.b).flatten(1)

    torch.manual_seed(0)
    module, x = Model().eval(), torch.randn(3, 12)
    path = tmp_path / "model.onnx"
    if dynamo:
        shapes = ({0: torch.export.Dim("n")},)
        torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    else:
        axes = {"x": {0: "n"}}
        torch.onnx.export(
            module, (x,), path, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes, opset_version=12
        )
    result = compile_file(path, batch=(1, 4))
    assert {*operators(result.onnx)} == {"Gemm", "Relu"} or "Einsum" not in operators(result.onnx)
    wanted = module(x).detach().numpy()
    np.testing.assert_allclose(result.run(x.numpy()), wanted, rtol=1e-5, atol=1e-5)


def test_a_wrong_file_is_found_wrong() -> None:
    proto = tt_chain(18)
    source = import_onnx(proto.SerializeToString())
    other = onnx.ModelProto.FromString(proto.SerializeToString())
    bias = next(w for w in other.graph.initializer if w.name == "b2")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e-3), "b2"))
    assert not compiler.check_session(Session(other.SerializeToString()), source).passed
    assert compiler.check_session(Session(proto.SerializeToString()), source).passed


def test_the_reference_is_float64_throughout() -> None:
    """A float32 model whose sum is lost in float32: 1e8 + 1 - 1e8."""
    nodes = [
        node("Constant", "", "big", value_float=1e8),
        node("Cast", "x", "c", to=TensorProto.FLOAT),
        node("Add", "c big", "a"),
        node("Sub", "a big", "y"),
    ]
    proto = model(nodes, [tensor("x", [1])], [tensor("y", [1])])
    wide = expected(widened(proto), {"x": np.ones(1)})
    assert wide[0].dtype == np.float64 and wide[0] == 1.0
    reference = OnnxReference(import_onnx(proto.SerializeToString()))
    _, plain = reference.run({"x": np.ones(1, np.float32)})
    assert plain[0] != 1.0 and "differ on the original" in reference.note


def test_random_operators_are_refused() -> None:
    nodes = [node("RandomNormalLike", "x", "noise"), node("Add", "x noise", "y")]
    with pytest.raises(CheckError, match="draws random numbers"):
        compiled(model(nodes, [tensor("x", [3])], [tensor("y", [3])]))


def test_the_commands_take_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "given.onnx", tmp_path / "out.onnx"
    path.write_bytes(tt_chain().SerializeToString())
    assert main([str(path), "-o", str(out), "--batch", "1,4"]) == 0
    assert "kept as they are" in capsys.readouterr().out
    assert main(["verify", str(path), str(out)]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["inspect", str(path), "--after", "fold"]) == 0
    assert "= onnx.Relu(" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert main(["bench", str(path), "--batch", "1", "--seconds", "0.05", "--against", "exporter,eager,dense"]) == 0
    shown = capsys.readouterr().out
    assert "the original file" in shown and "without PyTorch" in shown


def test_tune_races_with_the_original_file() -> None:
    result = compiled(tt_chain(), tune=0.5)
    assert "the original file" in str(result.report.settled)
