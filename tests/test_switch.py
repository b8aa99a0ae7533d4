"""Switches in ONNX: the right branch at every batch size, the numbers, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch

from tests.helpers import (
    assert_close,
    assert_exact,
    assert_plain,
    evaluate_program,
    feeds_for,
    nodes_of,
    program_of,
    reference,
    session_of,
)
from tests.passes.test_choice import FLIPS
from tncompile.emit.file import write
from tncompile.emit.program import to_onnx
from tncompile.frontend.importer import TracedModel, import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Network, Opaque, Program, Switch, Tree, verify
from tncompile.passes import Context, Pipeline
from tncompile.passes.plans import merge_constants, scheduler
from tncompile.runtime.optimized import optimized as optimized_operators

DENSE: Tree = (0, (1, 2))
FIRST: Tree = ((0, 1), 2)
LAST: Tree = ((0, 2), 1)

LAYER = """\
  network {y}: {dtype}[{batch}, 30], layer {y}
    indices {group}, i={i}, j={j}, o=5, p=6, r=3
    term
      0 operand {x}[{axis}, (i j)]
      1 core {y}.a[i, r, o]
      2 core {y}.c[r, j, p]
    term
      0 core {y}.bias[(o p)]
    -> {y}[{axis}, (o p)]
"""


def layers(*sizes: tuple[int, int], dtype: str = "float32", batch: str = "batch") -> Program:
    """Layers one after another, each from i*j numbers to 30."""
    group, axis = ("b=batch", "b") if batch == "batch" else ("f=4, b=batch", "(f b)")
    text, x = f"program\n  input x: {dtype}[{batch}, {sizes[0][0] * sizes[0][1]}]\n", "x"
    for k, (i, j) in enumerate(sizes):
        text += LAYER.format(x=x, y=f"y{k}", i=i, j=j, dtype=dtype, batch=batch, group=group, axis=axis)
        x = f"y{k}"
    return program_of(text + f"  output out = {x}\n")


def scheduled(network: Network, tree: Tree) -> Network:
    """The network with its first term in some order."""
    term = merge_constants(network, network.terms[0], tree)
    steps = scheduler(network, term, Context(), 8).schedule(term.order).steps
    return replace(network, terms=(replace(term, steps=steps), *network.terms[1:]))


def switched(program: Program, *ways: tuple[Sequence[int], Sequence[Tree]]) -> Program:
    """The program with each network as a switch: its limits, and the tree of each of its cases."""
    nodes = []
    for node, (limits, trees) in zip(program.nodes, ways, strict=True):
        assert isinstance(node, Network)
        nodes.append(Switch("batch", tuple(limits), tuple(scheduled(node, tree) for tree in trees)))
    after = replace(program, nodes=tuple(nodes))
    verify(after, "scheduled")
    return after


def emitted(program: Program) -> onnx.ModelProto:
    model = onnx_ir.to_proto(to_onnx(program, TracedModel(None, program, {})))  # type: ignore[arg-type]
    assert_plain(model)
    return model


def compare(traced: Program, program: Program, batches: Sequence[int]) -> onnx.ModelProto:
    """Run an emitted program at several batch sizes against numpy on what was traced."""
    model = emitted(program)
    dtype = traced.inputs[0].dtype
    session = session_of(model.SerializeToString(), layouts=dtype != "float16")
    for batch in batches:
        symbols = {"batch": batch}
        feeds = feeds_for(traced, symbols)
        (found,) = session.run(None, feeds)
        ((_, name),) = traced.outputs
        want, magnitude = (reference(traced, feeds, symbols, absolute)[name] for absolute in (False, True))
        assert_exact(found, want, magnitude, dtype, roundings=64, what=f"batch {batch}")
    return model


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs of a graph, at any depth."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from graphs(attribute.g)


def count(model: onnx.ModelProto, operator: str) -> int:
    return sum(node.op_type == operator for node in nodes_of(model.graph))


# --- the numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_two_cases(dtype: str) -> None:
    traced = layers((4, 6), dtype=dtype)
    model = compare(traced, switched(traced, ((4,), (FIRST, DENSE))), (1, 3, 4, 5, 40))
    assert (count(model, "If"), count(model, "LessOrEqual")) == (1, 1)


def test_three_cases() -> None:
    traced = layers((4, 6))
    model = compare(traced, switched(traced, ((2, 7), (FIRST, LAST, DENSE))), (1, 2, 3, 6, 7, 8, 50))
    assert (count(model, "If"), count(model, "LessOrEqual")) == (2, 2)


def test_a_batch_that_the_input_shows_four_times() -> None:
    traced = layers((4, 6), batch="4*batch")
    model = compare(traced, switched(traced, ((2, 7), (FIRST, LAST, DENSE))), (1, 2, 3, 7, 8))
    compared = {int(onnx.numpy_helper.to_array(i)[0]) for i in model.graph.initializer if i.name.startswith("size_")}
    assert compared == {8, 28}


def test_conditions_are_shared_and_stand_outside() -> None:
    traced = layers((4, 6), (5, 6), (3, 10))
    program = switched(traced, ((2,), (FIRST, DENSE)), ((2, 7), (FIRST, LAST, DENSE)), ((7, 9), (LAST, FIRST, DENSE)))
    model = compare(traced, program, (1, 2, 3, 7, 8, 9, 10))
    assert count(model, "If") == 5
    outside = [node.op_type for node in model.graph.node]
    assert outside.count("LessOrEqual") == count(model, "LessOrEqual") == 3  # for 2, 7 and 9
    assert outside.count("Shape") == count(model, "Shape") == 3
    assert outside.count("If") == 3
    names = [node.name for node in nodes_of(model.graph)]
    assert len({*names}) == len(names)


@pytest.mark.parametrize(("batch", "served"), [(1, 1), (2, 1), (3, 2), (7, 2), (8, 3), (100, 3)])
def test_the_case_that_runs_is_the_one_that_serves(batch: int, served: int) -> None:
    """Cases that do not compute the same: their numbers tell which of them ran."""
    traced = layers((4, 6))
    program = switched(traced, ((2, 7), (FIRST, FIRST, FIRST)))
    (switch,) = program.nodes
    assert isinstance(switch, Switch)
    (bias,) = switch.cases[0].terms[1].tensors
    cases = []
    for number, case in enumerate(switch.cases, start=1):
        constant = replace(bias, name=f"bias_{number}", data=np.full(30, number, np.float32))
        cases.append(replace(case, terms=(case.terms[0], replace(case.terms[1], tensors=(constant,)))))
    session = session_of(emitted(replace(program, nodes=(replace(switch, cases=tuple(cases)),))).SerializeToString())
    (found,) = session.run(None, {"x": np.zeros((batch, 24), np.float32)})
    np.testing.assert_array_equal(found, np.full((batch, 30), served, np.float32))


def test_a_case_that_is_its_operand_or_a_constant() -> None:
    """A branch must have a node of its own for its result."""
    text = """\
