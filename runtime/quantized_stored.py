"""Weights that are smaller in the file alone: nodes of constants make float32 of them, folded at load.

The nodes are plain operators of any operator set, so that any runtime reads the file. The value that they end in has
the weight's name, so that no reader changes, branches of an ``If`` among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tncompile.ir import Array
from tncompile.runtime.quantized_names import Names
from tncompile.runtime.quantized_round import BLOCK, Eight, Four, fits_half

if TYPE_CHECKING:
    from onnx import NodeProto


class Writer:
    """Writes nodes one after another; `metadata` goes onto each."""

    def __init__(self, stem: str, names: Names, metadata: Mapping[str, str]) -> None:
        self.stem = stem
        self.names = names
        self.metadata = metadata
        self.nodes: list[NodeProto] = []

    def constant(self, what: str, array: Array) -> str:
        """A new initializer."""
        import onnx

        return self.names.initializer(onnx.numpy_helper.from_array(np.ascontiguousarray(array), f"{self.stem}.{what}"))

    def op(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """A node, and the value that it computes."""
        import onnx

        name = self.names.node(f"{self.stem}/{kind}")
        output = output or self.names.value(f"{name}:out")
        node = onnx.helper.make_node(kind, inputs, [output], name, **attributes)
        for key, value in self.metadata.items():
            node.metadata_props.add(key=key, value=value)
        self.nodes.append(node)
        return output

    def widened(self, value: str, output: str = "") -> str:
        """A value in float32."""
        import onnx

        return self.op("Cast", [value], output, to=onnx.TensorProto.FLOAT)

    def shaped(self, value: str, shape: Sequence[int], output: str = "") -> str:
        """A value in another shape; 0 is a size as it was, -1 what is left."""
        return self.op("Reshape", [value, self.constant("shape", np.asarray(shape, np.int64))], output)


def smaller(weight: Array, bits: str, axes: Sequence[int], writer: Writer, output: str) -> bool:
    """Write nodes that make a weight of what is stored in its place; False where float16 cannot hold it.

    Channels lie along `axes`.
    """
    if bits == "fp16":
        if not fits_half(weight):
            return False
        writer.widened(writer.constant("float16", weight.astype(np.float16)), output)
        return True
    if bits == "int8-weights":
        eight = Eight.of(weight, axes)
        wide = writer.widened(writer.constant("int8", eight.values))
        writer.op("Mul", [wide, writer.constant("scale", eight.scale)], output)
        return True
    others = [axis for axis in range(weight.ndim) if axis not in axes]
    order = [*axes, *others]
    moved = weight.transpose(order)
    rows = int(np.prod([weight.shape[axis] for axis in axes]))
    four = Four.of(moved.reshape(rows, -1))
    matrix = writer.shaped(_unpacked(writer, four), [rows, -1])
    if four.scale.shape[1] * 2 * four.packed.shape[2] != four.columns:
        edges = [writer.constant(what, np.asarray([n], np.int64)) for what, n in (("from", 0), ("to", four.columns))]
        matrix = writer.op("Slice", [matrix, *edges, writer.constant("axis", np.asarray([1], np.int64))])
    if order == sorted(order):
        writer.shaped(matrix, weight.shape, output)
    else:
        back = [order.index(axis) for axis in range(weight.ndim)]
        writer.op("Transpose", [writer.shaped(matrix, moved.shape)], output, perm=back)
    return True


def _unpacked(writer: Writer, four: Four) -> str:
    """Rounded numbers in float32[rows, blocks, 16, 2], padding included: each byte is looked up."""
    import onnx

    byte = np.arange(256)
    table = writer.constant("halves", np.stack([byte & 15, byte >> 4], axis=1).astype(np.float32))
    packed = writer.op("Cast", [writer.constant("int4", four.packed)], to=onnx.TensorProto.INT32)
    zero = writer.widened(writer.constant("zero", four.zero[..., None, None]))
    values = writer.op("Sub", [writer.op("Gather", [table, packed]), zero])
    return writer.op("Mul", [values, writer.constant("scale", four.scale[..., None, None])])


def eight_bit_rows(writer: Writer, table: Array, rows: str, output: str) -> None:
    """A Gather of rows of a table that stays in eight bits, a scale a row; the rows are widened."""
    eight = Eight.of(table, (0,))
    values = writer.widened(writer.op("Gather", [writer.constant("int8", eight.values), rows]))
    scale = writer.op("Gather", [writer.constant("scale", eight.scale), rows])
    writer.op("Mul", [values, scale], output)


def four_bit_rows(writer: Writer, table: Array, rows: str, output: str) -> None:
    """A Gather of rows of a table that stays in four bits; the rows are widened as they are read."""
    four = Four.of(table)
    pairs = np.pad(four.zero, ((0, 0), (0, four.zero.shape[1] % 2))).reshape(len(table), -1, 2)
    inputs = [
        writer.constant("int4", four.packed.reshape(len(table), -1)),
        rows,
        writer.constant("scale", four.scale),
        writer.constant("zero", pairs[..., 0] | pairs[..., 1] << 4),
    ]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 4}
    writer.op("GatherBlockQuantized", inputs, output, domain="com.microsoft", **attributes)
