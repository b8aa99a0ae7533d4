"""Which ATen operations are multilinear, and the einsum each of them is.

An operation is written as a sum of terms over *labels*: `Equation` pairs every tensor with one label for
each of its axes. A label on no output is summed. An axis of size 1 carries no index, so that broadcasting
needs no rules of its own.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tncompile.ir import Window

Label = Hashable


class NotMultilinear(Exception):
    """The operation, with these arguments, is not a network; it stays opaque. The text says why."""


@dataclass
class Product:
    """One term: tensors with their labels, times a number, times (optionally) computed constant factors."""

    factors: list[tuple[torch.fx.Node, list[Label]]]
    scale: float = 1.0
    constants: list[tuple[str, torch.Tensor, list[Label]]] = field(default_factory=list)


@dataclass
class Equation:
    """``output labels = sum of terms``.

    A tuple of labels in the place of one is an axis that groups several, whose sizes `sizes` has. `windows` are named
    by labels; they belong to the terms that have their axis, and their labels stay where they are of size 1.
    """

    terms: list[Product]
    output: Sequence[Label]
    sizes: Mapping[Label, int] = field(default_factory=dict)
    windows: Sequence[Window] = ()


@dataclass
class Reshape:
    """A reshape of one tensor; whether its modes nest is known only where sizes are."""

    source: torch.fx.Node


Translation = Equation | Reshape
Translator = Callable[..., Translation]
_TRANSLATORS: dict[str, Translator] = {}

# evaluates a node that depends on weights alone
Constant = Callable[[torch.fx.Node], torch.Tensor]


def translate(node: torch.fx.Node, constant: Constant, is_constant: Callable[[Any], bool]) -> Translation:
    """The equation of a node. NotMultilinear where it has none."""
    if operator_name(node) == "operator.getitem" and _is_batch_norm(node.args[0]) and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    name = operator_name(node)
    translator = _TRANSLATORS.get(name)
    if translator is None:
        raise NotMultilinear(f"{name} is not multilinear")
    context = Context(node, constant, is_constant)
    try:
        return translator(context, *node.args, **node.kwargs)
    except TypeError as error:  # an argument the translator does not know
        raise NotMultilinear(f"{name}: {error}") from error


def _is_batch_norm(source: Any) -> bool:
    return isinstance(source, torch.fx.Node) and "native_batch_norm" in operator_name(source)


def operator_name(node: torch.fx.Node) -> str:
    """``"aten.relu"`` for ``aten.relu.default``, ``"operator.getitem"`` for a Python operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return f"operator.{getattr(target, '__name__', target)}"


@dataclass(frozen=True)
class Context:
    """What a translator may ask about its node."""

    node: torch.fx.Node
    constant: Constant
    is_constant: Callable[[Any], bool]


def register(*names: str) -> Callable[[Translator], Translator]:
    """Make a function the translator of some ATen operations."""

    def add(function: Translator) -> Translator:
        for name in names:
            _TRANSLATORS[f"aten.{name}"] = function
        return function

    return add


