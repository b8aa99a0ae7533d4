"""Which ONNX operators are multilinear, and the equation each of them is (see `tncompile.frontend.equation`).

Operators as operator set 18 and later define them; tensors are named by their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir

from tncompile.frontend import equation as algebra
from tncompile.frontend.convolution import Sliding, convolution
from tncompile.frontend.equation import NotMultilinear, broadcast, labels, number, single
from tncompile.ir import Array, Dim, Value

Product = algebra.Product[str]
Equation = algebra.Equation[str]
Reshape = algebra.Reshape[str]
Translation = Equation | Reshape
Translator = Callable[["Operator"], Translation]
T = TypeVar("T", bound=Translator)
_TRANSLATORS: dict[str, Translator] = {}


@dataclass(frozen=True)
class Operator:
    """A node and what its translator may ask: the type of a value, and the numbers of one that is constant."""

    node: onnx_ir.Node
    value: Callable[[str], Value]
    constant: Callable[[str], Array | None]

    @property
    def output(self) -> str:
        """The name of the first output."""
        return self.node.outputs[0].name or ""

    @property
    def inputs(self) -> list[str]:
        """The inputs that are given."""
        return [v.name for v in self.node.inputs if v is not None and v.name]

    def input(self, position: int) -> str:
        """One input; NotMultilinear where it is not given."""
        name = self.optional(position)
        if name is None:
            raise NotMultilinear("an input is missing")
        return name

    def optional(self, position: int) -> str | None:
        """One input, None where it is not given."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        return (value.name or None) if value is not None else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def shape(self, name: str) -> tuple[Dim, ...]:
        """A value's shape; NotMultilinear where its rank is not known."""
        shape = self.value(name).shape
        if shape is None:
            raise NotMultilinear("a tensor of unknown rank")
        return shape

    def rank(self, name: str) -> int:
        """The number of a value's axes."""
        return len(self.shape(name))

    def numbers(self, position: int) -> Array | None:
        """A constant input; None where it is not given, NotMultilinear where it is not constant."""
        name = self.optional(position)
        if name is None:
            return None
        array = self.constant(name)
        if array is None:
            raise NotMultilinear("an input that is not constant")
        return array


def translate(operator: Operator) -> Translation:
    """The equation of a node. NotMultilinear where it has none."""
    node = operator.node
    translator = _TRANSLATORS.get(node.op_type) if node.domain == "" else None
    if translator is None:
        raise NotMultilinear(f"{node.op_type} is not multilinear")
    return translator(operator)


def multilinear(node: onnx_ir.Node) -> bool:
    """Whether an operator may have an equation."""
    return node.domain == "" and node.op_type in _TRANSLATORS


def _register(*names: str) -> Callable[[T], T]:
    def add(function: T) -> T:
        for name in names:
            _TRANSLATORS[name] = function
        return function

    return add


# ------------------------------------------------------------------------------------ products


@_register("MatMul")
def _matmul(o: Operator) -> Equation:
    a, b = o.input(0), o.input(1)
    return algebra.matmul(a, o.rank(a), b, o.rank(b))


@_register("Gemm")
def _gemm(o: Operator) -> Equation:
    a, b = o.input(0), o.input(1)
    left = ["k", "m"] if o.attribute("transA", 0) else ["m", "k"]
    right = ["n", "k"] if o.attribute("transB", 0) else ["k", "n"]
    terms = [Product([(a, [*left]), (b, [*right])], number(o.attribute("alpha", 1.0)))]
    bias, beta = o.optional(2), number(o.attribute("beta", 1.0))
    if bias is not None and beta != 0:
        terms.append(Product([(bias, [*"mn"[2 - o.rank(bias) :]])], beta))
    return Equation(terms, ["m", "n"])


@_register("Einsum")
def _einsum(o: Operator) -> Equation:
    return algebra.einsum(o.attribute("equation", ""), o.inputs, [o.rank(x) for x in o.inputs])


@_register("Mul")
def _mul(o: Operator) -> Equation:
    rank = o.rank(o.output)
    return Equation([Product([(x, broadcast(o.rank(x), rank)) for x in o.inputs])], labels("d", rank))


@_register("Div")
def _div(o: Operator) -> Equation:
    rank, a, b = o.rank(o.output), o.input(0), o.input(1)
    divisor = o.numbers(1)
    assert divisor is not None
    if not np.all(divisor):
        raise NotMultilinear("a division by zero")
    inverse = (f"{b}.reciprocal", 1.0 / divisor.astype(np.float64), broadcast(o.rank(b), rank))
    return Equation([Product([(a, broadcast(o.rank(a), rank))], constants=[inverse])], labels("d", rank))


@_register("Neg")
def _neg(o: Operator) -> Equation:
    axes = labels("d", o.rank(o.input(0)))
    return single(o.input(0), axes, axes, -1.0)


