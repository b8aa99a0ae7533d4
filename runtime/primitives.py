"""Models of one node each: the primitives of a contraction as ONNX Runtime runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as onnx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Primitive:
    """One node on float32 arrays: run-time `inputs`, then a constant of shape `constant`.

    `work` is what its time mostly grows with: multiplications of a matmul, else elements read and written.
    `first`: the constant is the first input. `axis` is a reduction's.
    """

    op: str
    inputs: tuple[Shape, ...]
    output: Shape
    work: int
    constant: Shape = ()
    first: bool = False
    perm: tuple[int, ...] = ()
    axis: int | None = None

    @property
    def elements(self) -> int:
        """The elements of all arrays."""
        constant = math.prod(self.constant) if self.constant else 0
        return sum(map(math.prod, self.inputs)) + math.prod(self.output) + constant

    @property
    def key(self) -> object:
        """Primitives of one key run in one session: run-time shapes are dynamic."""
        return self.op, tuple(map(len, self.inputs)), self.constant, self.first, self.perm, self.axis

    def model(self) -> bytes:
        """The ONNX model."""
        inputs = [
            onnx.Value(
                name=f"x{k}",
                type=onnx.TensorType(onnx.DataType.FLOAT),
                shape=onnx.Shape([f"d{k}_{axis}" for axis in range(len(shape))]),
            )
            for k, shape in enumerate(self.inputs)
        ]
        constants = []
        if self.constant:
            data = np.random.default_rng(0).standard_normal(self.constant, np.float32)
            constants.append(onnx.Value(name="w", const_value=onnx.tensor(data, name="w")))
        if self.axis is not None:
            axes = onnx.tensor(np.array([self.axis]), name="axes")
            constants.append(onnx.Value(name="axes", const_value=axes))
        attributes: dict[str, object] = {"perm": self.perm} if self.perm else {}
        if self.axis is not None:
            attributes["keepdims"] = 0
        node = onnx.node(
            self.op,
            [*constants, *inputs] if self.first else [*inputs, *constants],
            attributes=attributes,  # type: ignore[arg-type]
        )
        return _model(inputs, [node], constants)


def _model(inputs: list[onnx.Value], nodes: list[onnx.Node], constants: list[onnx.Value]) -> bytes:
    output = nodes[-1].outputs[0]
    output.name, output.type = "y", onnx.TensorType(onnx.DataType.FLOAT)
    graph = onnx.Graph(inputs, [output], nodes=nodes, initializers=constants, opset_imports={"": 20})
    data: bytes = onnx.to_proto(onnx.Model(graph, ir_version=10)).SerializeToString()
    return data


def steps_model(count: int) -> bytes:
    """A MatMul of next to nothing, and `count` times a Reshape and another MatMul; from (1, 4) to (1, 4) or (2, 2)."""
    x = onnx.Value(name="x", type=onnx.TensorType(onnx.DataType.FLOAT), shape=onnx.Shape([1, 4]))
    constants, nodes, last = [], [], x
    for k in range(count + 1):
        rows, size = ((1, 4), (2, 2))[k % 2]
        if k:
            target = onnx.tensor(np.array((rows, size)), name=f"s{k}")
            constants.append(onnx.Value(name=f"s{k}", const_value=target))
            nodes.append(onnx.node("Reshape", [last, constants[-1]]))
            last = nodes[-1].outputs[0]
        weight = onnx.tensor(np.eye(size, dtype=np.float32), name=f"w{k}")
        constants.append(onnx.Value(name=f"w{k}", const_value=weight))
        nodes.append(onnx.node("MatMul", [last, constants[-1]]))
        last = nodes[-1].outputs[0]
    return _model([x], nodes, constants)


def matmul(m: int, k: int, n: int) -> Primitive:
    """A matrix by a constant one."""
    return Primitive("MatMul", ((m, k),), (m, n), m * k * n, (k, n))


def batched(batch: int, m: int, k: int, n: int) -> Primitive:
    """Products of run-time matrices; where a constant stands on either side of many, the same kernel runs."""
    return Primitive("MatMul", ((batch, m, k), (batch, k, n)), (batch, m, n), batch * m * k * n)


def core_left(batch: int, m: int, k: int, n: int) -> Primitive:
    """A constant matrix by run-time ones."""
    return Primitive("MatMul", ((batch, k, n),), (batch, m, n), batch * m * k * n, (m, k), first=True)


def conv(batch: int, channels: int, filters: int, space: int) -> Primitive:
    """A 1×1 convolution of a square image, or a nearly square one."""
    height = _near_root(space)
    size = (height, space // height)
    work = batch * channels * filters * space
    return Primitive("Conv", ((batch, channels, *size),), (batch, filters, *size), work, (filters, channels, 1, 1))


def swap(outer: int, a: int, b: int) -> Primitive:
    """The transposes of matrices."""
    return Primitive("Transpose", ((outer, a, b),), (outer, b, a), 2 * outer * a * b, perm=(0, 2, 1))


def moved(blocks: int, block: int) -> Primitive:
    """One axis changes its place, blocks stay together."""
    a = _near_root(blocks)
    b = blocks // a
    return Primitive("Transpose", ((a, b, block),), (b, a, block), 2 * blocks * block, perm=(1, 0, 2))


def shuffled(blocks: int, block: int) -> Primitive:
    """Three axes in reverse, blocks stay together."""
    a = _near_root(blocks)
    c = _near_root(blocks // a)
    b = blocks // a // c
    if block == 1:
        return Primitive("Transpose", ((a, b, c),), (c, b, a), 2 * blocks, perm=(2, 1, 0))
    return Primitive("Transpose", ((a, b, c, block),), (c, b, a, block), 2 * blocks * block, perm=(2, 1, 0, 3))


def multiply(spans: int, length: int) -> Primitive:
    """Each number of a column times a row of its own."""
    return Primitive("Mul", ((spans, length), (spans, 1)), (spans, length), 2 * spans * length)


def reduce(outer: int, summed: int, inner: int) -> Primitive:
    """A sum over the axis in the middle."""
    return Primitive("ReduceSum", ((outer, summed, inner),), (outer, inner), outer * summed * inner, axis=1)


def reduce_last(rows: int, summed: int) -> Primitive:
    """A sum over the last axis."""
    return Primitive("ReduceSum", ((rows, summed),), (rows,), rows * summed, axis=1)


def copy(elements: int) -> Primitive:
    """A copy."""
    return Primitive("Identity", ((elements,),), (elements,), 2 * elements)


def read(size: int) -> Primitive:
    """A vector by a matrix of so many bytes: next to nothing but reading it."""
    k = _near_root(size // 4)
    n = size // 4 // k
    return Primitive("MatMul", ((1, k), (k, n)), (1, n), k * n)


def _near_root(number: int) -> int:
    """The largest divisor not above the square root."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)


#: The tables of a device profile.
PRIMITIVES: Mapping[str, Callable[..., Primitive]] = MappingProxyType(
    {
        "matmul": matmul,
        "batched": batched,
        "conv": conv,
        "swap": swap,
        "moved": moved,
        "shuffled": shuffled,
        "multiply": multiply,
        "reduce": reduce,
        "reduce_last": reduce_last,
        "copy": copy,
        "read": read,
    }
)
