"""Folded layers stored as their cores: what the file holds, what ONNX Runtime makes of it, and the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tncompile
from tests.helpers import assert_close, assert_exact, assert_plain, evaluate_program, feeds_for, program_of, session_of
from tncompile import compiler
from tncompile.emit.file import Written, write
from tncompile.emit.onnxfile import OnnxFile, pack
from tncompile.emit.program import to_onnx
from tncompile.emit.store import affordable, foldable, store_small
from tncompile.errors import TNCompileError
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Network, Program
from tncompile.passes import Context, Order
from tncompile.passes.order import merge_constants, scheduler

LAYER = """\
network {y}: {dtype}[batch, 512], layer {y}
    indices b=batch, i=16, j=32, o=32, p=16, r=24
    term
      0 operand {x}[b, (i j)]
      1 core {a}[i, o, r]
      2 core {b}[r, j, p]
    -> {y}[b, (o p)]
"""


def folded_program(
    dtype: str = "float32", layers: tuple[tuple[str, str, str, str], ...] = (("x", "y", "a", "b"),)
) -> Program:
    """TT layers, all folded to dense, whatever would be faster."""
    text = f"program\n  input x: {dtype}[batch, 512]\n"
    for x, y, a, b in layers:
        text += "  " + LAYER.format(x=x, y=y, a=a, b=b, dtype=dtype).replace("\n", "\n  ").rstrip() + "\n"
    text += f"  output out = {layers[-1][1]}\n"
    program = program_of(text)
    return replace(program, nodes=tuple(map(dense, program.networks)))


def dense(network: Network) -> Network:
    """One operand and two cores, as one core."""
    term = merge_constants(network, network.terms[0], (0, (1, 2)))
    schedule = scheduler(network, term, Context(), 32).schedule(term.order)
    return replace(network, terms=(replace(term, steps=schedule.steps),))


def traced(program: Program) -> TracedModel:
    return TracedModel(None, program, {})  # type: ignore[arg-type]


def optimized(data: bytes, folder: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cores_are_stored_and_folded_at_load(dtype: str, tmp_path: Path) -> None:
    program = folded_program(dtype)
    file = write(program, traced(program), "cores")
    assert_plain(file.data)
    model = onnx.load_model_from_string(file.data)
    large = {i.name: tuple(i.dims) for i in model.graph.initializer if np.prod(i.dims) > 8}
    assert large == {"a": (16, 1, 32, 24), "b": (32, 24, 16)}  # as they are multiplied, broadcast over (16, 32)
    after = optimized(file.data, tmp_path).graph
    assert {n.op_type for n in after.node} <= {"MatMul", "Cast"}  # the fold is gone; float16 runs as float32
    assert sum(n.op_type == "MatMul" for n in after.node) == 1
    assert [tuple(i.dims) for i in after.initializer if np.prod(i.dims) > 512] == [(512, 512)]
    feeds = feeds_for(program, {"batch": 3})
    expected = evaluate_program(program, feeds, {"batch": 3})["out"]
    magnitude = np.full_like(expected, np.abs(expected).max())
    found = session_of(file.data).run(None, feeds)[0]
    assert_exact(found, expected, magnitude, dtype, roundings=64)


def test_the_sizes_of_both_files_are_exact() -> None:
    program = folded_program()
    files = {store: write(program, traced(program), store) for store in ("cores", "folded", "auto")}  # type: ignore[arg-type]
    cores, folded, auto = files["cores"], files["folded"], files["auto"]
    assert cores.storage.folded_bytes == folded.storage.folded_bytes == len(folded.data)
    assert cores.storage.cores_bytes == folded.storage.cores_bytes == len(cores.data) < len(folded.data) / 8
    assert auto.data == cores.data and auto.storage.cores == ("a*b",)
    assert folded.folded is None and cores.folded == folded.file
    assert cores.written_out("why").data == folded.data


def test_parts_of_several_layers_are_stored_once() -> None:
    program = folded_program(layers=(("x", "y", "a", "b"), ("y", "z", "a", "c")))
    model = onnx.load_model_from_string(write(program, traced(program), "cores").data)
    names = [i.name for i in model.graph.initializer]
    assert {"a", "b", "c"} < {*names} and len({*names}) == len(names)
    assert sum(i.dims == [16, 32, 24] for i in model.graph.initializer) == 1
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def test_folds_stay_outside_of_branches(tmp_path: Path) -> None:
    """A core that only the branches of an If read is folded and is a plain initializer of the main graph."""
    program = folded_program()
    model = to_onnx(program, traced(program))
    graph, (matmul,) = model.graph, [n for n in model.graph if n.op_type == "MatMul"]
    x, weight = matmul.inputs
    after = [n for n in graph if n is not matmul]
    assert not after and x is graph.inputs[0]
    branches = []
    for name in ("then", "else"):
        node = onnx_ir.node("MatMul", [x, weight], name=name)
        node.outputs[0].name, node.outputs[0].type = name, onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        branches.append(onnx_ir.Graph([], [node.outputs[0]], nodes=[node], name=name))
    limit = onnx_ir.Value(name="limit", const_value=onnx_ir.tensor(np.array([2]), name="limit"))
    graph.register_initializer(limit)
    size = onnx_ir.node("Shape", [x], {"start": 0, "end": 1}, name="size")
    less = onnx_ir.node("Less", [size.outputs[0], limit], name="less")
    choose = onnx_ir.node("If", [less.outputs[0]], {"then_branch": branches[0], "else_branch": branches[1]}, name="if")
    for node in (size, less, choose):
        node.outputs[0].name = f"{node.name}:out"
    graph.insert_before(matmul, [size, less, choose])
    out = choose.outputs[0]
    out.type, out.shape = matmul.outputs[0].type, matmul.outputs[0].shape
    onnx_ir.convenience.replace_all_uses_with(matmul.outputs[0], out, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)
    out.name = "out"

    expected = session_of(pack(model).data)
    store_small(model, foldable(model))
    data = pack(model).data
    after_load = optimized(data, tmp_path).graph
    assert [n.op_type for n in after_load.node] == ["Shape", "Less", "If"]
    inner = [n.op_type for a in after_load.node[-1].attribute for n in a.g.node]
    assert inner == ["MatMul", "MatMul"]
    assert (512, 512) in [tuple(i.dims) for i in after_load.initializer]
    for batch in (1, 3):
        feeds = feeds_for(program, {"batch": batch})
        want, got = expected.run(None, feeds)[0], session_of(data).run(None, feeds)[0]
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_auto_stops_at_the_limit() -> None:
    program = folded_program(layers=(("x", "y", "a", "b"), ("y", "z", "c", "d")))
    found = foldable(to_onnx(program, traced(program)))
    assert len(found) == 2 and all(c.seconds > 0 and c.saved > 8e5 for c in found)
    assert affordable(found, 1.5 * found[0].seconds) == found[:1]
    assert affordable(found, 0.0) == []


def test_auto_folds_nothing_that_makes_far_more_than_it_saves() -> None:
    program = folded_program()
    (found,) = foldable(to_onnx(program, traced(program)))
    assert affordable([replace(found, made=7 * found.saved)]) and not affordable([replace(found, made=9 * found.saved)])


def test_a_sum_over_a_part_of_float16_may_be_larger_than_float16() -> None:
    text = """\