program
  input x: float32[batch, 4]
  switch batch <= 2
    network y: float32[batch, 4]
      indices b=batch, i=4
      term
        0 operand x[b, i]
        steps
      -> y[b, i]
    network y: float32[batch, 4]
      indices b=batch, i=4
      term
        0 operand x[b, i]
        1 core one[i]
        order (0 1)
        steps
          2 = multiply(0, 1) -> [b, i]
      -> y[b, i]
  output y = y
"""
    program = program_of(text, one=1.0)
    session = session_of(emitted(program).SerializeToString())
    for batch in (1, 2, 3):
        (feeds,) = [feeds_for(program, {"batch": batch})]
        np.testing.assert_array_equal(session.run(None, feeds)[0], feeds["x"])


# --- the file --------------------------------------------------------------------------------------------------


def test_weights_stand_in_the_outer_graph_once() -> None:
    traced = layers((4, 6))
    model = emitted(switched(traced, ((2, 7, 9), (FIRST, LAST, FIRST, DENSE))))
    assert not any(inner.initializer for inner in graphs(model.graph))
    assert not any(node.op_type == "Constant" for node in nodes_of(model.graph))
    arrays = [onnx.numpy_helper.to_array(i) for i in model.graph.initializer]
    contents = [(a.dtype, a.shape, a.tobytes()) for a in arrays]
    assert len({*contents}) == len(contents)
    # each order has its arrangement of the two cores, which the first and the third case share, and the dense one
    assert sorted(a.size for a in arrays if a.dtype == np.float32 and a.size > 30) == [60, 60, 108, 108, 720]


_CASE = """\
    network y: float32[batch, 16, 12, 12]
      indices b=batch, c=16, i=12, j=12, k=3, l=3, h=12, w=12, o=16
      term
        0 operand x[b, c, i, j]
        1 core kernel[o, c, k, l]
        window i, k -> h, stride=1, dilation=1, padding=1 1
        window j, l -> w, stride=1, dilation=1, padding=1 1
        order (0 1)
        steps
          2 = convolve(0, 1) -> [b, o, h, w]
      -> y[b, o, h, w]
