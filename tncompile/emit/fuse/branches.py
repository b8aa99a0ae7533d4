"""Convolutions in the branches of an If: ONNX Runtime keeps channels in blocks where weights are in the same graph."""

from __future__ import annotations

import numpy as np
import onnx_ir

from tncompile.emit.fuse.match import Editor, constant_shape, is_op


def weights_into_branches(graph: onnx_ir.Graph) -> int:
    """Weights that a convolution reads from an outer graph -> what a Reshape makes of them; the number of weights.

        in a branch or a body:  Conv(x, w)                          w: an initializer of the main graph
    ->
        in a branch or a body:  Conv(x, Reshape(w, [its shape]))

    The Reshape is folded at load, to an initializer beside the Conv; the file holds a weight once, whoever reads it.
    """
    editor = Editor(graph)
    local: dict[tuple[onnx_ir.Value, onnx_ir.Graph], onnx_ir.Value] = {}
    for node in list(graph.all_nodes()):
        inner = node.graph
        if not isinstance(inner, onnx_ir.Graph) or inner is graph:
            continue
        if not is_op(node, "Conv", "ConvTranspose", "BatchNormalization"):
            continue
        for position, value in enumerate(node.inputs):
            shape = constant_shape(value)
            if value is None or not shape or value.graph is inner:
                continue
            if (value, inner) not in local:
                target = editor.constant(f"shape_{'x'.join(map(str, shape))}", np.asarray(shape, np.int64))
                copy = onnx_ir.node("Reshape", [value, target], name=editor.name(f"{value.name}/here"))
                copy.outputs[0].name = editor.name(f"{copy.name}:out")
                copy.outputs[0].type, copy.outputs[0].shape = value.type, onnx_ir.Shape(shape)
                inner.insert_before(inner[0], copy)
                local[value, inner] = copy.outputs[0]
            node.replace_input_with(position, local[value, inner])
    return len(local)
