"""An ONNX model as the quantizers see it: its graphs, its constants and who reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tncompile.errors import LoadError, TNCompileError
from tncompile.ir import Array
from tncompile.runtime.session import Session

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

NETWORK = "tncompile.network"
"""The metadata of a node that has the value of the network it is a part of."""

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_SHAPE = 64  # numbers of a constant that may be a shape

_QUANTIZED = {"DequantizeLinear", "QuantizeLinear"}


def read(data: bytes) -> ModelProto:
    """The message of a whole model. LoadError where it is none, or where its weights are in other files."""
    import onnx

    try:
        model: ModelProto = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's own errors have no common base
        raise LoadError(f"not a readable ONNX model ({error}); give the bytes of one") from error
    if not model.HasField("graph"):
        raise LoadError("not a readable ONNX model (it has no graph); give the bytes of one")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for g in graphs_of(model.graph) for t in g.initializer):
        raise LoadError(
            "the model's weights are in a file of their own; read both with onnx.load(path).SerializeToString()"
        )
    return model


def written(model: ModelProto) -> bytes:
    """The bytes of a model, the same for the same model. TNCompileError where it is no valid one."""
    import onnx

    data: bytes = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(data)
    except Exception as error:  # onnx's own; a model over 2 GB is a plain ValueError
        raise TNCompileError(f"the quantized model is not valid ONNX, a fault of tncompile: {error}") from error
    return data


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs_of(inner)


def identity(node: NodeProto) -> str:
    """What a node is known by: the first value that it computes, as names of values are unique."""
    return next((name for name in node.output if name), "")


def key_of(node: NodeProto) -> str:
    """The key of a node in a choice: the value of the network that it is a part of, else its own first value."""
    return next((p.value for p in node.metadata_props if p.key == NETWORK), identity(node))


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute, or a default."""
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class Constants:
    """The constants of a model by name: initializers of the main graph, and what nodes compute from those alone."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.initializers: Mapping[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.folds: dict[str, NodeProto] = {}
        given = {i.name for i in model.graph.input}
        self._sources: dict[str, frozenset[str]] = {n: frozenset([n]) for n in self.initializers if n not in given}
        for node in (node for graph in graphs_of(model.graph) for node in graph.node):
            constant = all(name in self._sources for name in node.input if name) and not any(subgraphs(node))
            if constant and node.op_type not in _RANDOM | _QUANTIZED:
                read = frozenset[str]().union(*(self._sources[name] for name in node.input if name))
                for name in filter(None, node.output):
                    self._sources[name], self.folds[name] = read, node
        self._arrays: dict[str, Array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    @cached_property
    def types(self) -> Mapping[str, tuple[int, tuple[int, ...] | None]]:
        """Element type and shape of each value that has a known one, in all graphs."""
        import onnx

        known: dict[str, tuple[int, tuple[int, ...] | None]] = {
            t.name: (t.data_type, tuple(t.dims)) for t in self.initializers.values()
        }
        light = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        for part in ("node", "input", "output", "value_info"):
            getattr(light.graph, part).extend(getattr(self.model.graph, part))
        for tensor in self.initializers.values():
            if math.prod(tensor.dims) <= _SHAPE:
                light.graph.initializer.append(tensor)
            else:
                light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        try:
            inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
        except Exception:  # what the file says itself is enough for most
            inferred = light
        for graph in graphs_of(inferred.graph):
            for value in (*graph.input, *graph.value_info, *graph.output):
                tensor = value.type.tensor_type
                shape = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
                known[value.name] = (tensor.elem_type, tuple(shape) if tensor.HasField("shape") else None)
        return known

    def is_float(self, name: str) -> bool:
        """Whether a constant is a float32 array."""
        from onnx import TensorProto

        if name in self.initializers:
            return name in self and self.initializers[name].data_type == TensorProto.FLOAT
        return name in self and self.types.get(name, (0, None))[0] == TensorProto.FLOAT

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a constant."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        shape = self.types[name][1] if name in self.types else None
        return shape if shape is not None else tuple(self.array(name).shape)

    def array(self, name: str) -> Array:
        """The value of a constant."""
        import onnx

        if name not in self._arrays:
            if name in self.initializers:
                return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))
            self._arrays[name] = self._computed(name)
        return self._arrays[name]

    def sources(self, name: str) -> frozenset[str]:
        """The initializers that a constant is made of; itself where it is one."""
        return self._sources[name]

    def is_copy(self, name: str, source: str) -> bool:
        """Whether a constant is another one, or a Reshape of it to its own shape, as in a branch that reads it."""
        if name == source:
            return True
        node = self.folds.get(name)
        reshaped = node is not None and node.op_type == "Reshape" and node.input[0] == source
        return reshaped and self.shape(name) == self.shape(source)

    def _below(self, name: str) -> list[NodeProto]:
        """The nodes that compute a constant, in order."""
        wanted, found = {name}, []
        for node in reversed([node for graph in graphs_of(self.model.graph) for node in graph.node]):
            if wanted & {*node.output} and identity(node) in self.folds:
                wanted |= {*node.input}
                found.append(node)
        return found[::-1]

    def _computed(self, name: str) -> Array:
        """What ONNX Runtime folds a constant to."""
        import onnx

        nodes = self._below(name)
        leaves = sorted(self.sources(name))
        output = onnx.helper.make_tensor_value_info(name, self.types.get(name, (onnx.TensorProto.FLOAT,))[0], None)
        graph = onnx.helper.make_graph(nodes, "fold", [], [output], [self.initializers[leaf] for leaf in leaves])
        model = onnx.helper.make_model(graph, ir_version=10, opset_imports=self.model.opset_import)
        return Session(model.SerializeToString(), threads=1).run({})[name]
