"""ONNX graphs as programs: what becomes a network, what stays opaque, what is evaluated."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.onnx_input.models import RNG, expected, ints, model, node, tensor, tt_chain, weight
from tncompile.frontend.onnx.importer import OnnxModel, import_onnx
from tncompile.ir import Network, Opaque, Program, evaluate, verify
from tncompile.ir import text as ir_text


def imported(proto: onnx.ModelProto) -> OnnxModel:
    result = import_onnx(proto.SerializeToString())
    verify(result.program)
    assert ir_text.parse(str(result.program), result.program.arrays) == result.program
    return result


def targets(program: Program) -> list[str]:
    return [n.target for n in program.nodes if isinstance(n, Opaque)]


def test_a_chain_of_matmuls_of_cores_is_networks_with_one_relu_between() -> None:
    program = imported(tt_chain()).program
    assert targets(program) == ["onnx.Relu"]
    assert program.inputs[0].shape == ("batch", 16)
    (gemm,) = (n for n in program.networks if n.output.name == "y")
    assert len(gemm.terms) == 2


UNARY = {
    "Neg": ({}, []),
    "Identity": ({}, []),
    "Flatten": ({"axis": 2}, []),
    "Transpose": ({"perm": [2, 0, 1]}, []),
    "Transpose ": ({}, []),
    "Dropout": ({}, []),
    "Reshape": ({}, [ints("p", 0, -1)]),
    "Squeeze": ({}, [ints("p", 1)]),
    "Unsqueeze": ({}, [ints("p", 0, -1)]),
    "Expand": ({}, [ints("p", 2, 1, 5, 4)]),
    "ReduceSum": ({"keepdims": 0}, [ints("p", 2)]),
    "ReduceMean": ({}, [ints("p", -1, 1)]),
    "ReduceSum ": ({}, []),
    "Mul": ({}, [weight("p", 4)]),
    "Div": ({}, [weight("p", 1, 4)]),
    "Add": ({}, [weight("p", 2, 5, 4)]),
    "Sub": ({}, [weight("p", 1)]),
    "Sum": ({}, [weight("p", 5, 1), weight("q", 4)]),
    "Mean": ({}, [weight("p", 4), weight("q", 4)]),
    "Einsum": ({"equation": "...ij, jk -> k...i"}, [weight("p", 4, 2)]),
    "Einsum ": ({"equation": "abc,cd,ed"}, [weight("p", 4, 2), weight("q", 3, 2)]),
    "Conv": ({}, [weight("p", 6, 1, 1), weight("q", 6)]),
    "BatchNormalization": (
        {"epsilon": 0.1},
        [weight(n, 1) for n in "pqr"] + [onnx.numpy_helper.from_array(np.asarray([0.7], np.float32), "v")],
    ),
}


@pytest.mark.parametrize("name", UNARY)
def test_multilinear_operators_are_networks_and_right(name: str) -> None:
    attributes, weights = UNARY[name]
    nodes = [node(name.strip(), " ".join(["x", *(w.name for w in weights)]), "y", **attributes)]
    x = RNG.standard_normal((2, 1, 4)).astype(np.float32)
    shape = list(x.shape)
    proto = model(nodes, [tensor("x", shape)], [tensor("y", None)], weights)
    program = imported(proto).program
    assert targets(program) == []
    (network,) = (n for n in program.nodes if isinstance(n, Network))
    (wanted,) = expected(proto, {"x": x})
    found = evaluate(network, {"x": x.astype(np.float64)})
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "shape", "weights", "attributes"),
    [
        ("Conv", [2, 3, 5, 5], [weight("p", 4, 3, 3, 3)], {"auto_pad": "SAME_UPPER"}),
        ("ConvTranspose", [2, 3, 5, 5], [weight("p", 3, 4, 3, 3)], {}),
        ("Slice", [4, 3], [ints("p", 1), ints("q", 3)], {}),
        ("Slice", [4, 3], [ints("p", -1), ints("q", -(2**31)), ints("r", 0), ints("s", -1)], {}),
        ("ReduceMean", ["N", 3], [ints("p", 0)], {}),
        ("Softmax", [4, 3], [], {}),
        ("Cast", [4, 3], [], {"to": TensorProto.DOUBLE}),
    ],
)
def test_what_is_not_multilinear_is_kept(
    op: str, shape: list[int | str], weights: list[onnx.TensorProto], attributes: dict[str, object]
) -> None:
    nodes = [node(op, " ".join(["x", *(w.name for w in weights)]), "y", **attributes)]
    kind = TensorProto.DOUBLE if op == "Cast" else TensorProto.FLOAT
    program = imported(model(nodes, [tensor("x", shape)], [tensor("y", None, kind)], weights)).program
    assert targets(program) == [f"onnx.{op}"]


def test_what_depends_on_constants_alone_is_evaluated_unless_it_is_large_or_quantized() -> None:
    quantized = onnx.numpy_helper.from_array(RNG.integers(-9, 9, (4, 4)).astype(np.int8), "q8")
    nodes = [
        node("Exp", "w", "e"),
        node("MatMul", "x e", "a"),
        node("ConstantOfShape", "huge", "zeros"),
        node("ReduceMax", "zeros", "top", keepdims=0),
        node("Add", "a top", "b"),
        node("DequantizeLinear", "q8 scale", "wq"),
        node("MatMul", "b wq", "y"),
    ]
    weights = [weight("w", 4, 4), ints("huge", 10**5, 10**5), quantized, weight("scale")]
    program = imported(model(nodes, [tensor("x", ["N", 4])], [tensor("y", ["N", 4])], weights)).program
    assert targets(program) == ["onnx.ConstantOfShape", "onnx.ReduceMax", "onnx.DequantizeLinear"]
    exp = next(t for n in program.networks for t in n.cores if t.name == "e")
    np.testing.assert_allclose(exp.data, np.exp(onnx.numpy_helper.to_array(weights[0])), rtol=1e-6)


def test_a_view_computed_from_shapes_is_a_network() -> None:
    """What torch's old exporter writes for ``x.view(x.size(0), x.size(1), 2, 4)``."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Shape", "x", "s2"),
        node("Gather", "s2 one", "t", axis=0),
        node("Unsqueeze", "n axis", "nu"),
        node("Unsqueeze", "t axis", "tu"),
        node("Concat", "nu tu two four", "target", axis=0),
        node("Reshape", "x target", "v"),
        node("Einsum", "v w", "y", equation="ntij,jk->ntik"),
    ]
    zero, one = (onnx.numpy_helper.from_array(np.asarray(k), n) for k, n in ((0, "zero"), (1, "one")))
    weights = [zero, one, ints("axis", 0), ints("two", 2), ints("four", 4), weight("w", 4, 3)]
    program = imported(model(nodes, [tensor("x", ["N", "T", 8])], [tensor("y", None)], weights)).program
    assert [n.value.shape for n in program.networks] == [("batch", "T", 2, 4), ("batch", "T", 2, 3)]


