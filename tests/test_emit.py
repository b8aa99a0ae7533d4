"""What the emitter writes: which nodes, which initializers, which names; and the numbers at several sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from tests.helpers import Compiled, assert_exact, compile_program, feeds_for, nodes_of, program_of, reference
from tests.test_property import single
from tncompile.emit.program import to_onnx
from tncompile.errors import SourceRef
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Network, Program
from tncompile.ir import text as ir_text
from tncompile.passes import Clean, Context, Order, Pipeline

RUNS = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 5}, {"batch": 4, "seq": 2})
ROUNDINGS = 64


def emit(text: str, passes: tuple[Clean | Order, ...] | None = None, **fill: float) -> Compiled:
    """Compile a program and compare it with numpy at three sizes."""
    program = program_of(text, **fill)
    context = Context(batches=(1, 7), sizes={"seq": 5})
    compiled = compile_program(program, context) if passes is None else compile_program(program, context, passes)
    for symbols in RUNS:
        feeds = feeds_for(program, symbols)
        found = compiled.run(feeds)
        expected, magnitude = (reference(program, feeds, symbols, absolute) for absolute in (False, True))
        for (_, name), (public, array) in zip(program.outputs, found.items(), strict=True):
            dtype = program.values[name].dtype
            what = f"{public} at {symbols}"
            assert_exact(array, expected[name], magnitude[name], dtype, roundings=ROUNDINGS, what=what)
    return compiled


def count(compiled: Compiled) -> Counter[str]:
    """How often each operator is in the file."""
    return Counter(node.op_type for node in nodes_of(compiled.model.graph))


def network(body: str, shape: str, inputs: str = "x: float32[batch, 6]", dtype: str = "float32") -> str:
    """The text of a program of one network ``y``; `inputs` are separated by semicolons."""
    lines = [f"  input {i.strip()}" for i in inputs.split(";")]
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return "\n".join(["program", *lines, f"  network y: {dtype}[{shape}], layer fc", indented, "  output out = y"])


LINEAR = """\
indices b=batch, o=4, i=6
term
  0 operand x[b, i]
  1 core fc.weight[o, i]
term
  0 core fc.bias[o]
-> y[b, o]
"""

SEQUENCE = """\
indices b=batch, s=seq, o=4, i=6
term
  0 operand x[b, s, i]
  1 core fc.weight[o, i]
term
  0 core fc.bias[o]
-> y[b, s, o]
"""

TT = """\
indices b=batch, o0=4, o1=3, o2=2, i0=2, i1=3, i2=4, r=2, s=2
term
  0 operand x[b, (i0 i1 i2)]
  1 core A[i0, o0, r]
  2 core B[r, i1, o1, s]
  3 core C[s, i2, o2]
-> y[b, (o0 o1 o2)]
"""


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


# ------------------------------------------------------------------------------------ dynamic sizes

TWO = "x: float32[batch, seq, 6]"


@pytest.mark.parametrize(
    ("inputs", "operand", "output", "shape"),
    [
        (TWO, "x[b, s, i]", "y[(b s), i]", "batch*seq, 6"),
        (TWO, "x[b, s, i]", "y[(s b), i]", "batch*seq, 6"),
        (TWO, "x[b, s, i]", "y[(b i), s]", "6*batch, seq"),
        (TWO, "x[b, s, i]", "y[i, (s b)]", "6, batch*seq"),
        (TWO, "x[b, s, i]", "y[(b s i)]", "6*batch*seq"),
        (TWO, "x[b, s, i]", "y[(s i), b]", "6*seq, batch"),
        ("x: float32[6*batch, seq]", "x[(b i), s]", "y[i, s, b]", "6, seq, batch"),
        ("x: float32[6*batch, seq]", "x[(i b), s]", "y[(b s), i]", "batch*seq, 6"),
    ],
)
def test_views_of_two_dynamic_sizes(inputs: str, operand: str, output: str, shape: str) -> None:
    body = f"indices b=batch, s=seq, i=6\nterm\n  0 operand {operand}\n-> {output}"
    emit(network(body, shape, inputs))


@pytest.mark.parametrize(
    ("operand", "output", "shape"),
    [
        ("h[(b s), i]", "y[b, s, i]", "batch, seq, 6"),
        ("h[(b s), i]", "y[s, b, i]", "seq, batch, 6"),
        ("h[(b s), i]", "y[b, i, s]", "batch, 6, seq"),
        ("h[(b s), i]", "y[(s i), b]", "6*seq, batch"),
        ("h[(b s), i]", "y[b, i]", "batch, 6"),
        ("h[(b s), i]", "y[s]", "seq"),
    ],
)
def test_a_merged_axis_is_split_again(operand: str, output: str, shape: str) -> None:
    """``h.view(batch, seq, -1)`` behind a nonlinear layer on ``(batch * seq)`` rows: only the model's inputs tell
    what the two sizes are."""
    text = f"""
