"""The file: its initializers, its names, its outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from tests.emit.programs import LINEAR, ROUNDINGS, RUNS, SEQUENCE, TT, TWO, count, emit, network
from tests.helpers import assert_exact, compile_program, feeds_for, nodes_of, program_of, reference
from tncompile.emit.program import to_onnx
from tncompile.errors import SourceRef
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Network, Program
from tncompile.ir import text as ir_text
from tncompile.passes import Context, Order, Pipeline

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
