"""Nodes that fold cores: the numbers in any arrangement, and how few arrays of full size there are on the way."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import assert_exact, session_of
from tncompile.emit.foldplan import plan_fold
from tncompile.emit.folds import Folding
from tncompile.emit.foldwriter import Writer
from tncompile.emit.onnxfile import pack
from tncompile.ir import Index, Tensor, Term
from tncompile.ir.tree import Tree

Groups = list[list[Index]]


def cores(shapes: list[str], sizes: dict[str, int], grouped: bool = False) -> tuple[Tensor, ...]:
    """Random cores, each with an index for each letter, and an axis for each or, where `grouped`, one for all."""
    rng = np.random.default_rng(0)
    found = []
    for number, letters in enumerate(shapes):
        indices = tuple(Index(letter, sizes[letter]) for letter in letters)
        array = rng.standard_normal([sizes[letter] for letter in letters]).astype(np.float32)
        axes = (indices,) if grouped else tuple((index,) for index in indices)
        found.append(Tensor(f"c{number}", axes, array.reshape(-1) if grouped else array))
    return tuple(found)


def folded(term: Term, axes: Groups, shared: bool = False) -> tuple[list[onnx_ir.Node], bytes]:
    """The nodes and a model of them; where `shared`, the model has the cores as they are anyway, and however small they
    are, the file is to hold them once."""
    graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="folds")
    writer = Writer(onnx_ir.Model(graph, ir_version=10))
    if shared:
        for core in term.tensors:
            writer.weights.add(core.name, core.array().reshape([int(size) for size in core.shape]))
    with patch("tncompile.emit.foldwriter.SMALL", -1):
        nodes, result = Folding(term, axes).nodes(
            lambda core, groups: writer.part(core, groups, "float32"), "float32", writer.weights
        )
    writer.append(nodes)
    result.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    result.shape = onnx_ir.Shape([math.prod(int(i.size) for i in axis) for axis in axes])
    graph.extend(writer.nodes)
    graph.outputs.append(result)
    for value in writer.weights.values.values():
        graph.register_initializer(value)
    return nodes, pack(onnx_ir.Model(graph, ir_version=10)).data


def einsum(term: Term, axes: Groups, absolute: bool = False) -> np.ndarray:
    """The contraction in float64; `absolute` of the magnitudes."""
    arrays = [core.array().astype(np.float64).reshape([int(i.size) for i in core.indices]) for core in term.tensors]
    wanted = "".join(index.name for axis in axes for index in axis)
    names = [",".join("".join(i.name for i in core.indices) for core in term.tensors), wanted]
    result = np.einsum("->".join(names), *(np.abs(a) if absolute else a for a in arrays), optimize=True)
    return result.reshape([math.prod(int(i.size) for i in axis) for axis in axes])


@st.composite
def contractions(draw: st.DrawFn) -> tuple[Term, Groups]:
    sizes = {letter: draw(st.integers(1, 4)) for letter in "abcdefg"}
    letters = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4)  # one that stands twice is a diagonal
    shapes = ["".join(s) for s in draw(st.lists(letters, min_size=1, max_size=5))]
    used = sorted({*"".join(shapes)})
    kept = draw(st.permutations(used))[: draw(st.integers(1, len(used)))]
    axes: Groups = [[]]
    for letter in kept:
        if draw(st.booleans()):
            axes.append([])
        axes[-1].append(Index(letter, sizes[letter]))
    order: list[Tree] = [*range(len(shapes))]
    while len(order) > 1:
        first = order.pop(draw(st.integers(0, len(order) - 1)))
        second = order.pop(draw(st.integers(0, len(order) - 1)))
        order.append((first, second))
    return Term(cores(shapes, sizes, draw(st.booleans())), order[0]), axes


@settings(max_examples=60, deadline=None)
@given(contractions(), st.booleans())
def test_any_contraction_in_any_arrangement(drawn: tuple[Term, Groups], shared: bool) -> None:
    term, axes = drawn
    found = session_of(folded(term, axes, shared)[1]).run(None, {})[0]
    assert_exact(found, einsum(term, axes), einsum(term, axes, absolute=True), "float32", roundings=64)


INDICES = {letter: Index(letter, size) for letter, size in zip("ijkopqrs", (8, 6, 4, 4, 6, 8, 3, 5), strict=True)}
IN_OUT: Groups = [[INDICES[n] for n in "ijk"], [INDICES[n] for n in "opq"]]


@pytest.mark.parametrize(
    ("shapes", "order", "largest"),
    [
        (["ior", "rjps", "skq"], ((0, 1), 2), ["MatMul", "Reshape"]),  # a tensor train
        (["ior", "rjps", "skq", "opq"], (((0, 1), 2), 3), ["MatMul", "Reshape"]),  # and a scale of the output
        (["ijkr", "ropq"], (0, 1), ["MatMul"]),  # one product is a matrix of the order wanted
        (["ior", "jpr", "kqr"], ((0, 1), 2), ["MatMul", "Reshape"]),  # CP
    ],
)
def test_few_arrays_of_full_size(shapes: list[str], order: Tree, largest: list[str]) -> None:
    term = Term(cores(shapes, {n: int(i.size) for n, i in INDICES.items()}), order)
    nodes, data = folded(term, IN_OUT)
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data), data_prop=True)
    shapes_of = {v.name: v.type.tensor_type.shape for v in (*model.graph.value_info, *model.graph.output)}
    sizes = [math.prod(d.dim_value for d in shapes_of[n.outputs[0].name].dim) for n in nodes]
    assert [n.op_type for n, size in zip(nodes, sizes, strict=True) if size == 192 * 192] == largest
    found = session_of(data).run(None, {})[0]
    assert_exact(found, einsum(term, IN_OUT), einsum(term, IN_OUT, absolute=True), "float32", roundings=64)


@pytest.mark.parametrize("count", [12, 40, 300])
def test_many_cores_are_planned_in_few_trials(count: int) -> None:
    """Of a chain of matrices, each of them is made into no more than a few."""
    fold = plan_fold(tuple((k, k + 1) for k in range(count)), (4,) * (count + 1), ((0,), (count,)))
    assert sorted(fold.places) == [*range(count)] and fold.made <= 2 * 16 * count
    scales = ((0, 1, 4), (4, 2, 3), *((0, 2) if k % 2 else (1, 3) for k in range(count)))
    assert sorted(plan_fold(scales, (4,) * 5, ((0, 2), (1, 3))).places) == [*range(count + 2)]
