"""Cores in the place of weights of an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tncompile.errors import TNCompileError
from tncompile.frontend.factors import Core, Factors
from tncompile.frontend.onnx.importer import OnnxModel, import_proto
from tncompile.frontend.onnx.load import graphs
from tncompile.frontend.onnx.prepare import whole
from tncompile.ir.edit import fresh

_EINSUM_SINCE = 12


def substitute_onnx(model: OnnxModel, factors: Sequence[Factors]) -> OnnxModel:
    """The file with an initializer for each core, in the dtype of the weight, imported again.

    The last node that rebuilds a weight gives the weight's name to what it computes, so that whatever reads it, in
    branches too, stays as it is. Where the file itself has no such weight (functions that were inlined, old operator
    sets), it is the model as prepared for the import that is edited.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.file)
    if not _can_hold(proto, factors):
        proto = whole(model.model)
    edit = _Edit(proto.graph)
    arrays = model.program.arrays
    for one in factors:
        array = arrays.get(one.weight)
        if array is None:
            raise TNCompileError(f"the model has no weight {one.weight}")
        if array.dtype.kind != "f" or array.shape != one.shape:
            raise TNCompileError(f"{one.weight} is {array.dtype}{[*array.shape]}, its cores make {[*one.shape]}")
        edit.replace(one, array.dtype)
    edit.finish()
    return import_proto(proto, model.folder)


def _can_hold(proto: onnx.ModelProto, factors: Sequence[Factors]) -> bool:
    """Whether the file has all weights under the names of the program, and an operator set with Einsum."""
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    known = {tensor.name for tensor in proto.graph.initializer}
    known |= {name for node in proto.graph.node for name in node.output}
    return opset >= _EINSUM_SINCE and all(one.weight in known for one in factors)


class _Edit:
    """One editing of a graph, in place."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.names = {name for part in graphs(graph) for name in _defined(part)}
        self.nodes: list[onnx.NodeProto] = []
        self.cores: set[str] = set()

    def replace(self, factors: Factors, dtype: np.dtype[np.floating]) -> None:
        """Put cores in the place of a weight, or of the node that computes it."""
        self._take_out(factors.weight)
        for core in factors.cores:
            self._add(core, dtype)
        rebuilding = factors.rebuilding
        values, chain = [core.name for core in factors.cores], list[onnx.NodeProto]()

        def call(kind: str, inputs: Sequence[str], **attributes: Any) -> None:
            values.append(self._name(f"{factors.weight}.{kind.lower()}"))
            chain.append(helper.make_node(kind, inputs, values[-1:], values[-1], **attributes))

        for step in rebuilding.steps:
            call("Einsum", [values[k] for k in step.inputs], equation=step.equation)
        if rebuilding.shape is not None:
            shape = self._name(f"{factors.weight}.shape")
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(rebuilding.shape, np.int64), shape))
            call("Reshape", [values[-1], shape])
        if rebuilding.order is not None:
            call("Transpose", [values[-1]], perm=rebuilding.order)
        chain[-1].output[0] = factors.weight
        self.nodes += chain

    def finish(self) -> None:
        """Put the new nodes before all others."""
        nodes = [*self.nodes, *self.graph.node]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def _add(self, core: Core, dtype: np.dtype[np.floating]) -> None:
        if core.name in self.cores:
            return
        if core.name in self.names:
            raise TNCompileError(f"the model has a value {core.name} already")
        self.names.add(core.name)
        self.cores.add(core.name)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(core.array, dtype), core.name))

    def _name(self, wanted: str) -> str:
        name = fresh(wanted, self.names)
        self.names.add(name)
        return name

    def _take_out(self, weight: str) -> None:
        """Remove a weight; of one that is computed, also what it is computed from where nothing else reads that."""
        self._remove_initializer(weight)
        todo = self._remove_node(weight)
        while todo:
            name, read = todo.pop(), self._read()
            if name and name not in read:
                self._remove_initializer(name)
                todo += self._remove_node(name, read)

    def _remove_initializer(self, name: str) -> None:
        for items in (self.graph.initializer, self.graph.input):  # old files list weights among the inputs too
            place = next((k for k, item in enumerate(items) if item.name == name), None)
            if place is not None:
                del items[place]
            elif items is self.graph.initializer:
                return

    def _remove_node(self, name: str, read: Iterable[str] = ()) -> list[str]:
        """Remove the node that computes a value and nothing that is read; the names of its inputs."""
        for place, node in enumerate(self.graph.node):
            if name in node.output:
                if {*node.output} & {*read}:
                    return []
                inputs = list(node.input)
                del self.graph.node[place]
                return inputs
        return []

    def _read(self) -> set[str]:
        """The values that are read, in branches too, or shown."""
        nodes = [node for part in graphs(self.graph) for node in part.node] + self.nodes
        shown = {value.name for part in graphs(self.graph) for value in part.output}
        return shown | {name for node in nodes for name in node.input}


def _defined(graph: onnx.GraphProto) -> Iterable[str]:
    for item in (*graph.input, *graph.initializer):
        yield item.name
    for node in graph.node:
        yield from node.output