program
  input x: float16[batch, 128]
  network y: float16[batch, 128]
    indices b=batch, i=128, o=128, r=4, s=4
    term
      0 operand x[b, i]
      1 core a[i, r, s]
      2 core c[r, o]
    -> y[b, o]
  output out = y
"""
    program = program_of(text)
    (network,) = program.networks
    (term,) = network.terms
    x, a, c = term.tensors
    a = replace(a, data=np.full((128, 4, 4), 2e4, np.float16))
    c = replace(c, data=np.full((4, 128), 1e-4, np.float16))
    program = replace(program, nodes=(dense(replace(network, terms=(replace(term, tensors=(x, a, c)),))),))
    file = write(program, traced(program), "cores")
    assert file.storage.cores
    feeds = {"x": np.full((2, 128), 1e-2, np.float16)}
    expected = evaluate_program(program, feeds, {"batch": 2})["out"]
    assert_close(session_of(file.data).run(None, feeds)[0], expected, tolerance=5e-3)


def test_small_cores_are_written_out() -> None:
    text = """\
program
  input x: float32[batch, 8]
  network y: float32[batch, 8]
    indices b=batch, i=8, o=8, r=1
    term
      0 operand x[b, i]
      1 core a[i, r]
      2 core c[r, o]
    -> y[b, o]
  output out = y
