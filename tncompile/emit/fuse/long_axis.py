"""Convolutions over one axis that was put first of two: the kernels of ONNX Runtime run along the last."""

from __future__ import annotations

import numpy as np
import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Editor, constant, shape_of

_SPATIAL = ("Conv", "MaxPool", "AveragePool")
_ELEMENTWISE = (
    "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus", "HardSigmoid", "HardSwish", "Gelu", "Clip", "Erf",
    "BatchNormalization", "PRelu", "Add", "Sub", "Mul", "Div", "Max", "Min", "Identity",
)  # fmt: skip


def long_axis_last(graph: onnx_ir.Graph) -> int:
    """Images of width 1 -> images of height 1; the number of regions.

        x: [batch, channels, length, 1];  Conv of [out, in, k, 1], MaxPool of [k, 1], ...
    ->
        Reshape to [batch, channels, 1, length];  Conv of [out, in, 1, k], MaxPool of [1, k], ...;  Reshape back

    The kernels for images compute several outputs of a row at once; with one column, one at a time.

    Conditions, for a region of nodes that hang together by values of four axes:
    1. at least one Conv or pool, each with a kernel of one column and nothing padded to its sides;
    2. else elementwise functions, whose constants vary along channels at most;
    3. every value of the region has a static last axis of size 1.
    """
    count, seen = 0, set[onnx_ir.Node]()
    for node in list(graph):
        if node not in seen and _is_member(node) and match.is_op(node, "Conv"):
            region = _region(node)
            seen |= region
            _swap([n for n in graph if n in region], graph)
            count += 1
    return count


def _narrow(value: onnx_ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and len(shape) == 4 and shape[3] == 1 and shape[2] != 1


def _image(value: onnx_ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and len(shape) == 4 and shape[3] == 1


def _is_member(node: onnx_ir.Node) -> bool:
    if match.is_op(node, *_SPATIAL):
        kernel = match.attribute(node, "kernel_shape")
        pads, auto = match.attribute(node, "pads"), match.attribute(node, "auto_pad", "NOTSET")
        if match.is_op(node, "Conv") and constant(node.inputs[1]) is None:
            return False
        if kernel is None and match.is_op(node, "Conv"):
            kernel = shape_of(node.inputs[1])[2:]  # type: ignore[index]
        return (
            len(node.outputs) == 1
            and _narrow(node.inputs[0])
            and _image(node.outputs[0])
            and len(kernel) == 2
            and kernel[1] == 1
            and auto in ("NOTSET", "VALID")
            and (pads is None or (pads[1] == pads[3] == 0))
        )
    if not match.is_op(node, *_ELEMENTWISE) or len(node.outputs) != 1 or not _image(node.outputs[0]):
        return False
    return all(_image(v) or _flat(v, node) for v in node.inputs if v is not None)


def _flat(value: onnx_ir.Value, node: onnx_ir.Node) -> bool:
    """A constant that is the same whichever of the last two axes comes first."""
    array = constant(value)
    if array is None:
        return False
    if match.is_op(node, "BatchNormalization"):
        return array.ndim == 1
    return (array.ndim < 2 and array.size == 1) or (array.ndim >= 2 and array.shape[-2:] == (1, 1))


def _region(start: onnx_ir.Node) -> set[onnx_ir.Node]:
    found, todo = {start}, [start]
    while todo:
        node = todo.pop()
        around = [v.producer() for v in node.inputs if v is not None and _image(v)]
        around += [use.node for use in node.outputs[0].uses()]
        for other in around:
            if other is not None and other not in found and _is_member(other):
                found.add(other)
                todo.append(other)
    return found


def _swap(region: list[onnx_ir.Node], graph: onnx_ir.Graph) -> None:
    editor, inside = Editor(graph), {*region}
    turned: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in region:
        for position, value in enumerate(node.inputs):
            if value is None or not _image(value) or constant(value) is not None or value.producer() in inside:
                continue
            if value not in turned:
                turned[value] = _turn(value, node, editor)
            node.replace_input_with(position, turned[value])
        if match.is_op(node, *_SPATIAL):
            _swap_attributes(node)
        if match.is_op(node, "Conv"):
            weight = node.inputs[1]
            array = constant(weight)
            assert weight is not None and array is not None
            row = editor.constant(f"{weight.name}.row", np.ascontiguousarray(array.swapaxes(2, 3)))
            node.replace_input_with(1, row)
    for node in region:
        _turn_back(node, inside, editor)


def _turn(value: onnx_ir.Value, reader: onnx_ir.Node, editor: Editor) -> onnx_ir.Value:
    batch, channels, length, _ = shape_of(value) or ()
    shape = (batch, channels, 1, length)
    before = match.producer(value, "Reshape")
    sizes = constant(before.inputs[1]) if before is not None else None
    if before is not None and sizes is not None and 0 not in sizes:
        row = (*(int(s) for s in sizes[:2]), int(sizes[3]), int(sizes[2]))
        return editor.reshape(before.inputs[0], row, reader, shape)  # type: ignore[arg-type]
    return editor.reshape(value, (0, 0, 1, -1), reader, shape)


def _turn_back(node: onnx_ir.Node, inside: set[onnx_ir.Node], editor: Editor) -> None:
    """What a node of the region gives to others, as a column again. Who reshapes it anyway need not care."""
    value = node.outputs[0]
    shape = shape_of(value)
    assert shape is not None
    value.shape = onnx_ir.Shape((*shape[:2], shape[3], shape[2]))
    column: onnx_ir.Value | None = None
    for use in list(value.uses()):
        if use.node in inside or _reshapes(use.node):
            continue
        column = column or editor.reshape(value, (0, 0, -1, 1), node, shape, behind=True)
        if column.producer() is not use.node:
            use.node.replace_input_with(use.idx, column)
    if value.is_graph_output():
        column = column or editor.reshape(value, (0, 0, -1, 1), node, shape, behind=True)
        for position, output in enumerate(editor.graph.outputs):
            if output is value:
                editor.graph.outputs[position] = column


def _reshapes(node: onnx_ir.Node) -> bool:
    sizes = constant(node.inputs[1]) if match.is_op(node, "Reshape") else None
    return sizes is not None and 0 not in sizes


def _swap_attributes(node: onnx_ir.Node) -> None:
    for name in ("kernel_shape", "strides", "dilations"):
        values = match.attribute(node, name)
        if values is not None:
            node.attributes[name] = onnx_ir.AttrInt64s(name, tuple(values)[::-1])
    pads = match.attribute(node, "pads")
    if pads is not None:
        node.attributes["pads"] = onnx_ir.AttrInt64s("pads", (pads[1], pads[0], pads[3], pads[2]))
