"""A scheduled program -> an ONNX model.

Opaque nodes are lowered by torch's own exporter (`tncompile.emit.opaque`), which leaves a placeholder node for
each network; the network's own nodes take its place here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir

from tncompile.emit.fuse import fuse
from tncompile.emit.graph import Weights
from tncompile.emit.interface import finish, name_interface
from tncompile.emit.network import lower
from tncompile.emit.opaque import DOMAIN, OPSET, export
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Network, Node, Opaque, Program, Ref, Value, dims, evaluate


def to_onnx(program: Program, traced: TracedModel) -> onnx_ir.Model:
    """The ONNX model of a program whose networks are scheduled.

    Only standard operators and domains; UnsupportedError, with the operator and the user's line, where
    torch's exporter has no translation.
    """
    if all(isinstance(node, Network) for node in program.nodes):
        model = _of_placeholders(program)  # nothing for the exporter to do
    else:
        program = _constants_as_weights(program)
        model = export(program, traced)
    _lower_networks(model, program)
    fuse(model)
    name_interface(model, program, traced)
    return finish(model, program)


def _constants_as_weights(program: Program) -> Program:
    """Networks of cores alone, which are outputs of the model, as weights that are shown as they are."""
    weights, nodes = dict(program.weights), list[Node]()
    for node in program.nodes:
        if isinstance(node, Network) and not node.operands:
            name = f"{node.output.name}.value"
            weights[name] = evaluate(node).astype(node.dtype)
            node = Opaque(node.name, "aten.clone.default", (Ref(name),), (), node.value, node.source)
        nodes.append(node)
    return replace(program, nodes=tuple(nodes), weights=weights)


def _of_placeholders(program: Program) -> onnx_ir.Model:
    """A model of networks alone, each still one placeholder node."""

    def value(item: Value) -> onnx_ir.Value:
        kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(item.dtype)))
        return onnx_ir.Value(name=item.name, type=kind, shape=onnx_ir.Shape(item.shape or ()))

    values = {item.name: value(item) for item in program.inputs}
    nodes = []
    for network in program.networks:
        values[network.output.name] = value(network.value)
        inputs = [values[name] for name in network.inputs]
        plan = {"plan": network.output.name}
        outputs = [values[network.output.name]]
        nodes.append(onnx_ir.node("Network", inputs, plan, domain=DOMAIN, outputs=outputs))
    graph = onnx_ir.Graph(
        [values[item.name] for item in program.inputs],
        [values[name] for _, name in program.outputs],
        nodes=nodes,
        opset_imports={"": OPSET},
    )
    return onnx_ir.Model(graph, ir_version=10)


def _lower_networks(model: onnx_ir.Model, program: Program) -> None:
    graph = model.graph
    networks = {n.output.name: n for n in program.networks}
    shared = {
        id(array): graph.initializers[name] for name, array in program.weights.items() if name in graph.initializers
    }
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    weights = Weights(shared, {*graph.initializers, *program.values, *(v.name for v in values if v.name)})
    symbols: dict[str, tuple[onnx_ir.Value, int, int]] = {}
    for value, item in zip(graph.inputs, program.inputs, strict=True):
        for axis, size in enumerate(item.shape or ()):
            for symbol in dims.symbols(size):
                times = dims.divide(size, symbol)
                if isinstance(times, int):
                    symbols.setdefault(symbol, (value, axis, times))
    taken: set[str] = set()
    placeholders = {id(o) for node in graph if node.domain == DOMAIN for o in node.outputs}
    names = {v.name for v in values if id(v) not in placeholders} | {*graph.initializers}
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        network = networks[node.attributes["plan"].as_string()]
        operands = dict(zip(network.inputs, node.inputs, strict=True))
        nodes, result = lower(network, operands, weights, symbols)  # type: ignore[arg-type]
        old = node.outputs[0]
        if result.producer() is None or result in operands.values():  # an initializer or an operand as it is
            nodes.append(onnx_ir.node("Identity", [result], name=f"{network.label}/Identity"))
            result = nodes[-1].outputs[0]
        result.type, result.shape = onnx_ir.TensorType(onnx_ir.DataType[_onnx_dtype(network.dtype)]), old.shape
        _label(nodes, network, taken)
        graph.insert_before(node, nodes)
        onnx_ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if network.output.name not in names:  # the exporter numbers its own values anew, and may have taken it
            result.name = network.output.name
        names.add(network.output.name)
    for value in weights.values.values():
        graph.register_initializer(value)


def _onnx_dtype(name: str) -> str:
    return {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16"}[name]


def _label(nodes: list[onnx_ir.Node], network: Network, taken: set[str]) -> None:
    """Unique node names, and the layer, bonds and source line where Netron shows them."""
    sizes = {i.name: i.size for i in network.indices.values()}
    bonds = {i.name for t in network.cores for i in t.indices} - {i.name for i in network.output.indices}
    bonds -= {i.name for t in network.operands for i in t.indices}
    for node in nodes:
        base, number = node.name or node.op_type, 1
        name = base
        while name in taken:
            number += 1
            name = f"{base}.{number}"
        taken.add(name)
        node.name = name
        for output in node.outputs:
            output.name = f"{name}:out"
        node.metadata_props["tncompile.network"] = network.output.name
        node.metadata_props["tncompile.layer"] = network.name
        if bonds:
            node.metadata_props["tncompile.bonds"] = " ".join(f"{b}={sizes[b]}" for b in sorted(bonds))
        if network.source.file:
            node.metadata_props["tncompile.source"] = f"{network.source.file}:{network.source.line}"
