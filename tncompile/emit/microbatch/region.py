"""The part of a graph that is computed in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir

from tncompile.emit.fuse.match import constant_shape, is_op, shape_of
from tncompile.emit.microbatch.samples import Samples

CONVOLUTIONS = ("Conv", "ConvTranspose")
_WINDOWS = (*CONVOLUTIONS, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_MATRICES = ("Gemm", "MatMul")
_RATE = 100e3  # multiplications and additions in a microsecond: the order of one core's
_BANDWIDTH = 24e3  # bytes in a microsecond, from a cache
_MEMORY_BANDWIDTH = 10e3  # and from memory


@dataclass(frozen=True)
class Region:
    """Nodes in order, what they read of the batch, and what others read of theirs.

    For one sample: `bytes` are the most that the arrays around one node take, `shown` those of outputs of the model,
    `microseconds` the order of the time for all of it on one core where its arrays are in the cache, and
    `streamed_microseconds` where they are not. `weights`: bytes of all it reads that is constant.
    """

    nodes: tuple[onnx_ir.Node, ...]
    inputs: tuple[onnx_ir.Value, ...]
    outputs: tuple[onnx_ir.Value, ...]
    batch: str
    weights: int
    bytes: int
    shown: int
    microseconds: float
    streamed_microseconds: float


def find_region(graph: onnx_ir.Graph, batch: str) -> Region | None:
    """What leads to the last convolutions and pools of a graph, and reads nothing that is not the same for all samples.

    Behind those it goes on as long as arrays get no larger and no matrix is multiplied: whole batches are better there.
    """
    samples = Samples(graph, batch)
    leading: set[onnx_ir.Node] = set()
    for node in reversed(list(graph)):
        readers = {use.node for output in node.outputs for use in output.uses()}
        if node in samples.nodes and (is_op(node, *_WINDOWS) or readers & leading):
            leading.add(node)
    for node in graph:
        read = {*samples.read(node)}
        if node in samples.nodes and all(value.producer() in leading for value in read):
            shrinks = sum(map(samples.size, node.outputs)) <= sum(map(samples.size, read))
            if shrinks and not is_op(node, *_MATRICES):
                leading.add(node)
    nodes = _whole_samples([node for node in graph if node in leading], samples)
    leading = {*nodes}
    if not any(is_op(node, *CONVOLUTIONS) for node in nodes):
        return None
    reads = dict.fromkeys(value for node in nodes for value in samples.read(node))
    inputs = tuple(v for v in reads if v.producer() not in leading)
    made = [value for node in nodes for value in node.outputs]
    outputs = tuple(v for v in made if v.is_graph_output() or any(use.node not in leading for use in v.uses()))
    around = [sum(map(samples.size, (*samples.read(node), *node.outputs))) for node in nodes]
    products = sum(_products(node) * (samples.entry(node.outputs[0]) or 1) / _RATE for node in nodes)
    return Region(
        nodes,
        inputs,
        outputs,
        batch,
        _weights(nodes),
        max(around),
        sum(samples.size(value) for value in outputs if value.is_graph_output()),
        products + sum(around) / _BANDWIDTH,
        products + sum(around) / _MEMORY_BANDWIDTH,
    )


def _weights(nodes: Iterable[onnx_ir.Node]) -> int:
    constants = {value for node in nodes for value in node.inputs if value is not None and constant_shape(value)}
    return sum(value.const_value.nbytes for value in constants if value.const_value is not None)


def _whole_samples(nodes: Sequence[onnx_ir.Node], samples: Samples) -> tuple[onnx_ir.Node, ...]:
    """Without what gives to others a value that does not have one entry for each sample, and what reads from that."""
    kept: dict[onnx_ir.Node, None] = dict.fromkeys(nodes)
    while True:
        before = len(kept)
        for node in reversed([*kept]):
            shown = (v for v in node.outputs if v.is_graph_output() or any(use.node not in kept for use in v.uses()))
            if any(samples.entry(value) != 1 for value in shown):
                del kept[node]
        for node in [*kept]:
            made = (value.producer() for value in samples.read(node))
            if any(producer is not None and producer not in kept for producer in made):
                del kept[node]
        if len(kept) == before:
            return tuple(kept)


def _products(node: onnx_ir.Node) -> float:
    """Multiplications and additions for one entry of the first axis, about."""
    result = shape_of(node.outputs[0])
    if result is None or not is_op(node, *CONVOLUTIONS, *_MATRICES):
        return 0.0
    elements = math.prod(int(size) for size in result[1:])
    if is_op(node, *_MATRICES):
        left = constant_shape(node.inputs[0]) or shape_of(node.inputs[0]) or (1,)
        return 2.0 * elements * int(left[-1])
    weight = constant_shape(node.inputs[1]) or (1, 1)
    kept = weight[1] if is_op(node, "ConvTranspose") else weight[0]
    return 2.0 * elements * math.prod(weight) / max(kept, 1)