"""
CONVOLUTIONS = f"program\n  input x: float32[batch, 16, 12, 12]\n  switch batch <= 2\n{_CASE}{_CASE}  output y = y\n"
"""A convolution as one network in both cases of a switch."""


def test_convolutions_in_branches_run_in_blocks_of_channels(tmp_path: Path) -> None:
    """Both read one kernel of the main graph, of which each branch has its own for the order that its Conv wants."""
    program = program_of(CONVOLUTIONS)
    model = emitted(program)
    assert sum(list(i.dims) == [16, 16, 3, 3] for i in model.graph.initializer) == 1
    assert not any(inner.initializer for inner in graphs(model.graph))
    run = [node for inner in graphs(optimized(model.SerializeToString(), tmp_path).graph) for node in inner.node]
    assert [n.domain for n in run if n.op_type == "Conv"] == ["com.microsoft.nchwc"] * 2
    assert "Reshape" not in [n.op_type for n in run]
    for batch in (2, 3):
        feeds = feeds_for(program, {"batch": batch})
        expected = evaluate_program(program, feeds, {"batch": batch})["y"]
        (found,) = session_of(model.SerializeToString()).run(None, feeds)
        assert_close(found, expected, tolerance=1e-5)


def unfolded(model: onnx.ModelProto) -> list[str]:
    """The nodes of a model that depend on constants alone."""
    found = []

    def visit(graph: onnx.GraphProto, outer: frozenset[str]) -> None:
        constants = {i.name for i in graph.initializer} | outer
        for node in graph.node:
            if node.op_type == "Constant":
                constants |= {*node.output}
            elif node.op_type != "If" and node.input and constants >= {*node.input}:
                found.append(node.op_type)
                constants |= {*node.output}
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g, frozenset(constants))

    visit(model.graph, frozenset())
    return found


def optimized(data: bytes, folder: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("store", ["cores", "folded"])
def test_nothing_constant_is_left_in_the_branches(store: str, tmp_path: Path) -> None:
    """Also where the dense core is stored as its parts: ONNX Runtime folds them into one initializer."""
    traced = layers((32, 32))
    program = switched(traced, ((4,), (FIRST, DENSE)))
    file = write(program, TracedModel(None, program, {}), store)  # type: ignore[arg-type]
    assert_plain(file.data)
    stored = {tuple(i.dims) for i in onnx.load_model_from_string(file.data).graph.initializer}
    assert ((1024, 30) in stored) == (store == "folded")
    after = optimized(file.data, tmp_path)
    assert unfolded(after) == []
    assert [len(inner.initializer) for inner in graphs(after.graph)] == [0, 0]
    session = session_of(file.data)
    for batch in (1, 4, 5, 9):
        feeds = feeds_for(traced, {"batch": batch})
        expected = reference(traced, feeds, {"batch": batch})["y0"]
        assert_close(session.run(None, feeds)[0], expected, tolerance=2e-6)


def test_what_runs_in_the_branches_is_counted(tmp_path: Path) -> None:
    """As `tncompile inspect --format optimized` shows it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(emitted(switched(layers((4, 6)), ((2, 7), (FIRST, LAST, DENSE)))).SerializeToString())
    found = optimized_operators(path)
    assert found.before["If"] == found.after["If"] == 2
    assert sum(found.before.get(name, 0) for name in ("MatMul", "Gemm")) == 2 + 2 + 1
    assert sum(found.before.values()) == len(list(nodes_of(onnx.load(path).graph)))
    assert sum(found.after.get(name, 0) for name in ("MatMul", "Gemm", "FusedMatMul", "com.microsoft:FusedMatMul")) == 5


