"""Opaque nodes of a model that came in as ONNX: copied as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir

from tncompile.emit.made import made
from tncompile.emit.opaque import DOMAIN
from tncompile.frontend.onnx.importer import CAPTURED, OnnxModel, subgraphs, target
from tncompile.frontend.onnx.prepare import embed
from tncompile.ir import Dim, Opaque, Program, Ref, Value
from tncompile.ir.opaque import references


def rebuild(program: Program, source: OnnxModel) -> onnx_ir.Model:
    """The source's graph with the program's nodes, and a placeholder node for each network.

    Inputs keep their names, types and dimensions; opaque nodes keep their attributes and subgraphs.
    """
    model = source.model.clone()
    _Rebuild(model.graph, program, source).run()
    embed(model)  # one file comes out
    return model


@dataclass
class _Rebuild:
    """One rebuilding; `values` has the ONNX value for each of the program's, `tuples` the node behind each tuple."""

    graph: onnx_ir.Graph
    program: Program
    source: OnnxModel
    values: dict[str, onnx_ir.Value] = field(default_factory=dict)
    tuples: dict[str, onnx_ir.Node] = field(default_factory=dict)

    def run(self) -> None:
        """Replace the graph's nodes, weights and outputs."""
        nodes = self._taken_apart()
        self.values = {value.name or "": value for value in self.graph.inputs}
        self._weights()
        for item in self.program.nodes:
            if isinstance(item, Opaque):
                self._opaque(item, nodes.get(item.output.name))
                continue
            result = onnx_ir.Value(name=item.value.name)
            inputs, plan = [self.values[name] for name in item.inputs], {"plan": item.value.name}
            self.graph.append(onnx_ir.node("Network", inputs, plan, domain=DOMAIN, outputs=[result]))
            self._define(item.value, result)
        for _, name in self.program.outputs:
            self.graph.outputs.append(self.values[name])

    def _taken_apart(self) -> dict[str, onnx_ir.Node]:
        """Empty the graph; the nodes that opaque values come from, without what no other node is to see any more."""
        old = list(self.graph)
        by_output = {v.name: node for node in old for v in node.outputs if v.name}
        wanted = {node.value.name: node.target for node in self.program.nodes if isinstance(node, Opaque)}
        nodes = {
            name: by_output[next(v.name for v in origin.node.outputs if v.name)]
            for name, origin in self.source.nodes.items()
            if wanted.get(name) == target(origin.node)  # else a pass has put another in its place
        }
        self.graph.outputs.clear()
        self.graph.remove(old)
        kept = {id(node) for node in nodes.values()}
        for node in old:
            if id(node) not in kept:
                for inner in (node, *_inside(node)):
                    for position in range(len(inner.inputs)):
                        inner.replace_input_with(position, None)
        return nodes

    def _weights(self) -> None:
        """Initializers for the weights that opaque nodes read, those of the file as they are stored in it."""
        old = dict(self.graph.initializers)
        self.graph.initializers.clear()
        for name, array in self.program.weights.items():
            value = old.get(name)
            if value is None:
                tensor = onnx_ir.tensor(array, name=name)
                value = onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
                value.shape = onnx_ir.Shape(array.shape)
            self.graph.register_initializer(value)
            self.values[name] = value

    def _opaque(self, item: Opaque, node: onnx_ir.Node | None) -> None:
        if item.target == "operator.getitem":
            of, position = item.args
            assert isinstance(of, Ref) and isinstance(position, int)
            self._define(item.output, self.tuples[of.name].outputs[position])
            return
        if node is None:
            *before, node = made(item, self.values)
            self.graph.extend(before)
        else:
            self._connect(node, item)
        self.graph.append(node)
        self.tuples[item.output.name] = node
        self._define(item.output, node.outputs[0])

    def _connect(self, node: onnx_ir.Node, item: Opaque) -> None:
        """Let a node, and its subgraphs, read what the program says."""
        for position, arg in enumerate(item.args):
            node.replace_input_with(position, self.values[arg.name] if isinstance(arg, Ref) else None)
        names = self.source.nodes[item.output.name].captured
        refs = references(dict(item.kwargs).get(CAPTURED, ()))
        captured = {name: self.values[ref.name] for name, ref in zip(names, refs, strict=True)}
        if not captured:
            return
        for inner in _inside(node):
            for position, value in enumerate(inner.inputs):
                if value is not None and value.name in captured:
                    inner.replace_input_with(position, captured[value.name])
        for graph in _graphs(node):
            for position, value in enumerate(graph.outputs):
                if value.name in captured:  # a branch that is an outer value
                    copy = onnx_ir.node("Identity", [captured[value.name]])
                    copy.outputs[0].name = f"{graph.name}/{value.name}:copy{position}"
                    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
                    graph.append(copy)
                    graph.outputs[position] = copy.outputs[0]

    def _define(self, known: Value, value: onnx_ir.Value) -> None:
        """Note a value, with the type that it has in the program (and not the one that the file claimed)."""
        self.values[known.name] = value
        if known.dtype == "tuple":
            return
        value.type = (
            onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(known.dtype)))
            if known.dtype != "object"
            else value.type
        )
        value.shape = None if known.shape is None else onnx_ir.Shape([self._named(size) for size in known.shape])

    def _named(self, size: Dim) -> Dim:
        """A size in the file's own names."""
        if isinstance(size, int):
            return size
        theirs = {ours: name for name, ours in self.source.symbols.items() if name.isidentifier()}
        return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: theirs.get(m[0], m[0]), size)


def _graphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """All graphs inside a node, those inside them too."""
    for graph in subgraphs(node):
        yield graph
        for inner in graph:
            yield from _graphs(inner)


def _inside(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    for graph in _graphs(node):
        yield from graph
