"""The end of quantizing: weights that are smaller in the file alone, and nothing left that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tncompile.runtime.quantized_graph import NETWORK, Constants, attribute, graphs_of, identity, key_of
from tncompile.runtime.quantized_names import Names
from tncompile.runtime.quantized_round import BITS
from tncompile.runtime.quantized_sites import worth_storing
from tncompile.runtime.quantized_stored import Writer, smaller

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_RECURRENT = ("LSTM", "GRU", "RNN")


def store(model: ModelProto, choice: Mapping[str, str], names: Names) -> None:
    """Let the weights of chosen networks be smaller in the file. Edits the model.

    A weight is, where every node that reads it is chosen; of several ways the most exact. Of a weight that is computed
    from others at load, such as one stored as its cores, those others are stored so.
    """
    if not choice:
        return
    constants = Constants(model)
    readers: dict[str, list[tuple[NodeProto, int, str]]] = {}
    for graph in graphs_of(model.graph):
        for node in graph.node:
            if identity(node) not in constants.folds:
                for position, name in enumerate(node.input):
                    for source in constants.sources(name) if name in constants else ():
                        readers.setdefault(source, []).append((node, position, name))
    shown = {o.name for graph in graphs_of(model.graph) for o in graph.output}
    made: list[NodeProto] = []
    for name in constants.initializers:
        keys = {key_of(node) for node, _, _ in readers.get(name, [])}
        if not keys or not keys <= choice.keys() or name in shown:
            continue
        bits = min((choice[key] for key in keys), key=BITS.index)
        if not worth_storing(name, bits, constants):
            continue
        array = constants.array(name)
        node, position, read = readers[name][0]
        known = constants.is_copy(read, name)
        axes = _channels(node, position, array.ndim) if known else tuple(range(array.ndim - 1))
        writer = Writer(name, names, {NETWORK: key_of(node), "tncompile.fold": name})
        if smaller(array, bits, axes, writer, name):
            made += writer.nodes
    _first(model, made)


def _channels(node: NodeProto, position: int, rank: int) -> tuple[int, ...]:
    """The axes of a weight that number what is computed from it, not what it is summed over."""
    summed = rank - 1
    if node.op_type == "MatMul" and position == 1:
        summed = rank - 2
    elif node.op_type == "Gemm":
        transposed = bool(attribute(node, "transA" if position == 0 else "transB", 0))
        summed = 0 if transposed == (position == 0) else 1
    elif node.op_type == "Conv":
        return (0,)
    elif node.op_type == "ConvTranspose":
        return (1,)
    elif node.op_type in _RECURRENT:
        return (0, 1)
    return tuple(axis for axis in range(rank) if axis != summed)


def _first(model: ModelProto, made: list[NodeProto]) -> None:
    """Put nodes before all others; what they compute is no initializer any more."""
    outputs = {name for node in made for name in node.output}
    graph = model.graph
    nodes, kept = [*graph.node], [t for t in graph.initializer if t.name not in outputs]
    del graph.node[:], graph.initializer[:]
    graph.node.extend([*made, *nodes])
    graph.initializer.extend(kept)


def finish(model: ModelProto, names: Names) -> None:
    """Add new initializers, and drop what nobody reads any more. Edits the model."""
    graph = model.graph
    graph.initializer.extend(names.initializers.values())
    folds = Constants(model).folds
    read: set[str] = set()
    for part in [*graphs_of(graph)][::-1]:  # inner ones first, so that `read` has what they read of outer ones
        read |= {o.name for o in part.output}
        nodes: list[NodeProto] = []
        for node in reversed(part.node):
            if identity(node) not in folds or read & {*node.output}:
                nodes.append(node)
                read |= {*node.input}
        del part.node[:]
        part.node.extend(nodes[::-1])
    initializers = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    for part in graphs_of(model.graph):
        made = {name for node in part.node for name in node.output}
        infos = [v for v in part.value_info if v.name in made]
        del part.value_info[:]
        part.value_info.extend(infos)
    domains = {node.domain for part in graphs_of(model.graph) for node in part.node}
    if "com.microsoft" in domains and all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
