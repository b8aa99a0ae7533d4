"""Convolutions in the branches of an If: ONNX Runtime keeps channels in blocks where weights are in the same graph."""

from __future__ import annotations

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
                local[value, inner] = editor.reshape(value, shape, node, shape)
            node.replace_input_with(position, local[value, inner])
    return len(local)