def test_names_of_sizes() -> None:
    inputs = [
        tensor("ids", ["batch size", "past + 1"]),
        tensor("mask", ["batch size", None]),
        tensor("cache", ["batch size", "past", "2nd", 8]),
    ]
    outputs = [tensor(f"y{k}", None) for k in range(3)]
    result = imported(model([node("Relu", v.name, f"y{k}") for k, v in enumerate(inputs)], inputs, outputs))
    shapes = [v.shape for v in result.program.inputs]
    assert shapes == [("batch", "(past + 1)"), ("batch", "mask_1"), ("batch", "past", "size_2nd", 8)]
    assert {*result.sizes} == {"batch", "past", "mask_1", "size_2nd"}


def test_a_node_with_several_outputs_and_empty_inputs() -> None:
    nodes = [node("Split", "x", "a b", axis=1, num_outputs=2), node("Clip", "a _ top", "c"), node("Mul", "b c", "y")]
    proto = model(nodes, [tensor("x", ["N", 6])], [tensor("y", ["N", 3])], [weight("top")])
    program = imported(proto).program
    assert targets(program) == ["onnx.Split", "operator.getitem", "operator.getitem", "onnx.Clip"]
    clip = program.nodes[3]
    assert isinstance(clip, Opaque) and clip.args[1] is None and clip.output.shape == ("batch", 3)


