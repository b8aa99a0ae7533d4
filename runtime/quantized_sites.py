"""Which nodes of an ONNX model read weights, and what each can be computed in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tncompile.runtime.quantized_graph import NETWORK, Constants, attribute, identity, key_of, subgraphs
from tncompile.runtime.quantized_round import BITS, BLOCK, STORED

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

LEAST = 256
"""Numbers that a weight has at least, to be computed with in fewer bits."""

STORED_LEAST = {"fp16": 256, "int8-weights": 512, "int4-weights": 2048}
"""Numbers that one has to be smaller in the file: nodes and their names take 0.3, 0.7 and 2.5 kB."""

_OPSET = 13  # of the axis of DequantizeLinear


@dataclass(frozen=True)
class Site:
    """A node that reads float32 weights, and what it can be computed in.

    `key` is its name in a choice, `graph` what it stands in; `weights` has names by position among its inputs.
    """

    key: str
    node: NodeProto
    graph: GraphProto
    weights: Mapping[int, str]
    bits: tuple[str, ...]


def sites(constants: Constants) -> list[Site]:
    """Every node that reads a weight of at least `LEAST` numbers, in order of execution."""
    opset = next((o.version for o in constants.model.opset_import if o.domain in ("", "ai.onnx")), 1)
    found = _sites(constants.model.graph, constants, True, opset)
    return list(found)


def _sites(graph: GraphProto, constants: Constants, plan: bool, opset: int) -> Iterator[Site]:
    """The sites of a graph; those of which no range can be seen, as they may not be run, are not `plan`."""
    for node in graph.node:
        for inner in subgraphs(node):
            of_plan = plan and node.op_type == "If" and any(p.key == NETWORK for p in node.metadata_props)
            yield from _sites(inner, constants, of_plan, opset)
        if identity(node) in constants.folds:
            continue
        weights = {p: name for p, name in enumerate(node.input) if is_weight(name, constants)}
        if weights:
            computed = _computed(node, weights, graph, constants) if opset >= _OPSET else set()
            computed -= set() if plan else {"int8-static"}
            sources = {source for name in weights.values() for source in constants.sources(name)}
            stored = {way for way in STORED if any(worth_storing(source, way, constants) for source in sources)}
            bits = tuple(b for b in BITS if b in {"fp32"} | stored | computed)
            yield Site(key_of(node), node, graph, weights, bits)


def is_weight(name: str, constants: Constants) -> bool:
    """Whether a value is a constant of `LEAST` or more float32 numbers."""
    if not constants.is_float(name):
        return False
    return math.prod(constants.shape(name)) >= LEAST


def worth_storing(name: str, bits: str, constants: Constants) -> bool:
    """Whether an initializer can be smaller in the file: large enough, and for fewer than 16 bits a matrix at least."""
    if not constants.is_float(name):
        return False
    shape = constants.shape(name)
    return math.prod(shape) >= STORED_LEAST[bits] and (bits == "fp16" or len(shape) >= 2)


def _computed(node: NodeProto, weights: Mapping[int, str], graph: GraphProto, constants: Constants) -> set[str]:
    """What ONNX Runtime can compute a node in, other than float32."""
    shape = {p: constants.shape(name) for p, name in weights.items()}
    if node.domain not in ("", "ai.onnx"):
        return set()
    if node.op_type == "MatMul" and 1 in weights and node.input[0] not in constants:
        if len(shape[1]) != 2:
            return {"int8"} if len(shape[1]) > 2 else set()
        static = set() if _becomes_gemm(node, graph, constants) else {"int8-static"}
        return {"int8", "int4"} | static
    if node.op_type == "Gemm" and 1 in weights and _plain_gemm(node):
        bias = node.input[2] if len(node.input) > 2 else ""
        columns = shape[1][0 if attribute(node, "transB", 0) else 1]
        constant = not bias or (bias in constants.initializers and constants.shape(bias) == (columns,))
        return {"int8", "int4"} | ({"int8-static"} if constant else set())
    if node.op_type == "Conv" and 1 in weights and 3 <= len(shape[1]) <= 5:
        bias = node.input[2] if len(node.input) > 2 else ""
        return {"int8-static"} if not bias or bias in constants.initializers else set()
    if node.op_type == "Gather" and [*weights] == [0] and len(shape[0]) == 2 and not attribute(node, "axis", 0):
        return {"int8"} | ({"int4"} if shape[0][1] % BLOCK == 0 else set())
    if node.op_type == "LSTM" and {1, 2} <= {*weights} and not attribute(node, "layout", 0):
        return {"int8"}
    return set()


def _plain_gemm(node: NodeProto) -> bool:
    return attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)


def _becomes_gemm(node: NodeProto, graph: GraphProto, constants: Constants) -> bool:
    """Whether ONNX Runtime makes one Gemm of a MatMul and an Add, which then is not computed in eight bits any more."""
    readers = [n for n in graph.node if node.output[0] in n.input]
    rank = constants.types.get(node.input[0], (0, None))[1]
    return len(readers) == 1 and readers[0].op_type == "Add" and (rank is None or len(rank) <= 2)
