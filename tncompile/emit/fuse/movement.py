"""Which elements end up where: chains of Reshape, Transpose and the like, run on numbered elements.

Attention is written in many layouts: heads as an axis or merged with the batch, keys transposed before or after
the heads are split, shapes computed at run time. All that matters is the result, so a chain is run on an array
whose elements are all different, at two sets of sizes for what is known only at run time, and compared with the
layout wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from tncompile.emit.fuse.match import Dims, attribute, constant, is_op, number, producer, shape_of
from tncompile.ir import Array

PROBES = ((2, 3), (5, 7))
"""Two sets of sizes; the run-time sizes take them in turn, and a third one takes their sum, and so on."""

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_LIMIT = 1 << 22  # elements that a probe may have


@dataclass(frozen=True)
class Chain:
    """A value that is another one, the source, moved and scaled: nodes from the source on."""

    source: onnx_ir.Value
    nodes: tuple[onnx_ir.Node, ...]

    def run(self, array: Array, sizes: Mapping[str, int]) -> Array | None:
        """What becomes of an array in the source's place; None where a shape cannot be computed."""
        for node in self.nodes:
            moved = _move(node, array, sizes)
            if moved is None:
                return None
            array = moved
        return array


def chain(value: onnx_ir.Value, stop: onnx_ir.Value | None = None) -> Chain:
    """The longest chain that ends in a value (not further back than `stop`)."""
    nodes: list[onnx_ir.Node] = []
    while value is not stop:
        node = producer(value, *_MOVES, "Mul", "Div")
        if node is None or (is_op(node, "Mul", "Div") and number(_factor(node)) is None):
            break
        nodes.insert(0, node)
        source = node.inputs[0] if node.inputs[1:] == () or node.inputs[1] is _factor(node) else node.inputs[1]
        assert source is not None
        value = source
    return Chain(value, tuple(nodes))


def probes(*shapes: Dims) -> list[dict[str, int]]:
    """Sizes for all names in some shapes, in two sets."""
    names = list(dict.fromkeys(d for shape in shapes for d in shape if isinstance(d, str)))
    sets = []
    for first, second in PROBES:
        sets.append({name: first + second * k for k, name in enumerate(names)})
    return sets


def numbered(shape: Dims, sizes: Mapping[str, int]) -> Array | None:
    """Elements 1, 2, 3, ... of a shape; None where they are too many."""
    concrete = [d if isinstance(d, int) else sizes[d] for d in shape]
    count = int(np.prod(concrete))
    return np.arange(1.0, count + 1).reshape(concrete) if 0 < count <= _LIMIT else None


def _factor(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The constant of a Mul or Div, or the second input of another node."""
    if is_op(node, "Mul") and number(node.inputs[1]) is None:
        return node.inputs[0]
    return node.inputs[1] if len(node.inputs) > 1 else None


def _move(node: onnx_ir.Node, array: Array, sizes: Mapping[str, int]) -> Array | None:
    if is_op(node, "Mul", "Div"):
        by = number(_factor(node))
        assert by is not None
        return array * by if is_op(node, "Mul") else array / by
    if is_op(node, "Transpose"):
        return array.transpose(attribute(node, "perm"))
    if is_op(node, "Identity"):
        return array
    wanted = _ints(node.inputs[1] if len(node.inputs) > 1 else None, sizes, array.shape, node.inputs[0])
    if is_op(node, "Squeeze"):
        return array.squeeze(None if wanted is None else tuple(wanted))
    if wanted is None:
        return None
    if is_op(node, "Unsqueeze"):
        return np.expand_dims(array, tuple(wanted))
    if attribute(node, "allowzero", 0):
        return None
    shape = [array.shape[k] if size == 0 else size for k, size in enumerate(wanted)]
    count = int(np.prod([s for s in shape if s != -1]))
    if (-1 in shape and array.size % count) or (-1 not in shape and count != array.size):
        return None
    return array.reshape(shape)


def _ints(
    value: onnx_ir.Value | None, sizes: Mapping[str, int], here: Sequence[int], moved: onnx_ir.Value | None
) -> list[int] | None:
    """Integers that are constant or computed from shapes. `here` is the shape of the value `moved`."""
    known = constant(value)
    if known is not None:
        return [int(v) for v in known.reshape(-1)]
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Shape"):
        of = node.inputs[0]
        shape: Sequence[int] | None = here if of is moved else None
        dims = shape_of(of)
        if shape is None and dims is not None and all(isinstance(d, int) or d in sizes for d in dims):
            shape = [d if isinstance(d, int) else sizes[d] for d in dims]
        if shape is None:
            return None
        return list(shape[attribute(node, "start", 0) : attribute(node, "end")])
    parts = [_ints(v, sizes, here, moved) for v in node.inputs if v is not None]
    if any(p is None for p in parts):
        return None
    first, *rest = [p for p in parts if p is not None]
    if is_op(node, "Concat"):
        return [size for part in (first, *rest) for size in part]
    if is_op(node, "Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast"):
        return first
    if is_op(node, "Gather"):
        return [first[k] for k in rest[0]]
    if is_op(node, "Slice") and (len(rest) < 4 or rest[3] == [1]) and (len(rest) < 3 or rest[2] == [0]):
        return first[rest[0][0] : rest[1][0]]
    if is_op(node, "Mul") and len(first) == len(rest[0]) == 1:
        return [first[0] * rest[0][0]]
    if is_op(node, "Div") and len(first) == len(rest[0]) == 1:
        return [first[0] // rest[0][0]]
    return None