def test_model_functions_are_inlined() -> None:
    function = helper.make_function(
        "mine", "Double", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 18)]
    )
    proto = model([node("Double", "x", "y", domain="mine")], [tensor("x", [3])], [tensor("y", [3])], mine=1)
    proto.functions.append(function)
    assert targets(imported(proto).program) == []


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_chains_agree_with_onnx(data: st.DataObject) -> None:
    """Random chains of multilinear operators, evaluated as networks in float64, against onnx's own reference."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    x = generator.standard_normal(shape)
    nodes, weights, value = [], [], "x"
    for k in range(data.draw(st.integers(1, 5))):
        op = data.draw(st.sampled_from(["MatMul", "Transpose", "Reshape", "Mul", "Add", "ReduceSum"]))
        out = f"v{k}"
        if op == "MatMul":
            n = data.draw(st.integers(1, 4))
            weights.append(weight(f"w{k}", shape[-1], n, dtype="float64"))
            nodes.append(node(op, f"{value} w{k}", out))
            shape = (*shape[:-1], n)
        elif op == "Transpose":
            perm = data.draw(st.permutations(range(len(shape))))
            nodes.append(node(op, value, out, perm=perm))
            shape = tuple(shape[p] for p in perm)
        elif op == "Reshape":
            shape = (shape[0], math.prod(shape[1:]))
            weights.append(ints(f"w{k}", *shape))
            nodes.append(node(op, f"{value} w{k}", out))
        elif op == "ReduceSum":
            axis = data.draw(st.integers(0, len(shape) - 1))
            weights.append(ints(f"w{k}", axis))
            nodes.append(node(op, f"{value} w{k}", out, keepdims=1))
            shape = tuple(1 if a == axis else n for a, n in enumerate(shape))
        else:
            weights.append(weight(f"w{k}", shape[-1], dtype="float64"))
            nodes.append(node(op, f"{value} w{k}", out))
        value = out
    double = TensorProto.DOUBLE
    proto = model(nodes, [tensor("x", x.shape, double)], [tensor(value, shape, double)], weights)
    program = imported(proto).program
    values = {"x": x}
    for item in program.nodes:
        assert isinstance(item, Network)
        values[item.output.name] = evaluate(item, values)
    (wanted,) = expected(proto, {"x": x})
    np.testing.assert_allclose(values[program.outputs[0][1]], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ["x a h", "a h x", "x h a"])
def test_layer_normalization_and_gelu_in_small_operators_are_recognized(order: str) -> None:
    one, two, three = order.split()
    nodes = [
        node("ReduceMean", "x last", "mean"),
        node("Sub", "x mean", "d"),
        node("Pow", "d two", "square"),
        node("ReduceMean", "square last", "var"),
        node("Add", "var eps", "ve"),
        node("Sqrt", "ve", "std"),
        node("Div", "d std", "n"),
        node("Mul", "n scale", "s"),
        node("Add", "s bias", "g"),
        node("Div", "g root", "r"),
        node("Erf", "r", "e"),
        node("Add", "one e", "a"),
        node("Mul", f"{one} {two}".replace("x", "g"), "p"),
        node("Mul", f"p {three}".replace("x", "g"), "y"),
    ]
    numbers = {"two": 2, "eps": 1e-5, "root": math.sqrt(2), "one": 1, "h": 0.5}
    weights = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in numbers.items()]
    weights += [ints("last", -1), weight("scale", 6), weight("bias", 6)]
    proto = model(nodes, [tensor("x", ["N", 6])], [tensor("y", ["N", 6])], weights)
    assert targets(imported(proto).program) == ["onnx.LayerNormalization", "com.microsoft.Gelu"]
    residual = onnx.ModelProto.FromString(proto.SerializeToString())
    residual.graph.node[8].input[1] = "x"  # what is added is no bias
    assert "onnx.LayerNormalization" not in targets(imported(residual).program)
