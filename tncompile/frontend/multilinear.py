"""Which ATen operations are multilinear, and the einsum each of them is (see `tncompile.frontend.equation`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tncompile.frontend import equation as algebra
from tncompile.frontend.convolution import Sliding, convolution
from tncompile.frontend.equation import Label, NotMultilinear
from tncompile.frontend.equation import labels as _labels
from tncompile.frontend.equation import number as _number
from tncompile.frontend.equation import single as _single
from tncompile.frontend.translators import (
    TRANSLATORS,
    Constant,
    Context,
    Equation,
    Product,
    Reshape,
    Translation,
    axis_of,
    elementwise,
    operator_name,
    rank_of,
    register,
    shape_of,
)
from tncompile.ir import Value


def translate(node: torch.fx.Node, constant: Constant, is_constant: Callable[[Any], bool]) -> Translation:
    """The equation of a node. NotMultilinear where it has none."""
    if operator_name(node) == "operator.getitem" and _is_batch_norm(node.args[0]) and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    name = operator_name(node)
    translator = TRANSLATORS.get(name)
    if translator is None:
        raise NotMultilinear(f"{name} is not multilinear")
    context = Context(node, constant, is_constant)
    try:
        return translator(context, *node.args, **node.kwargs)
    except TypeError as error:  # an argument the translator does not know
        raise NotMultilinear(f"{name}: {error}") from error


def _is_batch_norm(source: Any) -> bool:
    return isinstance(source, torch.fx.Node) and "native_batch_norm" in operator_name(source)


# ------------------------------------------------------------------------------------ products


@register("linear")
def _linear(c: Context, x: Any, weight: Any, bias: Any = None) -> Equation:
    lead = _labels("d", rank_of(x) - 1)
    out: list[Label] = ["o"] if rank_of(weight) == 2 else []
    terms = [Product([(x, [*lead, "i"]), (weight, [*out, "i"])])]
    if bias is not None:
        terms.append(Product([(bias, ["o"] if rank_of(bias) else [])]))
    return Equation(terms, [*lead, *out])


@register("mm", "bmm", "matmul")
def _matmul(c: Context, a: Any, b: Any) -> Equation:
    return algebra.matmul(a, rank_of(a), b, rank_of(b))


@register("dot", "vdot")
def _dot(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["k"]), (b, ["k"])])], [])


@register("mv")
def _mv(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["m", "k"]), (b, ["k"])])], ["m"])


@register("outer", "ger")
def _outer(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["m"]), (b, ["n"])])], ["m", "n"])


@register("kron")
def _kron(c: Context, a: Any, b: Any) -> Equation:
    """Axis k of the product is axis k of the one and then of the other; an axis that one has not is the other's."""
    rank = len(shape_of(c.node))
    left, right = (_labels(prefix, rank)[rank - rank_of(x) :] for prefix, x in (("m", a), ("n", b)))
    output = [tuple(label for label in (f"m{k}", f"n{k}") if label in (*left, *right)) for k in range(rank)]
    each = [*zip(left, shape_of(a), strict=True), *zip(right, shape_of(b), strict=True)]
    sizes = {label: size for label, size in each if isinstance(size, int)}
    return Equation([Product([(a, left), (b, right)])], output, sizes)


@register("inner")
def _inner(c: Context, a: Any, b: Any) -> Equation:
    left, right = _labels("m", rank_of(a) - 1), _labels("n", rank_of(b) - 1)
    return Equation([Product([(a, [*left, "k"]), (b, [*right, "k"])])], [*left, *right])


