"""Which traced operations act on each element alone, so that the order of the elements is all the same to them."""

from __future__ import annotations

from collections.abc import Mapping

from tncompile.ir import Constant, Opaque, Value, references

_NAMES = {
    "activations": "relu relu6 gelu silu sigmoid tanh mish elu celu selu softplus leaky_relu hardtanh hardswish "
    "hardsigmoid hardshrink softshrink log_sigmoid threshold logit",
    "bounds": "clamp clamp_min clamp_max maximum minimum",
    "arithmetic": "abs sign sqrt rsqrt reciprocal square pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor div.Tensor "
    "div.Scalar",
    "exponentials": "exp exp2 expm1 log log1p log2 log10 erf erfc",
    "trigonometry": "sin cos tan asin acos atan sinh cosh asinh acosh atanh atan2",
    "rounding and copies": "floor ceil round trunc frac clone _to_copy",
}

POINTWISE = frozenset(
    f"aten.{name}" if "." in name else f"aten.{name}.default" for names in _NAMES.values() for name in names.split()
)
"""Overloads that torch tags as pointwise (`torch.Tag.pointwise`), and `_to_copy`, hardswish and log_sigmoid, which it
should."""

_ONNX = (
    "Relu Gelu Sigmoid Tanh Mish Elu Celu Selu Softplus Softsign LeakyRelu HardSigmoid HardSwish Shrink "
    "ThresholdedRelu Abs Sign Sqrt Reciprocal Pow Div Max Min Clip Exp Log Erf Sin Cos Tan Asin Acos Atan Sinh Cosh "
    "Asinh Acosh Atanh Floor Ceil Round Cast"
)

ONNX_POINTWISE = frozenset(f"onnx.{name}" for name in _ONNX.split())
"""Operators of ONNX that act on each element alone."""


def joined(node: Opaque, values: Mapping[str, Value]) -> tuple[str, ...]:
    """The values that an operation reads, where it makes each element of its result of those at the same place; else
    nothing.

    Numbers among its arguments are fine; a tensor that would have to be broadcast, or a copy in torch's order of
    images, is not.
    """
    shape = node.output.shape
    arguments = (*node.args, *(value for _, value in node.kwargs))
    names = tuple(dict.fromkeys(r.name for r in references(arguments)))
    if node.target not in (POINTWISE | ONNX_POINTWISE) or shape is None:
        return ()
    if any(isinstance(a, Constant) and "channels_last" in a.spelling for a in arguments):
        return ()
    return names if all(name in values and values[name].shape == shape for name in names) else ()