"""
    program, _ = Order().run(program_of(text), Context())
    file = write(program, traced(program), "cores")
    assert not file.storage.cores and not file.storage.differs and file.folded is None


def banked(bank: np.ndarray) -> onnx_ir.Model:
    """``y = x · bank`` with the bank as an initializer."""
    dtype = onnx_ir.DataType.from_numpy(bank.dtype)
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(["batch", bank.shape[0]]))
    weight = onnx_ir.Value(
        name="bank",
        type=onnx_ir.TensorType(dtype),
        shape=onnx_ir.Shape(bank.shape),
        const_value=onnx_ir.tensor(bank, name="bank"),
    )
    node = onnx_ir.node("MatMul", [x, weight], name="product")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", onnx_ir.TensorType(dtype), onnx_ir.Shape(["batch", bank.shape[1]])
    graph = onnx_ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 20}, name="main")
    return onnx_ir.Model(graph, ir_version=10)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(40, 90),
    columns=st.integers(40, 90),
    kept=st.floats(0.0, 0.6),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 1000),
)
def test_a_table_of_zeros_is_stored_as_the_other_numbers(
    rows: int, columns: int, kept: float, dtype: str, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    bank = generator.standard_normal((rows, columns)) * (generator.random((rows, columns)) < kept)
    bank = np.asarray(bank, dtype)
    model = banked(bank)
    found = foldable(model)
    each, count = bank.itemsize + 4, np.count_nonzero(bank)
    if bank.nbytes - each * count <= 4096:
        assert not found
    elif each * count <= 0.4 * bank.nbytes:
        assert [weight.saved for weight in found] == [bank.nbytes - each * count]
    store_small(model, found)
    data = pack(model).data
    assert len(data) < each * count + 2000 or not found
    x = np.eye(rows, dtype=dtype)  # each product is one number and zeros: exact
    np.testing.assert_array_equal(session_of(data).run(None, {"x": x})[0], bank)


def test_a_table_of_zeros_is_a_plain_weight_once_loaded(tmp_path: Path) -> None:
    model = banked(np.eye(300, dtype=np.float32))
    store_small(model, foldable(model))
    after = optimized(pack(model).data, tmp_path).graph
    assert [n.op_type for n in after.node] == ["MatMul"] and [tuple(i.dims) for i in after.initializer] == [(300, 300)]


class Filtered(torch.nn.Module):
    """A spectrum through a bank of overlapping triangles, as mel scales are."""

    def __init__(self) -> None:
        super().__init__()
        bins, bands = torch.arange(513.0)[:, None], torch.linspace(10, 500, 80)
        self.bank = torch.nn.Buffer((1 - (bins - bands).abs() / 9).clamp(min=0))
        self.layer = torch.nn.Linear(80, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.log(x.square() @ self.bank + 1e-3))


def test_a_bank_of_filters_is_stored_without_its_zeros() -> None:
    module, x = Filtered().eval(), torch.randn(4, 513)
    compiled = tncompile.compile(module, (x,), batch=16)
    storage = compiled.report.storage
    assert storage is not None and len(storage.sparse) == 1 and storage.folded_bytes > 160_000
    assert len(compiled.onnx) == storage.cores_bytes < 40_000
    torch.testing.assert_close(torch.from_numpy(compiled.run(x)), module(x), rtol=1e-5, atol=1e-5)
    whole = tncompile.compile(module, (x,), batch=16, store="folded")
    assert len(whole.onnx) == storage.folded_bytes


def test_another_store_is_refused() -> None:
    program = folded_program()
    with pytest.raises(TNCompileError, match="store is auto, cores, folded; not 'small'"):
        write(program, traced(program), "small")  # type: ignore[arg-type]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(16, 32, 24) / 20)
        self.b = torch.nn.Parameter(torch.randn(24, 32, 16) / 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,iro,ojl->brl", x.reshape(-1, 16, 32), self.a, self.b).reshape(-1, 512)


def test_a_compile_reports_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 512)
    compiled = tncompile.compile(Layer().eval(), (x,), batch=256)
    storage = compiled.report.storage
    assert storage is not None and storage.cores == ("a*b",)
    assert compiled.report.networks[0].stored == 2 * 16 * 32 * 24
    assert len(compiled.onnx) == storage.cores_bytes < storage.folded_bytes / 8
    assert "written out 1.05 MB, as parts 0.10 MB" in " ".join(str(compiled.report).split())
    assert compiled.report.to_dict()["storage"]["folded_bytes"] == storage.folded_bytes

    def inexact(*args: object) -> Written:  # as if folding at load were worse than the check allows
        file = write(*args)  # type: ignore[arg-type]
        model = onnx.load_model_from_string(file.data)
        part = next(i for i in model.graph.initializer if i.name == "a")
        part.raw_data = (onnx.numpy_helper.to_array(part) * np.float32(1.01)).tobytes()
        return replace(file, file=OnnxFile(model.SerializeToString()))

    monkeypatch.setattr(compiler, "write", inexact)
    compiled = tncompile.compile(Layer().eval(), (x,), batch=256)
    storage = compiled.report.storage
    assert storage is not None and not storage.cores and "not as exact" in storage.why
    assert len(compiled.onnx) == storage.folded_bytes and compiled.report.networks[0].stored == 512 * 512