program
  input x: float32[batch, seq, 6]
  network h: float32[batch*seq, 6]
    indices b=batch, s=seq, i=6
    term
      0 operand x[b, s, i]
    -> h[(b s), i]
  network y: float32[{shape}]
    indices b=batch, s=seq, i=6
    term
      0 operand {operand}
    -> {output}
  output h = h
  output y = y
"""
    emit(text, (Clean(), Order()))


def test_a_merged_axis_of_a_derived_size_is_split_again() -> None:
    """Rows of (batch, seq + 1), as behind a class token that was put before a sequence."""
    text = """
program
  input x: float32[batch, seq, 1]
  input h: float32["(seq + 1)*batch", 6]
  network y: float32[batch, "(seq + 1)", 6]
    indices b=batch, t="(seq + 1)", i=6
    term
      0 operand h[(b t), i]
    -> y[b, t, i]
  output y = y
"""
    emit(text, (Clean(), Order()))


def test_a_layer_on_rows_of_two_sizes() -> None:
    body = """
indices b=batch, s=seq, o=4, i=6
term
  0 operand x[b, s, i]
  1 core W[o, i]
term
  0 core bias[o]
-> y[(b s), o]
"""
    emit(network(body, "batch*seq, 4", TWO))


def test_batch_modes_of_a_core_before_two_dynamic_sizes() -> None:
    """A matmul for each group, with two dynamic sizes that no Reshape may join."""
    body = """
indices g=3, b=batch, s=seq, o=4, i=2
term
  0 operand x[g, b, s, i]
  1 core W[g, o, i]
-> y[g, b, s, o]
"""
    emit(network(body, "3, batch, seq, 4", "x: float32[3, batch, seq, 2]"))


@pytest.mark.parametrize("output", ["y[b, s, g, o]", "y[g, b, o, s]", "y[b, g, s, o]", "y[s, g, o, b]"])
def test_groups_and_two_dynamic_sizes_in_any_order(output: str) -> None:
    sizes = {"b": "batch", "s": "seq", "g": "3", "o": "4"}
    shape = ", ".join(sizes[n] for n in output[2:-1].split(", "))
    body = f"""
indices b=batch, s=seq, g=3, o=4, i=2, r=2
term
  0 operand x[b, s, (g i)]
  1 core W[g, i, r]
  2 core V[g, r, o]
-> {output}
"""
    emit(network(body, shape, TWO), (Clean(), Order(margin=-0.99)))


def test_attention_scores_of_two_dynamic_sizes() -> None:
    body = """
indices b=batch, h=2, q=seq, k=seq, d=3
term
  0 operand x[b, q, (h d)]
  1 operand z[b, k, (h d)]
-> y[b, h, q, k]
"""
    emit(network(body, "batch, 2, seq, seq", f"{TWO}; z: float32[batch, seq, 6]"))


# ------------------------------------------------------------------------------------ biases and sums


@pytest.mark.parametrize(
    ("bias", "output", "shape"),
    [
        ("c[p]", "y[b, p, q]", "batch, 3, 4"),
        ("c[q]", "y[b, p, q]", "batch, 3, 4"),
        ("c[p, q]", "y[b, p, q]", "batch, 3, 4"),
        ("c[q, p]", "y[b, (p q)]", "batch, 12"),
        ("c[p]", "y[b, (p q)]", "batch, 12"),
        ("c[q]", "y[(p q), b]", "12, batch"),
        ("c[q]", "y[(b p), q]", "3*batch, 4"),
        ("c[p]", "y[(b p), q]", "3*batch, 4"),
        ("c[]", "y[b, p, q]", "batch, 3, 4"),
        ("c[]", "y[(p q b)]", "12*batch"),
        ("c[()]", "y[q, (p b)]", "4, 3*batch"),
        ("c[n]", "y[b, p, q, n]", "batch, 3, 4, 2"),
        ("c[p, n]", "y[n, (b p), q]", "2, 3*batch, 4"),
    ],
)
def test_biases(bias: str, output: str, shape: str) -> None:
    extra = ", n=2" if "n" in bias else ""
    body = f"""
indices b=batch, p=3, q=4, i=6{extra}
term
  0 operand x[b, i]
  1 core W[i, p, q]
