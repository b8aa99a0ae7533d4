"""Regions of a graph computed over values of another shape, for the sake of the convolutions in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Dims, Editor, constant, constant_shape, shape_of

_SPATIAL = ("Conv", "MaxPool", "AveragePool")
_ELEMENTWISE = (
    "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus", "HardSigmoid", "HardSwish", "Gelu", "Clip", "Erf",
    "BatchNormalization", "PRelu", "Add", "Sub", "Mul", "Div", "Max", "Min", "Identity",
)  # fmt: skip


class Turn(ABC):
    """A change of shape for regions of nodes that hang together: convolutions, pools and elementwise functions.

    Where a value enters a region it is reshaped, and back where it leaves; a Reshape that is there anyway is changed
    instead.
    """

    @abstractmethod
    def fits(self, shape: Dims) -> bool:
        """Whether a value of this shape may be in a region."""

    @abstractmethod
    def takes(self, node: onnx_ir.Node) -> bool:
        """Whether a convolution or a pool over values that fit may be in a region."""

    @abstractmethod
    def keeps(self, node: onnx_ir.Node, position: int) -> bool:
        """Whether an elementwise function may be in a region with the constant that it reads there."""

    @abstractmethod
    def turned(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """The shape that a value has in a region."""

    @abstractmethod
    def window(self, values: Sequence[int], alone: int) -> tuple[int, ...]:
        """The values of an attribute that has one for each axis of space; `alone` is that of an axis of size 1."""

    @abstractmethod
    def rewrite(self, node: onnx_ir.Node, editor: Editor) -> None:
        """Change the constants of a node of a region."""

    def apply(self, graph: onnx_ir.Graph) -> int:
        """Turn every region that has a Conv; how many there were."""
        editor = Editor(graph)
        count, seen = 0, set[onnx_ir.Node]()
        for node in list(graph):
            if node not in seen and match.is_op(node, "Conv") and self._is_member(node):
                region = self._region(node)
                seen |= region
                self._turn([n for n in graph if n in region], editor)
                count += 1
        return count

    def _fits(self, value: onnx_ir.Value | None) -> bool:
        shape = shape_of(value)
        return shape is not None and self.fits(shape)

    def _is_member(self, node: onnx_ir.Node) -> bool:
        if len(node.outputs) != 1 or not self._fits(node.outputs[0]):
            return False
        if match.is_op(node, *_SPATIAL):
            return self._fits(node.inputs[0]) and self.takes(node)
        if not match.is_op(node, *_ELEMENTWISE):
            return False
        return all(
            self.keeps(node, k) if constant_shape(value) is not None else self._fits(value)
            for k, value in enumerate(node.inputs)
            if value is not None
        )

    def _region(self, start: onnx_ir.Node) -> set[onnx_ir.Node]:
        found, todo = {start}, [start]
        while todo:
            node = todo.pop()
            around = [v.producer() for v in node.inputs if v is not None and self._fits(v)]
            around += [use.node for use in node.outputs[0].uses()]
            for other in around:
                if other is not None and other not in found and self._is_member(other):
                    found.add(other)
                    todo.append(other)
        return found

    def _turn(self, region: list[onnx_ir.Node], editor: Editor) -> None:
        inside = {*region}
        turned: dict[onnx_ir.Value, onnx_ir.Value] = {}
        for node in region:
            for position, value in enumerate(node.inputs):
                if value is None or constant_shape(value) is not None or value.producer() in inside:
                    continue
                if value not in turned:
                    turned[value] = self._inward(value, node, editor)
                node.replace_input_with(position, turned[value])
            if match.is_op(node, *_SPATIAL):
                self._turn_attributes(node)
            self.rewrite(node, editor)
        for node in region:
            self._outward(node, inside, editor)

    def _turn_attributes(self, node: onnx_ir.Node) -> None:
        for name in ("kernel_shape", "strides", "dilations"):
            values = match.attribute(node, name)
            if values is not None:
                node.attributes[name] = onnx_ir.AttrInt64s(name, self.window(values, 1))
        pads = match.attribute(node, "pads")
        if pads is not None:
            half = len(pads) // 2
            sides = (*self.window(pads[:half], 0), *self.window(pads[half:], 0))
            node.attributes["pads"] = onnx_ir.AttrInt64s("pads", sides)

    def _inward(self, value: onnx_ir.Value, reader: onnx_ir.Node, editor: Editor) -> onnx_ir.Value:
        old = shape_of(value) or ()
        shape = self.turned(old)
        before = match.producer(value, "Reshape")
        sizes = constant(before.inputs[1]) if before is not None else None
        if before is not None and sizes is not None and 0 not in sizes:
            source = before.inputs[0]
            assert source is not None
            return editor.reshape(source, self.turned([int(s) for s in sizes]), reader, shape)
        return editor.reshape(value, _sizes(old, shape), reader, shape)

    def _outward(self, node: onnx_ir.Node, inside: set[onnx_ir.Node], editor: Editor) -> None:
        """What a node of the region gives to others, as it was. Who reshapes it anyway need not care."""
        value = node.outputs[0]
        shape = shape_of(value)
        assert shape is not None
        turned = self.turned(shape)
        value.shape = onnx_ir.Shape(turned)
        restored: onnx_ir.Value | None = None
        for use in list(value.uses()):
            if use.node in inside or _reshapes(use.node):
                continue
            restored = restored or editor.reshape(value, _sizes(turned, shape), node, shape, behind=True)
            if restored.producer() is not use.node:
                use.node.replace_input_with(use.idx, restored)
        if value.is_graph_output():
            restored = restored or editor.reshape(value, _sizes(turned, shape), node, shape, behind=True)
            for position, output in enumerate(editor.graph.outputs):
                if output is value:
                    editor.graph.outputs[position] = restored


def constant_bias(node: onnx_ir.Node) -> bool:
    """Whether a Conv has a bias that is known at compile time, or none."""
    return len(node.inputs) < 3 or node.inputs[2] is None or constant_shape(node.inputs[2]) is not None


def _sizes(old: Dims, new: Dims) -> list[int]:
    """The sizes that a Reshape takes: those that are known; -1 for one that is not, 0 where it stays in its place and
    another is not known either."""
    unknown = [k for k, size in enumerate(new) if not isinstance(size, int)]
    if len(unknown) < 2:
        return [size if isinstance(size, int) else -1 for size in new]
    stays = [k for k in unknown if k < len(old) and old[k] == new[k]]
    return [0 if k in stays else size if isinstance(size, int) else -1 for k, size in enumerate(new)]


def _reshapes(node: onnx_ir.Node) -> bool:
    sizes = constant(node.inputs[1]) if match.is_op(node, "Reshape") else None
    return sizes is not None and 0 not in sizes
