"""What the emitter writes: which nodes; and the numbers at several sizes."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import tncompile
from tests.emit.programs import LINEAR, SEQUENCE, TT, count, emit, network
from tests.helpers import compile_program, nodes_of
from tests.test_property import single
from tncompile.passes import Clean, Order

# ------------------------------------------------------------------------------------ nodes


def test_a_layer_is_one_gemm() -> None:
    """Its weight lies transposed in the file, so that nothing is transposed at run time."""
    compiled = emit(network(LINEAR, "batch, 4"))
    assert count(compiled) == {"Gemm": 1}
    (node,) = compiled.model.graph.node
    assert [a.name for a in node.attribute] == []  # no transB, alpha or beta
    shapes = {i.name: tuple(i.dims) for i in compiled.model.graph.initializer}
    assert [shapes.get(name) for name in node.input] == [None, (6, 4), (4,)]


def test_a_layer_over_a_sequence_is_a_matmul_and_an_add() -> None:
    """What ONNX Runtime fuses; no Reshape around it, though two sizes are dynamic."""
    compiled = emit(network(SEQUENCE, "batch, seq, 4", "x: float32[batch, seq, 6]"))
    assert count(compiled) == {"MatMul": 1, "Add": 1}


def test_a_layer_without_a_bias_is_one_matmul() -> None:
    assert count(emit(network(LINEAR, "batch, 4"), **{"fc.bias": 0})) == {"MatMul": 1}


def test_a_product_of_operands() -> None:
    body = """
indices b=batch, h=4, q=32, k=48, d=64
term
  0 operand x[b, h, q, d]
  1 operand z[b, h, k, d]
-> y[b, h, q, k]
"""
    inputs = "x: float32[batch, 4, 32, 64]; z: float32[batch, 4, 48, 64]"
    found = count(emit(network(body, "batch, 4, 32, 48", inputs)))
    assert (found["MatMul"], found["Transpose"]) == (1, 1)
    assert {*found} <= {"MatMul", "Transpose", "Reshape"}


@pytest.mark.parametrize("body", [LINEAR, TT], ids=["linear", "tt"])
def test_constants_are_on_the_right_of_every_matmul(body: str) -> None:
    """There ONNX Runtime packs them when it loads the model."""
    wide = "batch, 4" if body is LINEAR else "batch, 24"
    compiled = emit(
        network(body, wide, f"x: float32[batch, {6 if body is LINEAR else 24}]"), (Clean(), Order(margin=-0.99))
    )
    constants = {i.name for i in compiled.model.graph.initializer}
    for node in nodes_of(compiled.model.graph):
        if node.op_type in ("MatMul", "Gemm"):
            assert node.input[0] not in constants
            assert node.input[1] in constants


class Turned(nn.Module):
    """A dense layer over what lies before the last axis."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.dense, self.shown = nn.Linear(16, 64, bias=False), shown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x.transpose(1, 2))
        return y if self.shown else torch.relu(y)


@pytest.mark.parametrize(
    ("batch", "rows", "shown", "dynamic", "fuses"),
    [
        (1, 3, False, "batch", True),
        (256, 3, False, "batch", False),
        (64, 1000, True, "batch", True),  # to bring the rows back into two axes would copy the output
        (256, 3, False, "all", True),  # two dynamic sizes do not become one axis without arithmetic
    ],
)
def test_a_turned_operand_of_many_products_is_one_matrix(
    batch: int, rows: int, shown: bool, dynamic: str, fuses: bool
) -> None:
    """ONNX Runtime turns what a Transpose gives a MatMul in each product of it; a Reshape between keeps them apart."""
    module, x = Turned(shown).eval(), torch.randn(2, 16, rows)
    sizes = {0: torch.export.Dim("batch"), **({2: torch.export.Dim("rows")} if dynamic == "all" else {})}
    result = tncompile.compile(module, (x,), batch=batch, dynamic_shapes=(sizes,))
    torch.testing.assert_close(torch.from_numpy(result.run(x)), module(x), rtol=1e-4, atol=1e-5)
    graph = onnx.load_model_from_string(result.onnx).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    (product,) = (node for node in graph.node if node.op_type == "MatMul")
    assert made[product.input[0]] == ("Transpose" if fuses else "Reshape")


@pytest.mark.parametrize("first", [0, 20])
def test_one_dynamic_size_needs_no_shape_arithmetic(first: int) -> None:
    """A Reshape with one -1 does it, whatever the network."""
    for seed in range(first, first + 20):
        compiled = compile_program(single(seed, symbols=("batch",)))
        arithmetic = {"Shape", "Gather", "Concat", "Div", "Range", "ConstantOfShape"} & {*count(compiled)}
        assert not arithmetic, f"seed {seed}: {arithmetic}"


def test_a_view_is_one_reshape() -> None:
    body = """
indices b=batch, i=2, j=3
term
  0 operand x[b, (i j)]
-> y[b, i, j]
"""
    assert count(emit(network(body, "batch, 2, 3"))) == {"Reshape": 1}


