"""Reshapes that elementwise operations are between."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import constant

_NAMES = (
    "Relu Gelu Sigmoid Tanh Clip LeakyRelu Elu Celu Selu Softplus Softsign Mish HardSigmoid HardSwish Erf Exp Log Sqrt "
    "Abs Neg Reciprocal Sin Cos Pow Mul Add Sub Div Max Min Cast"
)
_ELEMENTWISE = frozenset(_NAMES.split())


def reshapes_around_elementwise(graph: onnx_ir.Graph) -> int:
    """Two Reshapes, with operations on each element alone between them or none -> one or none; the number of places.

        Reshape(Relu(Reshape(x, a)), b)  ->  Reshape(Relu(x), b)         or Relu(x), where x has the shape b

    ONNX Runtime runs each of them as a node, and fuses no Relu into a matmul behind which there is one.

    Conditions: nothing else reads what is between, the model does not show it; what else those operations read are
    constants of one element; b is constant and copies no size of its input.
    """
    count = 0
    for node in [n for n in graph if match.is_op(n, "Reshape")]:
        target = constant(node.inputs[1])
        between: list[onnx_ir.Node] = []
        value = node.inputs[0]
        while value is not None and match.only_reader(value, "Reshape", *_ELEMENTWISE) is not None:
            inner = match.producer(value, *_ELEMENTWISE)
            if inner is None or (moved := _moved(inner)) is None:
                break
            between.insert(0, inner)
            value = moved
        first = match.producer(value, "Reshape")
        if first is None or value is None or match.only_reader(value, "Reshape", *_ELEMENTWISE) is None:
            continue
        if target is None or 0 in target:
            continue
        source = first.inputs[0]
        assert source is not None
        numbers = [v for inner in between for v in inner.inputs if v is not None and match.number(v) is not None]
        rank = 0 if source.shape is None else len(source.shape)
        if any(len(v.shape or ()) > rank for v in numbers):
            continue  # a constant of more axes would add to the result's
        reader = between[0] if between else node
        reader.replace_input_with([*reader.inputs].index(value), source)
        for inner in between:
            inner.outputs[0].shape = source.shape
        if _has_shape(source, [int(size) for size in target]) and node.inputs[0] is not None:
            match.replace(node.outputs[0], node.inputs[0])
        count += 1
    return count


def _moved(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The one input of an operation that is no number."""
    others = [v for v in node.inputs if v is not None and match.number(v) is None]
    return others[0] if len(others) == 1 and others[0].const_value is None else None


def _has_shape(value: onnx_ir.Value, target: Sequence[int]) -> bool:
    """Whether a Reshape to a target, which has as many elements, leaves a value as it is."""
    if value.shape is None or len(value.shape) != len(target):
        return False
    # one size may be known at run time only: all others being equal, so is it
    return all(size == -1 or dim == size for dim, size in zip(value.shape, target, strict=True))
