"""Convolutions over sequences: ONNX Runtime's fast kernels are those for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from tncompile.cost.kernels import gains_as_image
from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Dims, Editor, constant_shape
from tncompile.emit.fuse.turned import Turn, constant_bias


def sequences_as_images(graph: onnx_ir.Graph) -> int:
    """Sequences -> images of one row; the number of regions.

        x: [batch, channels, length];  Conv of [out, in, k], MaxPool of [k], ...
    ->
        Reshape to [batch, channels, 1, length];  Conv of [out, in, 1, k], MaxPool of [1, k], ...;  Reshape back

    Images are convolved without being unfolded, and stay in blocks of channels from one layer to the next.

    Conditions, for a region of nodes that hang together by values of three axes:
    1. at least one Conv; every one in float32, of a constant weight, and `gains_as_image`;
    2. else pools and elementwise functions.
    """
    return _Sequence().apply(graph)


class _Sequence(Turn):
    def fits(self, shape: Dims) -> bool:
        return len(shape) == 3

    def takes(self, node: onnx_ir.Node) -> bool:
        if match.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        if not match.is_op(node, "Conv"):
            return True
        weight, groups = node.inputs[1], match.attribute(node, "group", 1)
        shape = constant_shape(weight)
        if weight is None or shape is None or weight.dtype != onnx_ir.DataType.FLOAT or not constant_bias(node):
            return False
        filters, channels, taps = shape
        return gains_as_image(groups, channels, filters // groups, taps)

    def keeps(self, node: onnx_ir.Node, position: int) -> bool:
        shape = constant_shape(node.inputs[position])
        return shape is not None and len(shape) <= 3

    def turned(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        return (*shape[:-1], 1, shape[-1])

    def window(self, values: Sequence[int], alone: int) -> tuple[int, ...]:
        return (alone, *values)

    def rewrite(self, node: onnx_ir.Node, editor: Editor) -> None:
        if match.is_op(node, "BatchNormalization"):
            return
        for position, value in enumerate(node.inputs):
            shape = constant_shape(value)
            if value is not None and shape is not None and len(shape) > 1:
                order = (*range(len(shape) - 1), None, len(shape) - 1)
                node.replace_input_with(position, editor.rearranged(value, f"{value.name}.row", order))