def test_unfolded_nodes_are_seen() -> None:
    """The check of the test above, on a model that has some."""
    traced = layers((32, 32))
    program = switched(traced, ((4,), (FIRST, DENSE)))
    file = write(program, TracedModel(None, program, {}), "cores")  # type: ignore[arg-type]
    assert "MatMul" in unfolded(onnx.load_model_from_string(file.data))


# --- between opaque nodes --------------------------------------------------------------------------------------


class Between(torch.nn.Module):
    """Two layers of low rank between nodes of torch's exporter, the second with the weights of the first transposed.

    Where `shared`, an opaque node reads one of the weights as well.
    """

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u = torch.nn.Parameter(torch.randn(256, 64) / 16)
        self.v = torch.nn.Parameter(torch.randn(64, 256) / 8)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.softmax(torch.einsum("ni,ir,ro->no", torch.relu(x), self.u, self.v), -1) * 16
        h = torch.tanh(torch.einsum("no,ro,ir->ni", h, self.v, self.u))
        return torch.maximum(h.unsqueeze(-1), self.u).mean(-1) if self.shared else h


@pytest.mark.parametrize(("shared", "rows"), [(False, 1), (True, 1), (True, 4)])
def test_between_opaque_nodes(shared: bool, rows: int, tmp_path: Path) -> None:
    """Two switches, planned by the pass itself; the input has `rows` rows for each sample."""
    model = Between(shared).eval()
    batch = torch.export.Dim("batch")
    exported = trace(model, (torch.randn(rows * 3, 256),), dynamic_shapes=({0: rows * batch},))
    traced = import_exported(exported)
    program, _ = Pipeline().run(traced.program, Context(batches=(1, 4096), profile=FLIPS))
    switches = [node for node in program.nodes if isinstance(node, Switch)]
    assert len(switches) == 2 and any(isinstance(node, Opaque) for node in program.nodes)
    limits = {limit for switch in switches for limit in switch.limits}
    data = write(program, traced, "folded").data
    assert_plain(data)
    file = onnx.load_model_from_string(data)
    assert (count(file, "If"), count(file, "LessOrEqual")) == (2, len(limits))
    assert not any(inner.initializer for inner in graphs(file.graph))
    contents = [i.raw_data for i in file.graph.initializer]
    assert len({*contents}) == len(contents)
    assert unfolded(optimized(data, tmp_path)) == []
    session = session_of(data)
    exact = Between(shared).double()
    for size in sorted({1, *limits, *(limit + 1 for limit in limits), 2 * max(limits)}):
        x = torch.randn(rows * size, 256)
        with torch.no_grad():
            expected = exact(x.double()).numpy()
        (found,) = session.run(None, {"x": x.numpy()})
        assert_close(found, expected, tolerance=1e-5, what=f"batch {size}")