def shape_of(node: torch.fx.Node) -> torch.Size:
    """The (possibly symbolic) shape of a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise NotMultilinear(f"{node.name} is not a tensor")
    return value.shape


def _rank(node: Any) -> int:
    if not isinstance(node, torch.fx.Node):
        raise NotMultilinear("a tensor was expected")
    return len(shape_of(node))


def _labels(prefix: str, count: int) -> list[Label]:
    return [f"{prefix}{k}" for k in range(count)]


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _elementwise(node: torch.fx.Node, rank: int) -> list[Label]:
    """Labels that align the axes of a tensor to the right, as broadcasting does."""
    return _labels("d", rank)[rank - _rank(node) :]


def _single(source: torch.fx.Node, labels: list[Label], output: list[Label], scale: float = 1.0) -> Equation:
    return Equation([Product([(source, labels)], scale)], output)


def _number(value: Any) -> float:
    if isinstance(value, (bool, complex)) or not isinstance(value, (int, float)):
        raise NotMultilinear("a factor that is not a plain number")
    if not math.isfinite(value):
        raise NotMultilinear("a factor that is not finite")
    return float(value)


# ------------------------------------------------------------------------------------ products


@register("linear")
def _linear(c: Context, x: Any, weight: Any, bias: Any = None) -> Equation:
    lead = _labels("d", _rank(x) - 1)
    out: list[Label] = ["o"] if _rank(weight) == 2 else []
    terms = [Product([(x, [*lead, "i"]), (weight, [*out, "i"])])]
    if bias is not None:
        terms.append(Product([(bias, ["o"] if _rank(bias) else [])]))
    return Equation(terms, [*lead, *out])


@register("mm", "bmm", "matmul")
def _matmul(c: Context, a: Any, b: Any) -> Equation:
    rank_a, rank_b = _rank(a), _rank(b)
    if not rank_a or not rank_b:
        raise NotMultilinear("matmul of a scalar")
    batch = _labels("d", max(rank_a, rank_b, 2) - 2)
    left = [*batch[len(batch) - max(rank_a - 2, 0) :], *(["m"] if rank_a > 1 else []), "k"]
    right = [*batch[len(batch) - max(rank_b - 2, 0) :], "k", *(["n"] if rank_b > 1 else [])]
    output = [*batch, *(["m"] if rank_a > 1 else []), *(["n"] if rank_b > 1 else [])]
    return Equation([Product([(a, left), (b, right)])], output)


@register("dot", "vdot")
def _dot(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["k"]), (b, ["k"])])], [])


@register("mv")
def _mv(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["m", "k"]), (b, ["k"])])], ["m"])


@register("outer", "ger")
def _outer(c: Context, a: Any, b: Any) -> Equation:
    return Equation([Product([(a, ["m"]), (b, ["n"])])], ["m", "n"])


@register("inner")
def _inner(c: Context, a: Any, b: Any) -> Equation:
    left, right = _labels("m", _rank(a) - 1), _labels("n", _rank(b) - 1)
    return Equation([Product([(a, [*left, "k"]), (b, [*right, "k"])])], [*left, *right])


@register("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(c: Context, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Equation:
    rank_a, rank_b = _rank(a), _rank(b)
    batch: list[Label] = ["d"] if rank_a == 3 else []
    column: list[Label] = ["n"] if rank_b > 1 else []
    output = ([] if operator_name(c.node) == "aten.addbmm" else batch) + ["m", *column]
    return Equation(
        [
            Product([(a, [*batch, "m", "k"]), (b, [*batch[: rank_b - 1], "k", *column])], _number(alpha)),
            Product([(bias, output[len(output) - _rank(bias) :])], _number(beta)),
        ],
        output,
    )


@register("bilinear")
def _bilinear(c: Context, a: Any, b: Any, weight: Any, bias: Any = None) -> Equation:
    lead = _labels("d", _rank(a) - 1)
    terms = [Product([(a, [*lead, "i"]), (weight, ["o", "i", "j"]), (b, [*lead, "j"])])]
    if bias is not None:
        terms.append(Product([(bias, ["o"])]))
    return Equation(terms, [*lead, "o"])


@register("tensordot")
def _tensordot(c: Context, a: Any, b: Any, dims_a: Sequence[int], dims_b: Sequence[int]) -> Equation:
    left, right = _labels("m", _rank(a)), _labels("n", _rank(b))
    for k, (p, q) in enumerate(zip(dims_a, dims_b, strict=True)):
        left[_axis(p, len(left))] = right[_axis(q, len(right))] = f"k{k}"
    summed = {f"k{k}" for k in range(len(dims_a))}
    return Equation([Product([(a, left), (b, right)])], [x for x in (*left, *right) if x not in summed])


@register("einsum")
def _einsum(c: Context, equation: str, operands: Sequence[Any], *, path: Any = None) -> Equation:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    widths = [_rank(x) - len(s.replace("...", "")) for s, x in zip(subscripts, operands, strict=True) if "..." in s]
    ellipsis = [f"...{k}" for k in range(max(widths, default=0))]

    def labels(subscript: str, width: int) -> list[Label]:
        before, dots, after = subscript.partition("...")
        return [*before, *(ellipsis[len(ellipsis) - width :] if dots else []), *after]

    factors = [(x, labels(s, _rank(x) - len(s.replace("...", "")))) for s, x in zip(subscripts, operands, strict=True)]
    if arrow:
        result = labels(output, len(ellipsis))
    else:
        letters = "".join(subscripts).replace(".", "")
        result = [*ellipsis, *(x for x in string.ascii_uppercase + string.ascii_lowercase if letters.count(x) == 1)]
    return Equation([Product(factors)], result)


@register("linalg_multi_dot", "chain_matmul")
def _multi_dot(c: Context, matrices: Sequence[Any]) -> Equation:
    factors: list[tuple[torch.fx.Node, list[Label]]] = []
    last = len(matrices) - 1
    for k, m in enumerate(matrices):
        labels: list[Label] = [f"k{k}", f"k{k + 1}"]
        factors.append((m, labels if _rank(m) == 2 else labels[1:] if k == 0 else labels[:1]))
    output = [*(["k0"] if _rank(matrices[0]) == 2 else []), *([f"k{last + 1}"] if _rank(matrices[last]) == 2 else [])]
    return Equation([Product(factors)], output)


@register("mul")
def _mul(c: Context, a: Any, b: Any) -> Equation:
    rank = len(shape_of(c.node))
    if not isinstance(a, torch.fx.Node):
        a, b = b, a
    if not isinstance(b, torch.fx.Node):
        return _single(a, _elementwise(a, rank), _labels("d", rank), _number(b))
    return Equation([Product([(a, _elementwise(a, rank)), (b, _elementwise(b, rank))])], _labels("d", rank))


@register("div", "true_divide")
def _div(c: Context, a: Any, b: Any, *, rounding_mode: Any = None) -> Equation:
    rank = len(shape_of(c.node))
    if rounding_mode is not None or not isinstance(a, torch.fx.Node):
        raise NotMultilinear("a division that rounds, or by a value")
    if not isinstance(b, torch.fx.Node):
        if _number(b) == 0:
            raise NotMultilinear("a division by zero")
        return _single(a, _elementwise(a, rank), _labels("d", rank), 1.0 / _number(b))
    if not c.is_constant(b):
        raise NotMultilinear("a division by a value that is not constant")
    inverse = (f"{b.name}.reciprocal", c.constant(b).double().reciprocal(), _elementwise(b, rank))
    return Equation([Product([(a, _elementwise(a, rank))], constants=[inverse])], _labels("d", rank))


@register("neg")
def _neg(c: Context, a: Any) -> Equation:
    labels = _labels("d", _rank(a))
    return _single(a, labels, labels, -1.0)


@register("addcmul")
def _addcmul(c: Context, base: Any, a: Any, b: Any, *, value: Any = 1) -> Equation:
    rank = len(shape_of(c.node))
    product = Product([(a, _elementwise(a, rank)), (b, _elementwise(b, rank))], _number(value))
    return Equation([Product([(base, _elementwise(base, rank))]), product], _labels("d", rank))


# ------------------------------------------------------------------------------------ sums


@register("add", "sub", "rsub")
def _add(c: Context, a: Any, b: Any, *, alpha: Any = 1) -> Equation:
    rank = len(shape_of(c.node))
    name = operator_name(c.node)
    scales = {"aten.add": (1.0, _number(alpha)), "aten.sub": (1.0, -_number(alpha))}.get(name, (-_number(alpha), 1.0))
    terms = []
    for x, scale in zip((a, b), scales, strict=True):
        if isinstance(x, torch.fx.Node):
            terms.append(Product([(x, _elementwise(x, rank))], scale))
        elif _number(x) * scale != 0:
            value = torch.tensor(_number(x) * scale, dtype=torch.float64)
            terms.append(Product([], constants=[(f"{c.node.name}.constant", value, [])]))
    return Equation(terms, _labels("d", rank))


@register("sum", "mean")
def _sum(c: Context, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Equation:
    shape = shape_of(a)
    if dtype not in (None, a.meta["val"].dtype):
        raise NotMultilinear("a sum in another dtype")
    dims = range(len(shape)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    summed = {_axis(d, len(shape)) for d in dims}
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
    labels = _labels("d", _rank(a))
    return _single(a, labels, [labels[k] for k in order])


@register("transpose", "swapaxes", "swapdims", "transpose_copy")
def _transpose(c: Context, a: Any, p: int, q: int) -> Equation:
    labels = _labels("d", _rank(a))
    output = list(labels)
    if labels:
        output[p], output[q] = labels[q], labels[p]
    return _single(a, labels, output)


@register("t", "numpy_T", "adjoint", "mT")
def _t(c: Context, a: Any) -> Equation:
    labels = _labels("d", _rank(a))
    return _single(a, labels, labels[::-1] if "numpy" in operator_name(c.node) else [*labels[:-2], *labels[:-3:-1]])


@register("movedim", "moveaxis")
def _movedim(c: Context, a: Any, source: Any, target: Any) -> Equation:
    rank = _rank(a)
    sources = [_axis(d, rank) for d in ([source] if isinstance(source, int) else source)]
    targets = [_axis(d, rank) for d in ([target] if isinstance(target, int) else target)]
    labels = _labels("d", rank)
    placed = dict(zip(targets, sources, strict=True))
    rest = iter(k for k in range(rank) if k not in sources)
    return _single(a, labels, [labels[placed[k] if k in placed else next(rest)] for k in range(rank)])


@register("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(c: Context, a: Any, *_: Any, implicit: bool = False) -> Equation:
    rank = len(shape_of(c.node))
    return _single(a, _elementwise(a, rank), _labels("d", rank))


@register("diagonal", "diagonal_copy")
def _diagonal(c: Context, a: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Equation:
    labels = _labels("d", _rank(a))
    p, q = _axis(dim1, len(labels)), _axis(dim2, len(labels))
    if offset or shape_of(a)[p] != shape_of(a)[q]:
        raise NotMultilinear("an off-diagonal")
    labels[p] = labels[q] = "k"
    return _single(a, labels, [*(x for x in labels if x != "k"), "k"])


# ------------------------------------------------------------------------------------ layers


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
    labels = _labels("d", _rank(x))
    prefix = mean.name.removeprefix("b_").removesuffix("_running_mean")
    return Equation(
        [
            Product([(x, labels)], constants=[(f"{prefix}.scale", scale, [labels[1]])]),
            Product([], constants=[(f"{prefix}.shift", shift, [labels[1]])]),
        ],
        labels,
    )