term
  0 core {bias}
-> {output}
"""
    emit(network(body, shape))


def test_a_number_added_where_the_dynamic_size_is_last() -> None:
    """The bias is no vector there, for its length would be the batch's."""
    body = """
indices o=4, b=batch, i=6
term
  0 operand x[b, i]
  1 core W[o, i]
term
  0 core c[]
-> y[o, b]
"""
    emit(network(body, "4, batch"))


def test_a_residual() -> None:
    body = """
indices b=batch, o=6, i=6
term
  0 operand x[b, i]
  1 core W[o, i]
term
  0 operand x[b, o]
term
  0 core c[o]
-> y[b, o]
"""
    compiled = emit(network(body, "batch, 6"))
    assert count(compiled) == {"Gemm": 1, "Add": 1}


def test_terms_that_lack_output_indices() -> None:
    body = """
indices b=batch, i=6, n=2, j=6
term
  0 operand x[b, i]
term
  0 operand x[b, j]
  1 core W[j, n]
term
  0 core c[n]
-> y[b, n, i]
"""
    emit(network(body, "batch, 2, 6"))


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


# ------------------------------------------------------------------------------------ initializers


def test_equal_arrays_are_stored_once() -> None:
    """A tied weight that is used in one order; and two weights of the same numbers."""
    text = """
program
  input x: float32[batch, 4]
  network h: float32[batch, 4], layer a
    indices b=batch, o=4, i=4
    term
      0 operand x[b, i]
      1 core W[i, o]
    -> h[b, o]
  network y: float32[batch, 4], layer b
    indices b=batch, o=4, i=4
    term
      0 operand h[b, i]
      1 core W[i, o]
    -> y[b, o]
  network z: float32[batch, 4], layer c
    indices b=batch, o=4, i=4
    term
      0 operand h[b, i]
      1 core V[i, o]
    -> z[b, o]
  output h = h
  output y = y
  output z = z
"""
    program = program_of(text)
    same = program_of(text, V=program.arrays["W"])
    different = program_of(text)
    for given, stored in ((same, 1), (different, 2)):
        model = compile_program(given, passes=(Order(),)).model
        assert sum(tuple(i.dims) == (4, 4) for i in model.graph.initializer) == stored


def test_the_numbers_in_the_file_are_the_weights() -> None:
    program = program_of(network(LINEAR, "batch, 4"))
    model = compile_program(program).model
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    (weight,) = [a for n, a in arrays.items() if n.startswith("fc.weight")]
    np.testing.assert_array_equal(weight, program.arrays["fc.weight"].T)
    np.testing.assert_array_equal(arrays["fc.bias"], program.arrays["fc.bias"])


def test_nothing_is_stored_that_nothing_reads() -> None:
    model = emit(network(TT, "batch, 24", "x: float32[batch, 24]")).model
    read = {name for node in nodes_of(model.graph) for name in node.input} | {o.name for o in model.graph.output}
    assert {i.name for i in model.graph.initializer} <= read


# ------------------------------------------------------------------------------------ names


def test_the_interface_has_the_models_own_names() -> None:
    model = emit(network(SEQUENCE, "batch, seq, 4", TWO)).model
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("x", "out")
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert dims == ["batch", "seq", 6]
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["batch", "seq", 4]


def test_nodes_tell_their_layer_bonds_and_source() -> None:
    program = program_of(network(TT, "batch, 24", "x: float32[batch, 24]"))
    (node,) = program.networks
    source = SourceRef("net.fc", "model.py", 12, "y = self.fc(x)")
    labelled = Network("net.fc", node.terms, node.output, node.dtype, source)
    program = Program(program.inputs, (labelled,), program.outputs)
    compiled = compile_program(program, passes=(Order(margin=-0.99),))
    assert len({n.name for n in compiled.model.graph.node}) == len(compiled.model.graph.node)
    for onnx_node in compiled.model.graph.node:
        assert onnx_node.name.startswith("net.fc/")
        told = {p.key: p.value for p in onnx_node.metadata_props}
        assert told["tncompile.layer"] == "net.fc"
        assert told["tncompile.network"] == "y"
        assert told["tncompile.source"] == "model.py:12"
        left = {n for c in compiled.program.networks[0].cores for i in c.indices if (n := i.name) in "rs"}
        assert told.get("tncompile.bonds", "") == " ".join(f"{b}=2" for b in sorted(left))


