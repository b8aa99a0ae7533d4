"""A scheduled program -> an ONNX model.

Opaque nodes are lowered by torch's own exporter (`tncompile.emit.opaque`), which leaves a placeholder node for
each network; the network's own nodes take its place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir

from tncompile.emit.copied import rebuild
from tncompile.emit.fuse import fuse
from tncompile.emit.graph import Arranged, Symbols, Weights
from tncompile.emit.interface import finish, name_interface
from tncompile.emit.network import lower
from tncompile.emit.opaque import DOMAIN, OPSET, export
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Network, Node, Opaque, Program, Ref, Switch, Value, dims, evaluate

Lowered = tuple[list[onnx_ir.Node], onnx_ir.Value]
Shape = onnx_ir.Shape | None


def to_onnx(program: Program, traced: ImportedModel) -> onnx_ir.Model:
    """The ONNX model of a program whose networks are scheduled.

    Only operators that every onnxruntime has, or that an ONNX model came with; UnsupportedError, with the operator and
    the user's line, where torch's exporter has no translation.
    """
    return named(lowered(program, traced), program, traced)


def lowered(program: Program, traced: ImportedModel) -> onnx_ir.Model:
    """The nodes of a program, under names of their own."""
    if isinstance(traced, OnnxModel):
        model = rebuild(program, traced)
    elif not any(isinstance(node, Opaque) for node in program.nodes):
        model = _of_placeholders(program)  # nothing for the exporter to do
    else:
        program = _constants_as_weights(program)
        model = export(program, traced)
    _lower_networks(model, program)
    fuse(model)
    return model


def named(model: onnx_ir.Model, program: Program, traced: ImportedModel) -> onnx_ir.Model:
    """The same with the traced model's names and the program's text; edits the model."""
    name_interface(model, program, traced)
    return finish(model, program, traced)


def network_model(network: Network, shown: bool = True) -> onnx_ir.Model:
    """A model of one scheduled network, whose operands are its inputs: what is timed to choose between plans.

    Where the value is not `shown`, a Relu reads it.
    """
    inputs = {t.name: Value(t.name, network.dtype, t.shape) for t in network.operands}
    program = Program(tuple(inputs.values()), (network,), ((network.output.name, network.output.name),))
    model = _of_placeholders(program)
    model.graph.name = "network"  # which onnx requires
    _lower_networks(model, program)
    if not shown:
        (value,) = model.graph.outputs
        reader = onnx_ir.node("Relu", [value])
        reader.outputs[0].name, reader.outputs[0].type, reader.outputs[0].shape = "read", value.type, value.shape
        model.graph.append(reader)
        model.graph.outputs[0] = reader.outputs[0]
    return model


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
        return onnx_ir.Value(name=item.name, type=_type(item.dtype), shape=onnx_ir.Shape(item.shape or ()))

    values = {given.name: value(given) for given in program.inputs}
    nodes = []
    for item in program.nodes:
        values[item.value.name] = value(item.value)
        inputs = [values[name] for name in item.inputs]
        plan = {"plan": item.value.name}
        outputs = [values[item.value.name]]
        nodes.append(onnx_ir.node("Network", inputs, plan, domain=DOMAIN, outputs=outputs))
    graph = onnx_ir.Graph(
        [values[given.name] for given in program.inputs],
        [values[name] for _, name in program.outputs],
        nodes=nodes,
        opset_imports={"": OPSET},
    )
    return onnx_ir.Model(graph, ir_version=10)


def _lower_networks(model: onnx_ir.Model, program: Program) -> None:
    graph = model.graph
    lowered = {n.value.name: n for n in program.nodes if not isinstance(n, Opaque)}
    shared = {
        id(array): graph.initializers[name] for name, array in program.weights.items() if name in graph.initializers
    }
    for name, core in program.made.items():
        if name in graph.initializers and program.weights.get(name) is core.data:
            Arranged(core, tuple(tuple(i.name for i in axis) for axis in core.axes)).note(graph.initializers[name])
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    weights = Weights(shared, {*graph.initializers, *program.values, *(v.name for v in values if v.name)})
    symbols: dict[str, tuple[onnx_ir.Value, int, int]] = {}
    for value, given in zip(graph.inputs, program.inputs, strict=True):
        for axis, size in enumerate(given.shape or ()):
            for symbol in dims.symbols(size):
                if times := dims.shows(size, symbol):
                    symbols.setdefault(symbol, (value, axis, times))
    lowering = _Lowering(graph, weights, symbols)
    placeholders = {id(o) for node in graph if node.domain == DOMAIN for o in node.outputs}
    names = {v.name for v in values if id(v) not in placeholders} | {*graph.initializers}
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        item = lowered[node.attributes["plan"].as_string()]
        old = node.outputs[0]
        operands = dict(zip(item.inputs, node.inputs, strict=True))
        nodes, result = lowering.run(item, operands, old.shape)  # type: ignore[arg-type]
        graph.insert_before(node, nodes)
        onnx_ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if item.value.name not in names:  # the exporter numbers its own values anew, and may have taken it
            result.name = item.value.name
        names.add(item.value.name)
    for value in weights.values.values():
        graph.register_initializer(value)


class _Lowering:
    """Networks and switches of one graph to nodes; names, weights and conditions are shared by all of them."""

    def __init__(self, graph: onnx_ir.Graph, weights: Weights, symbols: Symbols) -> None:
        self.graph = graph
        self.weights = weights
        self.symbols = symbols
        outputs = (output.name or "" for node in graph.all_nodes() for output in node.outputs)
        self.taken = {node.name or "" for node in graph.all_nodes()} | {n.removesuffix(":out") for n in outputs}
        self.conditions: dict[tuple[str, int], onnx_ir.Value] = {}

    def run(self, item: Network | Switch, operands: Mapping[str, onnx_ir.Value], shape: Shape) -> Lowered:
        """The nodes of a network or a switch, and the value they end in."""
        if isinstance(item, Network):
            return self._network(item, operands, shape)
        nodes, result = self._network(item.cases[-1], operands, shape)
        for limit, case in zip(reversed(item.limits), reversed(item.cases[:-1]), strict=True):
            branches = {"then_branch": self._network(case, operands, shape), "else_branch": (nodes, result)}
            graphs = {key: onnx_ir.Graph([], [r], nodes=n, name=key) for key, (n, r) in branches.items()}
            choice = onnx_ir.node("If", [self._condition(item.symbol, limit)], graphs, name=f"{item.label}/If")
            nodes, result = [choice], choice.outputs[0]
            result.type, result.shape = _type(item.dtype), shape
            _label(nodes, item.cases[0], self.taken)
        return nodes, result

    def _network(self, network: Network, operands: Mapping[str, onnx_ir.Value], shape: Shape) -> Lowered:
        mine = {name: operands[name] for name in network.inputs}
        nodes, result = lower(network, mine, self.weights, self.symbols)
        if result.producer() is None or result in mine.values():  # an initializer or an operand as it is
            nodes.append(onnx_ir.node("Identity", [result], name=f"{network.label}/Identity"))
            result = nodes[-1].outputs[0]
        result.type, result.shape = _type(network.dtype), shape
        _label(nodes, network, self.taken)
        return nodes, result

    def _condition(self, symbol: str, limit: int) -> onnx_ir.Value:
        """Whether a run-time size is at most a limit: two nodes at the start of the graph."""
        if (symbol, limit) not in self.conditions:
            value, axis, times = self.symbols[symbol]
            bound = self.weights.add(f"size_{limit * times}", np.asarray([limit * times], np.int64))
            size = onnx_ir.node("Shape", [value], {"start": axis, "end": axis + 1}, name=f"{symbol}_{limit}/Shape")
            least = onnx_ir.node("LessOrEqual", [size.outputs[0], bound], name=f"{symbol}_{limit}/LessOrEqual")
            for node in (size, least):
                node.outputs[0].name = f"{node.name}:out"
            first = next(iter(self.graph))
            self.graph.insert_before(first, [size, least])
            self.conditions[symbol, limit] = least.outputs[0]
        return self.conditions[symbol, limit]


def _type(dtype: str) -> onnx_ir.TensorType:
    return onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(dtype)))


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
