"""Which nodes of a graph compute every sample of a batch by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir

from tncompile.emit.fuse.match import Dims, attribute, constant, constant_shape, shape_of

_ELEMENTWISE = frozenset((
    "Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal",
    "Relu", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "ThresholdedRelu", "Where",
))  # fmt: skip


class Samples:
    """The nodes of a graph that compute each sample by itself, and the values that have samples along their first axis.

    `batch` is the name of the run-time size of the batch. A first axis may also have so many entries of each sample,
    one sample after the other, as where a Reshape has joined the batch with an axis behind it.
    """

    def __init__(self, graph: onnx_ir.Graph, batch: str) -> None:
        self.entries = {batch: 1}  # of a sample, along a first axis of this run-time size
        self.values = {value for value in graph.inputs if self.entry(value) == 1}
        self.nodes: set[onnx_ir.Node] = set()
        for node in graph:
            if self._takes(node):
                self.nodes.add(node)
                self.values |= {*node.outputs}

    def entry(self, value: onnx_ir.Value | None) -> int | None:
        """How many entries of each sample there are along the first axis; None where samples are not told apart."""
        shape = shape_of(value)
        if not shape or not isinstance(shape[0], str) or not all(isinstance(size, int) for size in shape[1:]):
            return None
        return self.entries.get(shape[0])

    def read(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """What a node reads that has samples."""
        return [value for value in node.inputs if value is not None and value in self.values]

    def size(self, value: onnx_ir.Value) -> int:
        """Bytes of one sample."""
        assert value.dtype is not None
        return math.ceil(self._elements(value) * value.dtype.itemsize)

    def _elements(self, value: onnx_ir.Value) -> int:
        return (self.entry(value) or 0) * math.prod(int(size) for size in (shape_of(value) or ())[1:])

    def _takes(self, node: onnx_ir.Node) -> bool:
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        inputs = [value for value in node.inputs if value is not None]
        moving = [value for value in inputs if constant_shape(value) is None]
        if rule is None or not moving or not all(value in self.values for value in moving):
            return False
        if len(node.outputs) > 1 and node.op_type != "Split":  # MaxPool's indices count through the whole batch
            return False
        if node.op_type == "Reshape" and not self._reshape(node):
            return False
        if any(value.dtype in (None, onnx_ir.DataType.STRING) for value in (*moving, *node.outputs)):
            return False  # of no known number of bytes
        entries = {self.entry(value) for value in (*moving, *node.outputs)}
        return None not in entries and (len(entries) == 1 or node.op_type == "Reshape") and rule(node)

    def _reshape(self, node: onnx_ir.Node) -> bool:
        """Find the entries of a sample behind a Reshape; whether it keeps samples one after the other."""
        before, shape, target = node.inputs[0], shape_of(node.outputs[0]), constant(node.inputs[1])
        if before is None or not shape or target is None or not isinstance(shape[0], str):
            return False
        rest = math.prod(size if isinstance(size, int) else 0 for size in shape[1:])
        elements = self._elements(before)
        if not rest or elements % rest:
            return False
        return self.entries.setdefault(shape[0], elements // rest) == elements // rest


def _dims(node: onnx_ir.Node, position: int = 0) -> Dims:
    return shape_of(node.inputs[position]) or ()


def _elementwise(node: onnx_ir.Node) -> bool:
    """Every input that has the batch has all axes; what is constant does not vary along the first."""
    rank = len(shape_of(node.outputs[0]) or ())
    for value in node.inputs:
        fixed = constant_shape(value)
        if value is not None and len(_shape(value)) == rank and fixed is not None and fixed[0] != 1:
            return False
        if value is not None and fixed is None and len(_shape(value)) != rank:
            return False
    return True


def _shape(value: onnx_ir.Value) -> Dims:
    fixed = constant_shape(value)
    return fixed if fixed is not None else shape_of(value) or ()


def _first_alone(node: onnx_ir.Node) -> bool:
    """The first input has the batch; the rest are weights."""
    return all(value is None or constant_shape(value) is not None for value in node.inputs[1:])


def _along(default: int | None) -> Callable[[onnx_ir.Node], bool]:
    """Works along one axis, which is not the first."""

    def rule(node: onnx_ir.Node) -> bool:
        axis = attribute(node, "axis", default)
        return axis is not None and axis % max(len(_dims(node)), 1) != 0

    return rule


def _concat(node: onnx_ir.Node) -> bool:
    return _along(None)(node) and all(constant_shape(value) is None for value in node.inputs)


def _transpose(node: onnx_ir.Node) -> bool:
    perm = attribute(node, "perm")
    return perm is not None and perm[0] == 0


def _reduce(node: onnx_ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    return axes is not None and all(int(axis) % len(_dims(node)) != 0 for axis in axes)


def _squeeze(node: onnx_ir.Node) -> bool:
    axes, rank = constant(node.inputs[1]) if len(node.inputs) > 1 else None, len(_dims(node))
    rank += len(axes) if axes is not None and node.op_type == "Unsqueeze" else 0
    return axes is not None and all(int(axis) % rank != 0 for axis in axes)


def _matmul(node: onnx_ir.Node) -> bool:
    """Rows, or one product a sample."""
    left, right = (constant_shape(value) for value in node.inputs[:2])
    ranks = [len(_shape(value)) for value in node.inputs[:2] if value is not None]
    if right is not None:
        return ranks[0] >= 2 and (ranks[1] <= 2 or ranks[1] < ranks[0])
    if left is not None:
        return ranks[1] >= 3 and ranks[0] < ranks[1]
    return ranks[0] == ranks[1] >= 3


def _gemm(node: onnx_ir.Node) -> bool:
    bias = constant_shape(node.inputs[2]) if len(node.inputs) > 2 else ()
    return not attribute(node, "transA", 0) and _first_alone(node) and bias is not None and bias[:-1] in ((), (1,))


def _pad(node: onnx_ir.Node) -> bool:
    pads = constant(node.inputs[1])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    return _first_alone(node) and axes is None and pads is not None and pads[0] == pads[len(pads) // 2] == 0


def _slice(node: onnx_ir.Node) -> bool:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return _first_alone(node) and axes is not None and all(int(axis) % len(_dims(node)) != 0 for axis in axes)


_RULES: Mapping[str, Callable[[onnx_ir.Node], bool]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "LRN",
         "BatchNormalization", "InstanceNormalization", "DepthToSpace", "SpaceToDepth", "Reshape"),
        _first_alone,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization"), _along(-1)),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    "Concat": _concat,
    "Flatten": lambda node: attribute(node, "axis", 1) == 1,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _along(0),
    "Transpose": _transpose,
}  # fmt: skip