def test_the_file_carries_its_program() -> None:
    compiled = emit(network(TT, "batch, 24", "x: float32[batch, 24]"))
    (text,) = [p.value for p in compiled.model.metadata_props if p.key == "tncompile.program"]
    assert text == ir_text.dump(compiled.program)
    assert ir_text.parse(text, compiled.program.arrays) == compiled.program
    assert compiled.model.producer_name == "tncompile"


@pytest.mark.parametrize("name", ["out", "fc/MatMul", "fc/MatMul:out", "shape_nx4"])
def test_a_weight_may_have_any_name(name: str) -> None:
    """That of an output of the model, or of a node or a constant that the emitter writes."""
    text = network(LINEAR.replace("fc.weight", "W"), "batch, 4")
    program = program_of(text)
    (node,) = program.networks
    moving, bias = node.terms
    x, core = moving.tensors
    renamed = type(core)(name, core.axes, core.data)
    terms = (type(moving)((x, renamed)), bias)
    program = Program(program.inputs, (Network(node.name, terms, node.output, node.dtype),), program.outputs)
    compiled = compile_program(program)
    feeds = feeds_for(program, RUNS[1])
    expected, magnitude = (reference(program, feeds, RUNS[1], absolute)["y"] for absolute in (False, True))
    assert_exact(compiled.run(feeds)["out"], expected, magnitude, "float32", roundings=ROUNDINGS)


def test_layers_of_one_name_have_nodes_of_their_own() -> None:
    text = """
program
  input x: float32[batch, 4]
  network h: float32[batch, 4], layer fc
    indices b=batch, o=4, i=4
    term
      0 operand x[b, i]
      1 core W[i, o]
    -> h[b, o]
  network y: float32[batch, 4], layer fc
    indices b=batch, o=4, i=4
    term
      0 operand h[b, i]
      1 core W[i, o]
    -> y[b, o]
  output h = h
  output y = y
"""
    names = [n.name for n in emit(text, (Order(),)).model.graph.node]
    assert names == ["fc/MatMul", "fc/MatMul.2"]


# ------------------------------------------------------------------------------------ outputs


def test_an_input_is_shown_as_it_is() -> None:
    text = "program\n  input x: float32[batch, 4]\n  output same = x\n  output again = x\n"
    emit(text)


def test_an_output_that_is_called_as_an_input() -> None:
    text = network(LINEAR, "batch, 4").replace("output out", "output x")
    compiled = emit(text)
    assert [o.name for o in compiled.model.graph.output] == ["x_out"]


def test_one_value_under_two_names() -> None:
    compiled = emit(network(LINEAR, "batch, 4") + "\n  output twice = y")
    assert [o.name for o in compiled.model.graph.output] == ["out", "twice"]


def test_outputs_that_are_called_as_other_values() -> None:
    """The names of two values, swapped."""
    text = """
program
  input x: float32[batch, 4]
  network a: float32[batch, 4]
    indices b=batch, o=4, i=4
    term
      0 operand x[b, i]
      1 core W[i, o]
    -> a[b, o]
  network c: float32[batch, 4]
    indices b=batch, o=4, i=4
    term
      0 operand a[b, i]
      1 core V[i, o]
    -> c[b, o]
  output c = a
  output a = c
"""
    emit(text, (Order(),))


def test_a_network_of_cores_alone() -> None:
    text = """
program
  input x: float32[batch, 4]
  network w: float32[3, 4]
    indices i=3, o=4, r=2
    term
      0 core A[i, r]
      1 core B[r, o]
    term
      0 core c[o]
    -> w[i, o]
  output w = w
  output x = x
"""
    compiled = emit(text)
    assert not {"MatMul", "Gemm", "Add"} & {*count(compiled)}


def test_a_network_without_a_schedule_is_refused() -> None:
    program = program_of(network(LINEAR, "batch, 4"))
    with pytest.raises(ValueError, match="fc: a term has no schedule"):
        to_onnx(program, TracedModel(None, program, {}))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ the file


def test_the_same_program_gives_the_same_bytes() -> None:
    def once() -> bytes:
        program = program_of(network(TT, "batch, 24", "x: float32[batch, 24]"))
        scheduled, _ = Pipeline().run(program, Context())
        model = onnx_ir.to_proto(to_onnx(scheduled, TracedModel(None, program, {})))  # type: ignore[arg-type]
        return bytes(model.SerializeToString(deterministic=True))

    assert once() == once()


def test_the_opset_is_one_that_old_runtimes_know() -> None:
    model = emit(network(LINEAR, "batch, 4")).model
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    assert onnx.helper.find_min_ir_version_for([*model.opset_import]) <= model.ir_version