# ------------------------------------------------------------------------------------ sums


@_register("Add", "Sum", "Sub", "Mean")
def _sum(o: Operator) -> Equation:
    rank = o.rank(o.output)
    scale = 1.0 / len(o.inputs) if o.node.op_type == "Mean" else 1.0
    terms = [Product([(x, broadcast(o.rank(x), rank))], scale) for x in o.inputs]
    if o.node.op_type == "Sub":
        terms[1].scale = -1.0
    return Equation(terms, labels("d", rank))


@_register("ReduceSum", "ReduceMean")
def _reduce(o: Operator) -> Equation | Reshape:
    x, axes = o.input(0), o.numbers(1)
    shape = o.shape(x)
    if (axes is None or not axes.size) and o.attribute("noop_with_empty_axes", 0):
        return Reshape(x)
    summed = {int(a) % len(shape) for a in axes.reshape(-1)} if axes is not None and axes.size else {*range(len(shape))}
    before = labels("d", len(shape))
    keep = o.attribute("keepdims", 1)
    output = [f"one{k}" if k in summed else d for k, d in enumerate(before) if keep or k not in summed]
    scale = 1.0
    if o.node.op_type == "ReduceMean":
        sizes = [size for k in summed if isinstance(size := shape[k], int)]
        if len(sizes) < len(summed) or 0 in sizes:
            raise NotMultilinear("a mean over a dynamic mode")
        scale = 1.0 / math.prod(sizes)
    return single(x, before, output, scale)


# ------------------------------------------------------------------------------------ views


@_register("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
def _reshape(o: Operator) -> Reshape:
    return Reshape(o.input(0))


@_register("Dropout")
def _dropout(o: Operator) -> Reshape:
    training = o.numbers(2)
    if (training is not None and training.any()) or any(v.uses() or v.is_graph_output() for v in o.node.outputs[1:]):
        raise NotMultilinear("dropout in training mode, or its mask")
    return Reshape(o.input(0))


@_register("Cast")
def _cast(o: Operator) -> Reshape:
    if o.value(o.input(0)).dtype != o.value(o.output).dtype:
        raise NotMultilinear("a change of dtype")
    return Reshape(o.input(0))


@_register("Slice")
def _slice(o: Operator) -> Reshape:
    steps = o.numbers(4)
    if o.shape(o.input(0)) != o.shape(o.output) or (steps is not None and np.any(steps < 0)):
        raise NotMultilinear("a slice of a part, or backwards")
    return Reshape(o.input(0))


@_register("Concat")
def _concat(o: Operator) -> Reshape:
    if len(o.inputs) != 1:
        raise NotMultilinear("a concatenation")
    return Reshape(o.input(0))


@_register("Transpose")
def _transpose(o: Operator) -> Equation:
    before = labels("d", o.rank(o.input(0)))
    order: Sequence[int] = o.attribute("perm") or range(len(before))[::-1]
    if sorted(order) != [*range(len(before))]:
        raise NotMultilinear("a transpose that is no permutation")
    return single(o.input(0), before, [before[k] for k in order])


@_register("Expand")
def _expand(o: Operator) -> Equation:
    rank = o.rank(o.output)
    return single(o.input(0), broadcast(o.rank(o.input(0)), rank), labels("d", rank))


# ------------------------------------------------------------------------------------ layers


@_register("Conv")
def _convolution(o: Operator) -> Equation:
    x, weight = o.input(0), o.input(1)
    kernel = o.shape(weight)
    rank = len(kernel) - 2
    pads = list(o.attribute("pads") or [0] * (2 * rank))
    if o.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise NotMultilinear("a convolution whose padding follows from its input's size")
    sliding = Sliding(
        list(o.attribute("strides") or [1] * rank),
        list(o.attribute("dilations") or [1] * rank),
        list(zip(pads[:rank], pads[rank:], strict=True)),
        o.attribute("group", 1),
    )
    constant = o.constant(weight) is not None
    return convolution(x, o.value(x), weight, kernel, o.optional(2), sliding, constant)


@_register("BatchNormalization")
def _batch_norm(o: Operator) -> Equation:
    if o.attribute("training_mode", 0) or any(v.uses() for v in o.node.outputs[1:]):
        raise NotMultilinear("batch normalization in training mode")
    x = o.input(0)
    scale, shift, mean, variance = (np.asarray(o.numbers(k), np.float64) for k in (1, 2, 3, 4))
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + o.attribute("epsilon", 1e-5))
        offset = shift - mean * factor
    axes = labels("d", o.rank(x))
    name = o.node.name or o.output
    return Equation(
        [
            Product([(x, axes)], constants=[(f"{name}.scale", factor, [axes[1]])]),
            Product([], constants=[(f"{name}.shift", offset, [axes[1]])]),
        ],
        axes,
    )
