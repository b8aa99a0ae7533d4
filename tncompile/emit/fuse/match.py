"""What rules share: reading the graph backwards, shapes, constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from tncompile.emit.graph import Arranged
from tncompile.ir import Array

MICROSOFT = "com.microsoft"
"""The domain of the operators that every build of ONNX Runtime has beyond ONNX's own."""

Dims = tuple[int | str, ...]


def is_op(node: onnx_ir.Node | None, *kinds: str) -> bool:
    """Whether a node is one of these ONNX operators."""
    return node is not None and node.domain == "" and node.op_type in kinds


def producer(value: onnx_ir.Value | None, *kinds: str) -> onnx_ir.Node | None:
    """The node that makes a value, where it is one of these ONNX operators."""
    node = None if value is None else value.producer()
    return node if is_op(node, *kinds) else None


def only_reader(value: onnx_ir.Value, *kinds: str) -> onnx_ir.Node | None:
    """The one node that reads a value, once, where it is one of these operators and the model does not show it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node if is_op(uses[0].node, *kinds) else None


def shape_of(value: onnx_ir.Value | None) -> Dims | None:
    """Sizes, or names of sizes known at run time; None where any is unknown."""
    if value is None or value.shape is None:
        return None
    found: list[int | str] = []
    for dim in value.shape:
        size = dim if isinstance(dim, int) else dim.value
        if size is None:
            return None
        found.append(size)
    return tuple(found)


def constant(value: onnx_ir.Value | None) -> Array | None:
    """The numbers of an initializer that nobody can feed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: Array = value.const_value.numpy()
    return array


def constant_shape(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    """The shape of such an initializer, whose numbers need not be there yet."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def number(value: onnx_ir.Value | None) -> float | None:
    """A constant of one element."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def attribute(node: onnx_ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


class Editor:
    """Adds nodes and initializers to a graph under names that are not taken."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.taken = {*graph.initializers, *(v.name for v in graph.inputs)}
        for node in graph.all_nodes():
            self.taken |= {node.name, *(v.name for v in node.outputs)}
        self._rearranged: dict[tuple[onnx_ir.Value, tuple[int | None, ...]], onnx_ir.Value] = {}

    def name(self, base: str) -> str:
        """`base`, with a number behind it where it is taken."""
        name, count = base, 1
        while name in self.taken:
            count += 1
            name = f"{base}.{count}"
        self.taken.add(name)
        return name

    def constant(self, base: str, array: Array) -> onnx_ir.Value:
        """A new initializer. (Equal ones are joined when the model is finished.)"""
        name = self.name(base)
        kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
        tensor = onnx_ir.tensor(array, name=name)
        value = onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def rearranged(self, value: onnx_ir.Value, base: str, order: Sequence[int | None]) -> onnx_ir.Value:
        """A constant with its axes in another order, None being a new one of size 1: one for all who ask for the same.
        It is made when it is written, and is known to be what `value` was contracted from."""
        key = value, tuple(order)
        if key not in self._rearranged:
            self._rearranged[key] = self._rearrange(value, base, order)
        return self._rearranged[key]

    def _rearrange(self, value: onnx_ir.Value, base: str, order: Sequence[int | None]) -> onnx_ir.Value:
        tensor, shape = value.const_value, constant_shape(value)
        assert tensor is not None and shape is not None
        kept = [axis for axis in order if axis is not None]
        sizes = [1 if axis is None else shape[axis] for axis in order]
        name = self.name(base)

        def made() -> onnx_ir.TensorProtocol:
            return onnx_ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(kept)).reshape(sizes), name=name)

        lazy = onnx_ir.LazyTensor(made, dtype=tensor.dtype, shape=onnx_ir.Shape(sizes), name=name)
        new = onnx_ir.Value(name=name, type=value.type, shape=onnx_ir.Shape(sizes), const_value=lazy)
        self.graph.register_initializer(new)
        arranged = Arranged.of(value)
        if arranged is not None:
            Arranged(arranged.core, tuple(() if k is None else arranged.groups[k] for k in order)).note(new)
        return new

    def node(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        like: onnx_ir.Node,
        shape: Dims | None = None,
        domain: str = "",
        behind: bool = False,
        **attributes: Any,
    ) -> onnx_ir.Value:
        """A node of one output in front of `like` or behind it, of whose layer and type it is."""
        node = onnx_ir.node(op_type, inputs, attributes, domain=domain)
        node.name = self.name(f"{(like.name or like.op_type).rpartition('/')[0] or 'fused'}/{op_type}")
        node.metadata_props.update(like.metadata_props)
        (output,) = node.outputs
        output.name = self.name(f"{node.name}:out")
        if shape is not None:
            output.shape = onnx_ir.Shape(shape)
        output.type = like.outputs[0].type
        graph = like.graph or self.graph  # that of a branch, where `like` is in one
        (graph.insert_after if behind else graph.insert_before)(like, node)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return output

    def reshape(
        self,
        value: onnx_ir.Value,
        sizes: Sequence[int],
        like: onnx_ir.Node,
        shape: Dims | None = None,
        behind: bool = False,
    ) -> onnx_ir.Value:
        """A Reshape; 0 copies a size, -1 is the rest."""
        text = "x".join(map(str, sizes)).replace("-1", "n")
        target = self.constant(f"shape_{text}", np.asarray(sizes, np.int64))
        return self.node("Reshape", [value, target], like, shape, behind=behind)


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let all readers of a value, and the model's outputs, take another."""
    if new.shape is None:
        new.shape = old.shape
    new.type = old.type
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