@register("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(c: Context, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Equation:
    rank_a, rank_b = rank_of(a), rank_of(b)
    batch: list[Label] = ["d"] if rank_a == 3 else []
    column: list[Label] = ["n"] if rank_b > 1 else []
    output = ([] if operator_name(c.node) == "aten.addbmm" else batch) + ["m", *column]
    return Equation(
        [
            Product([(a, [*batch, "m", "k"]), (b, [*batch[: rank_b - 1], "k", *column])], _number(alpha)),
            Product([(bias, output[len(output) - rank_of(bias) :])], _number(beta)),
        ],
        output,
    )


@register("bilinear")
def _bilinear(c: Context, a: Any, b: Any, weight: Any, bias: Any = None) -> Equation:
    lead = _labels("d", rank_of(a) - 1)
    terms = [Product([(a, [*lead, "i"]), (weight, ["o", "i", "j"]), (b, [*lead, "j"])])]
    if bias is not None:
        terms.append(Product([(bias, ["o"])]))
    return Equation(terms, [*lead, "o"])


@register("tensordot")
def _tensordot(c: Context, a: Any, b: Any, dims_a: Sequence[int], dims_b: Sequence[int]) -> Equation:
    left, right = _labels("m", rank_of(a)), _labels("n", rank_of(b))
    for k, (p, q) in enumerate(zip(dims_a, dims_b, strict=True)):
        left[axis_of(p, len(left))] = right[axis_of(q, len(right))] = f"k{k}"
    summed = {f"k{k}" for k in range(len(dims_a))}
    return Equation([Product([(a, left), (b, right)])], [x for x in (*left, *right) if x not in summed])


@register("einsum")
def _einsum(c: Context, equation: str, operands: Sequence[Any], *, path: Any = None) -> Equation:
    return algebra.einsum(equation, operands, [rank_of(x) for x in operands])


@register("linalg_multi_dot", "chain_matmul")
def _multi_dot(c: Context, matrices: Sequence[Any]) -> Equation:
    factors: list[tuple[torch.fx.Node, list[Label]]] = []
    last = len(matrices) - 1
    for k, m in enumerate(matrices):
        labels: list[Label] = [f"k{k}", f"k{k + 1}"]
        factors.append((m, labels if rank_of(m) == 2 else labels[1:] if k == 0 else labels[:1]))
    output = [
        *(["k0"] if rank_of(matrices[0]) == 2 else []),
        *([f"k{last + 1}"] if rank_of(matrices[last]) == 2 else []),
    ]
    return Equation([Product(factors)], output)


@register("mul")
def _mul(c: Context, a: Any, b: Any) -> Equation:
    rank = len(shape_of(c.node))
    if not isinstance(a, torch.fx.Node):
        a, b = b, a
    if not isinstance(b, torch.fx.Node):
        return _single(a, elementwise(a, rank), _labels("d", rank), _number(b))
    return Equation([Product([(a, elementwise(a, rank)), (b, elementwise(b, rank))])], _labels("d", rank))


@register("div", "true_divide")
def _div(c: Context, a: Any, b: Any, *, rounding_mode: Any = None) -> Equation:
    rank = len(shape_of(c.node))
    if rounding_mode is not None or not isinstance(a, torch.fx.Node):
        raise NotMultilinear("a division that rounds, or by a value")
    if not isinstance(b, torch.fx.Node):
        if _number(b) == 0:
            raise NotMultilinear("a division by zero")
        return _single(a, elementwise(a, rank), _labels("d", rank), 1.0 / _number(b))
    if not c.is_constant(b):
        raise NotMultilinear("a division by a value that is not constant")
    inverse = (f"{b.name}.reciprocal", c.constant(b).double().reciprocal().numpy(), elementwise(b, rank))
    return Equation([Product([(a, elementwise(a, rank))], constants=[inverse])], _labels("d", rank))


@register("neg")
def _neg(c: Context, a: Any) -> Equation:
    labels = _labels("d", rank_of(a))
    return _single(a, labels, labels, -1.0)


@register("addcmul")
def _addcmul(c: Context, base: Any, a: Any, b: Any, *, value: Any = 1) -> Equation:
    rank = len(shape_of(c.node))
    product = Product([(a, elementwise(a, rank)), (b, elementwise(b, rank))], _number(value))
    return Equation([Product([(base, elementwise(base, rank))]), product], _labels("d", rank))


# ------------------------------------------------------------------------------------ sums


@register("add", "sub", "rsub")
def _add(c: Context, a: Any, b: Any, *, alpha: Any = 1) -> Equation:
    rank = len(shape_of(c.node))
    name = operator_name(c.node)
    scales = {"aten.add": (1.0, _number(alpha)), "aten.sub": (1.0, -_number(alpha))}.get(name, (-_number(alpha), 1.0))
    terms = []
    for x, scale in zip((a, b), scales, strict=True):
        if isinstance(x, torch.fx.Node):
            terms.append(Product([(x, elementwise(x, rank))], scale))
        elif _number(x) * scale != 0:
            value = np.asarray(_number(x) * scale)
            terms.append(Product([], constants=[(f"{c.node.name}.constant", value, [])]))
    return Equation(terms, _labels("d", rank))


@register("sum", "mean")
def _sum(c: Context, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Equation:
    shape = shape_of(a)
    if dtype not in (None, a.meta["val"].dtype):
        raise NotMultilinear("a sum in another dtype")
    dims = range(len(shape)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    summed = {axis_of(d, len(shape)) for d in dims}
    labels = _labels("d", len(shape))
    output = [f"one{k}" if k in summed else x for k, x in enumerate(labels) if keepdim or k not in summed]
    scale = 1.0
    if operator_name(c.node) == "aten.mean":
        sizes = [shape[k] for k in summed]
        if not all(isinstance(s, int) for s in sizes):
            raise NotMultilinear("a mean over a dynamic mode")
        scale = 1.0 / math.prod(int(s) for s in sizes)
    return _single(a, labels, output, scale)


# ------------------------------------------------------------------------------------ views


@register("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "_reshape_alias")
def _reshape(c: Context, a: Any, *_: Any) -> Reshape:
    return Reshape(a)


@register("squeeze", "unsqueeze", "squeeze_copy", "unsqueeze_copy")
def _squeeze(c: Context, a: Any, *_: Any) -> Reshape:
    return Reshape(a)


@register("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "positive", "view_as", "reshape_as")
def _identity(c: Context, a: Any, *_: Any, memory_format: Any = None) -> Reshape:
    return Reshape(a)


@register("slice", "slice_copy")
def _slice(c: Context, a: Any, *_: Any, **__: Any) -> Reshape:
    if [str(s) for s in shape_of(a)] != [str(s) for s in shape_of(c.node)]:
        raise NotMultilinear("a slice of a part")
    return Reshape(a)  # the whole of a mode: what the colon of ``x[:, None]`` leaves


@register("dropout")
def _dropout(c: Context, a: Any, p: float, train: bool) -> Reshape:
    if train:
        raise NotMultilinear("dropout in training mode")
    return Reshape(a)


@register("_to_copy", "to")
def _to(c: Context, a: Any, *_: Any, **__: Any) -> Reshape:
    if a.meta["val"].dtype != c.node.meta["val"].dtype:
        raise NotMultilinear("a change of dtype")
    return Reshape(a)


@register("permute", "permute_copy")
def _permute(c: Context, a: Any, order: Sequence[int]) -> Equation:
    labels = _labels("d", rank_of(a))
    return _single(a, labels, [labels[k] for k in order])


@register("transpose", "swapaxes", "swapdims", "transpose_copy")
def _transpose(c: Context, a: Any, p: int, q: int) -> Equation:
    labels = _labels("d", rank_of(a))
    output = list(labels)
    if labels:
        output[p], output[q] = labels[q], labels[p]
    return _single(a, labels, output)


@register("t", "numpy_T", "adjoint", "mT")
def _t(c: Context, a: Any) -> Equation:
    labels = _labels("d", rank_of(a))
    return _single(a, labels, labels[::-1] if "numpy" in operator_name(c.node) else [*labels[:-2], *labels[:-3:-1]])


@register("movedim", "moveaxis")
def _movedim(c: Context, a: Any, source: Any, target: Any) -> Equation:
    rank = rank_of(a)
    sources = [axis_of(d, rank) for d in ([source] if isinstance(source, int) else source)]
    targets = [axis_of(d, rank) for d in ([target] if isinstance(target, int) else target)]
    labels = _labels("d", rank)
    placed = dict(zip(targets, sources, strict=True))
    rest = iter(k for k in range(rank) if k not in sources)
    return _single(a, labels, [labels[placed[k] if k in placed else next(rest)] for k in range(rank)])


@register("select", "select_copy")
def _select(c: Context, a: Any, dim: int, index: int) -> Equation:
    labels, axis = _labels("d", rank_of(a)), axis_of(dim, rank_of(a))
    rest = [label for k, label in enumerate(labels) if k != axis]
    size = shape_of(a)[axis]
    if size == 1:
        return _single(a, labels, rest)
    if not (c.is_constant(a) and isinstance(size, int)) or a.op == "placeholder":
        raise NotMultilinear("a selection, but of a computed weight, is no network")
    # evaluated, a weight that is computed from cores would be one of its own: a full table, perhaps
    unit = torch.zeros(size, dtype=torch.float64)
    unit[index] = 1.0
    return Equation([Product([(a, labels)], constants=[(f"{c.node.name}.unit", unit.numpy(), [labels[axis]])])], rest)


@register("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(c: Context, a: Any, *_: Any, implicit: bool = False) -> Equation:
    rank = len(shape_of(c.node))
    return _single(a, elementwise(a, rank), _labels("d", rank))


@register("diagonal", "diagonal_copy")
def _diagonal(c: Context, a: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Equation:
    labels = _labels("d", rank_of(a))
    p, q = axis_of(dim1, len(labels)), axis_of(dim2, len(labels))
    if offset or shape_of(a)[p] != shape_of(a)[q]:
        raise NotMultilinear("an off-diagonal")
    labels[p] = labels[q] = "k"
    return _single(a, labels, [*(x for x in labels if x != "k"), "k"])


# ------------------------------------------------------------------------------------ layers


@register("conv1d", "conv2d", "conv3d")
def _conv(
    c: Context,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Equation:
    if not isinstance(x, torch.fx.Node) or not isinstance(weight, torch.fx.Node):
        raise NotMultilinear("a tensor was expected")
    kernel = tuple(shape_of(weight))
    steps, spread = _each(stride, len(kernel) - 2), _each(dilation, len(kernel) - 2)
    sliding = Sliding(steps, spread, list(_padding(padding, kernel[2:], spread)), groups)
    value = Value(x.name, str(x.meta["val"].dtype).removeprefix("torch."), tuple(shape_of(x)))
    return convolution(x, value, weight, kernel, bias, sliding, c.is_constant(weight))


@register("convolution")
def _convolution(
    c: Context,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Equation:
    if transposed:
        raise NotMultilinear("a transposed convolution")
    return _conv(c, x, weight, bias, stride, padding, dilation, groups)


def _each(values: Any, rank: int) -> list[int]:
    found = list(values) if isinstance(values, (list, tuple)) else [values]
    if not all(isinstance(v, int) for v in found):
        raise NotMultilinear("a convolution whose stride, padding or dilation is no number")
    return found * rank if len(found) == 1 else found


def _padding(padding: Any, taps: Sequence[Any], dilation: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Zeros before and after each axis; of an odd number for ``"same"``, the more come after."""
    if padding == "same":
        for size, spread in zip(taps, dilation, strict=True):
            total = spread * (int(size) - 1)
            yield total // 2, total - total // 2
        return
    yield from ((p, p) for p in _each(0 if padding == "valid" else padding, len(taps)))


@register("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def _batch_norm(c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Equation:
    *training, _, eps = rest[:3] if "legit" not in operator_name(c.node) else rest
    if any(training):
        raise NotMultilinear("batch_norm in training mode")
    if mean is None or not all(p is None or c.is_constant(p) for p in (weight, bias, mean, var)):
        raise NotMultilinear("batch_norm with statistics that are not constant")
    scale = (c.constant(var).double() + eps).rsqrt()
    if weight is not None:
        scale = scale * c.constant(weight).double()
    shift = -c.constant(mean).double() * scale
    if bias is not None:
        shift = shift + c.constant(bias).double()
    labels = _labels("d", rank_of(x))
    factor, offset = scale.numpy(), shift.numpy()
    prefix = mean.name.removeprefix("b_").removesuffix("_running_mean")
    return Equation(
        [
            Product([(x, labels)], constants=[(f"{prefix}.scale", factor, [labels[1]])]),
            Product([], constants=[(f"{prefix}.shift", offset, [labels[1]])]),
        ],
        labels,
    )