def test_a_permute_is_one_transpose() -> None:
    body = """
indices b=batch, i=2, j=3, k=4
term
  0 operand x[b, i, j, k]
-> y[b, k, j, i]
"""
    assert count(emit(network(body, "batch, 4, 3, 2", "x: float32[batch, 2, 3, 4]"))) == {"Transpose": 1}


def test_a_sum_is_one_reduction() -> None:
    body = """
indices b=batch, i=6
term
  0 operand x[b, i]
-> y[b]
"""
    assert count(emit(network(body, "batch"))) == {"ReduceSum": 1}


def test_axes_apart_are_summed_one_after_the_other() -> None:
    """ONNX Runtime sums neighbours in order, and others with a stride for each element."""
    body = """
indices b=batch, i=3, j=4, k=5, l=6
term
  0 operand x[b, i, j, k, l]
-> y[b, j]
"""
    compiled = emit(network(body, "batch, 4", "x: float32[batch, 3, 4, 5, 6]"))
    axes = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in compiled.model.graph.initializer}
    sums = [node for node in compiled.model.graph.node if node.op_type == "ReduceSum"]
    assert [axes[node.input[1]] for node in sums] == [[3, 4], [1]]


def test_a_sum_over_the_batch() -> None:
    body = """
indices i=6, b=batch
term
  0 operand x[b, i]
-> y[i]
"""
    assert count(emit(network(body, "6"))) == {"ReduceSum": 1}


def test_a_scale_is_one_multiplication() -> None:
    body = """
indices b=batch, i=6
term
  0 operand x[b, i]
  1 core s[i]
-> y[b, i]
"""
    assert count(emit(network(body, "batch, 6"))) == {"Mul": 1}


def test_an_outer_product() -> None:
    body = """
indices b=batch, i=6, j=3
term
  0 operand x[b, i]
  1 operand z[b, j]
-> y[b, i, j]
"""
    compiled = emit(network(body, "batch, 6, 3", "x: float32[batch, 6]; z: float32[batch, 3]"))
    assert not {"Transpose", "Expand"} & {*count(compiled)}


@pytest.mark.parametrize(
    ("axes", "shape", "output"),
    [
        ("x[b, k, k]", "batch, 3, 3", "y[b, k]"),
        ("x[k, b, k]", "3, batch, 3", "y[b, k]"),
        ("x[b, k, k]", "batch, 3, 3", "y[b]"),
        ("x[b, k, k, k]", "batch, 3, 3, 3", "y[k, b]"),
        ("x[b, (k i k)]", "batch, 18", "y[i, b, k]"),
        ("x[b, (k i k), i]", "batch, 18, 2", "y[(i k), b]"),
    ],
)
def test_diagonals_and_traces(axes: str, shape: str, output: str) -> None:
    sizes = {"b": "batch", "k": "3", "i": "2"}
    used = [n for n in sizes if n in axes]
    wide = output[2:-1].replace("(i k)", "6")
    wide = ", ".join(sizes.get(n, n) for n in wide.split(", "))
    body = f"indices {', '.join(f'{n}={sizes[n]}' for n in used)}\nterm\n  0 operand {axes}\n-> {output}"
    emit(network(body, wide, f"x: float32[{shape}]"))


def test_an_expand_of_what_flows_in() -> None:
    body = """
indices b=batch, n=5, i=6
term
  0 operand x[b, i]
-> y[b, n, i]
"""
    emit(network(body, "batch, 5, 6"))


# ------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_a_contraction_of_channels_in_other_dtypes(dtype: str) -> None:
    """What is a 1x1 convolution in float32; ONNX Runtime has none in float64."""
    body = """
indices b=batch, o=4, h=3, w=5, i=6
term
  0 operand x[b, i, h, w]
  1 core W[o, i]
term
  0 core c[o]
-> y[b, o, h, w]
"""
    compiled = emit(network(body, "batch, 4, 3, 5", f"x: {dtype}[batch, 6, 3, 5]", dtype))
    assert "Conv" not in count(compiled) or dtype == "float16"


def test_a_contraction_of_channels_is_a_convolution() -> None:
    body = """
indices b=batch, o=4, h=3, w=5, i=6
term
  0 operand x[b, i, h, w]
  1 core W[o, i]
term
  0 core c[o]
-> y[b, o, h, w]
"""
    assert count(emit(network(body, "batch, 4, 3, 5", "x: float32[batch, 6, 3, 5]"))) == {"Conv": 1}


def test_a_scaled_product_of_operands_is_exact_in_float64() -> None:
    """ONNX Runtime fuses a factor that is a number into the matmul, where it becomes a float32."""
    body = """
indices b=batch, q=32, k=48, d=64
term
  0 operand x[b, q, d]
  1 operand z[b, k, d]
  2 core scale[]
-> y[b, q, k]
"""
    inputs = "x: float64[batch, 32, 64]; z: float64[batch, 48, 64]"
    compiled = emit(network(body, "batch, 32, 48", inputs, "float64"), scale=0.1)
    assert count(compiled)["MatMul"] == 1
