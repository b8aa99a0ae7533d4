"""ONNX models made by hand, and what they should compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tncompile.ir import Array

RNG = np.random.default_rng(3)
F = TensorProto.FLOAT


def weight(name: str, *shape: int, dtype: str = "float32") -> onnx.TensorProto:
    """A random initializer."""
    return numpy_helper.from_array(np.asarray(RNG.standard_normal(shape), dtype), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    """An initializer of int64."""
    return numpy_helper.from_array(np.asarray(values, np.int64), name)


def tensor(name: str, shape: Sequence[int | str | None] | None, kind: int = F) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """``node("Add", "a b", "c")``; ``_`` is an input that is not given."""
    return helper.make_node(op, ["" if n == "_" else n for n in inputs.split()], outputs.split(), **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
    opset: int = 18,
    **others: int,
) -> onnx.ModelProto:
    """A model; `others` are the operator sets of other domains."""
    versions = {"": opset, **{domain.replace("_", "."): version for domain, version in others.items()}}
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(weights))
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)


def expected(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs by onnx's reference, in the model's own dtype."""
    return [np.asarray(a) for a in ReferenceEvaluator(proto).run(None, dict(feeds))]


def tt_chain(opset: int = 13) -> onnx.ModelProto:
    """A tensor-train layer as MatMuls, Reshapes and Transposes of cores, then a dense one: ``x[N, 16] -> y[N, 6]``."""
    nodes = [
        node("Reshape", "g0 s0", "c0"),
        node("MatMul", "c0 g1m", "c01"),
        node("Reshape", "c01 s1", "c01r"),
        node("Transpose", "c01r", "full", perm=[0, 2, 1, 3]),
        node("Reshape", "full s2", "w"),
        node("MatMul", "x w", "h"),
        node("Add", "h bias", "hb"),
        node("Relu", "hb", "r"),
        node("Gemm", "r w2 b2", "y", alpha=0.5, beta=2.0, transB=1),
    ]
    weights = [
        weight("g0", 4, 5, 3),
        ints("s0", 20, 3),
        weight("g1m", 3, 20),
        ints("s1", 4, 5, 4, 5),
        ints("s2", 16, 25),
        weight("bias", 25),
        weight("w2", 6, 25),
        weight("b2", 6),
    ]
    return model(nodes, [tensor("x", ["N", 16])], [tensor("y", ["N", 6])], weights, opset)
