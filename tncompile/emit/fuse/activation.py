"""Activations whose kernels in ONNX Runtime are slow between convolutions."""

from __future__ import annotations

import numpy as np
import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Editor, constant, shape_of


def prelu_of_images(graph: onnx_ir.Graph) -> int:
    """PRelu behind a Conv -> one Relu and two scales; the number of places.

        y = PRelu(Conv(..), s)  ->  r = Relu(Conv(..));  y = (1 - s) · r + s · Conv(..)

    ONNX Runtime's CPU kernel of PRelu decides element by element, and is not one of those that run in the blocked
    layout of its convolutions, so that the image is rearranged before and behind it; Relu, Mul and Add are. With the
    terms in this order the image has been scaled when Relu runs, which then needs no memory of its own.

    Conditions: float32; an image of four axes; s is a constant that varies along the channels at most.
    """
    count = 0
    for node in [n for n in graph if match.is_op(n, "PRelu")]:
        image, slope = node.inputs[0], constant(node.inputs[1])
        shape = shape_of(node.outputs[0])
        if match.producer(image, "Conv") is None or slope is None or slope.dtype != np.float32:
            continue
        if shape is None or len(shape) != 4 or any(d != 1 for d in (slope.shape[:-3] + slope.shape[-2:])):
            continue
        editor = Editor(graph)
        rest = editor.constant("prelu.rest", (1.0 - slope.astype(np.float64)).astype(np.float32))
        relu = editor.node("Relu", [image], node, shape)
        parts = [editor.node("Mul", pair, node, shape) for pair in ([relu, rest], [image, node.inputs[1]])]
        match.replace(node.outputs[0], editor.node("Add", parts, node, shape))
        count += 1
    return count


def softmax_of_images(graph: onnx_ir.Graph) -> int:
    """Softmax over few channels of an image -> its definition; the number of places.

        Softmax(x, axis)  ->  e = Exp(x - ReduceMax(x, axis));  e / ReduceSum(e, axis)

    ONNX Runtime moves the axis to the end and back, and starts anew for each of the short rows.

    Conditions: the axis is not the last and holds at most 8 elements; at least two axes behind it, or one of
    static size above 8.
    """
    count = 0
    for node in [n for n in graph if match.is_op(n, "Softmax")]:
        shape = shape_of(node.outputs[0])
        if shape is None:
            continue
        axis = match.attribute(node, "axis", -1) % len(shape)
        behind, size = shape[axis + 1 :], shape[axis]
        if (
            not isinstance(size, int)
            or size > 8
            or not (len(behind) > 1 or any(isinstance(d, int) and d > 8 for d in behind))
        ):
            continue
        editor = Editor(graph)
        axes, one = editor.constant("axes", np.asarray([axis])), (*shape[:axis], 1, *behind)
        top = editor.node("ReduceMax", [node.inputs[0], axes], node, one, keepdims=1)
        exp = editor.node("Exp", [editor.node("Sub", [node.inputs[0], top], node, shape)], node, shape)
        total = editor.node("ReduceSum", [exp, axes], node, one, keepdims=1)
        match.replace(node.outputs[0], editor.node("Div", [exp, total], node, shape))
        count += 1
    return count
