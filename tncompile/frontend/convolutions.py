"""Convolutions as equations: a window where the kernel slides, a plain mode where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompile.frontend.multilinear import Context, Equation, Label, NotMultilinear, Product, register, shape_of
from tncompile.ir import Window


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
    return _equation(c, x, weight, bias, stride, padding, dilation, groups)


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
    return _equation(c, x, weight, bias, stride, padding, dilation, groups)


def _equation(
    c: Context,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Equation:
    """``y[b, (g o), h..] = x[b, (g i), stride*h + dilation*k - padding..] W[(g o), i, k..]``, zero outside of x."""
    if not isinstance(x, torch.fx.Node) or not isinstance(weight, torch.fx.Node):
        raise NotMultilinear("a tensor was expected")
    shape, kernel, out = shape_of(x), shape_of(weight), shape_of(c.node)
    rank = len(kernel) - 2
    if len(shape) != len(kernel):
        raise NotMultilinear("a convolution without a batch")
    steps, spread = _each(stride, rank), _each(dilation, rank)
    pads = list(_padding(padding, kernel[2:], spread))
    ahead: list[Label] = []
    inside: list[Label] = []
    behind: list[Label] = []
    windows = []
    for k in range(rank):
        size, taps = shape[2 + k], int(kernel[2 + k])
        if taps == 1 and steps[k] == 1 and pads[k] == (0, 0):
            labels: tuple[Label, ...] = (f"s{k}", f"one{k}", f"s{k}")
        elif isinstance(size, int) and size == taps and pads[k] == (0, 0):
            labels = (f"k{k}", f"k{k}", f"one{k}")  # the kernel is as large as what it is applied to
        else:
            window = Window(f"i{k}", f"k{k}", f"h{k}", steps[k], spread[k], pads[k])
            windows.append(window)
            labels = (window.axis, window.kernel, window.out)
        for side, label in zip((ahead, inside, behind), labels, strict=True):
            side.append(label)
    if windows and not c.is_constant(weight):
        raise NotMultilinear("a convolution with a kernel that is computed at run time")
    if windows and x.meta["val"].dtype == torch.float64:
        raise NotMultilinear("a convolution in float64, which ONNX Runtime does not have")
    sizes: dict[Label, int] = {}
    channels: Label = "c"
    filters: Label = "o"
    if groups > 1:
        sizes = {"g": groups, "c": int(kernel[1]), "o": int(kernel[0]) // groups}
        channels, filters = ("g", "c"), ("g", "o")
    product = Product([(x, ["b", channels, *ahead]), (weight, [filters, "c", *inside])])
    terms = [product] + ([] if bias is None else [Product([(bias, [filters])])])
    if any(isinstance(size, int) and size == 0 for size in out):
        raise NotMultilinear("a convolution of nothing")
    return Equation(terms, ["b", filters, *behind], sizes, windows)


def _each(values: Any, rank: int) -> list[int]:
    found = list(values) if isinstance(values, (list, tuple)) else [values]
    if not all(isinstance(v, int) for v in found):
        raise NotMultilinear("a convolution whose stride, padding or dilation is no number")
    return found * rank if len(found) == 1 else found


def _padding(padding: Any, taps: Sequence[Any], dilation: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Zeros before and after each axis; of an odd number for ``"same"``, the more come after."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        for size, spread in zip(taps, dilation, strict=True):
            total = spread * (int(size) - 1)
            yield total // 2, total - total // 2
        return
    yield from ((p, p) for p in _each(padding, len(taps)))
