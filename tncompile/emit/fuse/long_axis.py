"""Convolutions over one axis that was put first of two: the kernels of ONNX Runtime run along the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Dims, Editor, constant_shape, shape_of
from tncompile.emit.fuse.turned import Turn, constant_bias


def long_axis_last(graph: onnx_ir.Graph) -> int:
    """Images of width 1 -> images of height 1; the number of regions.

        x: [batch, channels, length, 1];  Conv of [out, in, k, 1], MaxPool of [k, 1], ...
    ->
        Reshape to [batch, channels, 1, length];  Conv of [out, in, 1, k], MaxPool of [1, k], ...;  Reshape back

    The kernels for images compute several outputs of a row at once; with one column, one at a time.

    Conditions, for a region of nodes that hang together by values of four axes:
    1. at least one Conv; it and pools have kernels of one column and nothing padded to their sides;
    2. else elementwise functions, whose constants vary along channels at most;
    3. every value of the region has a static last axis of size 1.
    """
    return _Column().apply(graph)


class _Column(Turn):
    def fits(self, shape: Dims) -> bool:
        return len(shape) == 4 and shape[3] == 1

    def takes(self, node: onnx_ir.Node) -> bool:
        kernel = match.attribute(node, "kernel_shape")
        pads, auto = match.attribute(node, "pads"), match.attribute(node, "auto_pad", "NOTSET")
        if match.is_op(node, "Conv"):
            weight = constant_shape(node.inputs[1])
            if weight is None or not constant_bias(node):
                return False
            kernel = kernel or weight[2:]
        shape = shape_of(node.inputs[0])
        return (
            shape is not None
            and shape[2] != 1
            and len(kernel) == 2
            and kernel[1] == 1
            and auto in ("NOTSET", "VALID")
            and (pads is None or (pads[1] == pads[3] == 0))
        )

    def keeps(self, node: onnx_ir.Node, position: int) -> bool:
        """A constant that is the same whichever of the last two axes comes first."""
        shape = constant_shape(node.inputs[position])
        assert shape is not None
        if match.is_op(node, "BatchNormalization"):
            return len(shape) == 1
        return shape in ((), (1,)) or (len(shape) >= 2 and shape[-2:] == (1, 1))

    def turned(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        return (*shape[:-2], shape[-1], shape[-2])

    def window(self, values: Sequence[int], alone: int) -> tuple[int, ...]:
        return tuple(values)[::-1]

    def rewrite(self, node: onnx_ir.Node, editor: Editor) -> None:
        if match.is_op(node, "Conv"):
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(1, editor.rearranged(weight, f"{weight.name}.row", (0, 1, 3, 2)))
