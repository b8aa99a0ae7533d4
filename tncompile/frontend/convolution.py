"""A convolution as an equation: a window where its kernel slides, a plain mode where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tncompile.frontend.equation import Equation, Label, NotMultilinear, Product
from tncompile.ir import Value, Window

S = TypeVar("S")


@dataclass(frozen=True)
class Sliding:
    """How a kernel slides: one entry for each axis of space, `padding` with zeros before and after it."""

    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[tuple[int, int]]
    groups: int = 1


def convolution(
    x: S, value: Value, weight: S, kernel: Sequence[Any], bias: S | None, sliding: Sliding, constant: bool
) -> Equation[S]:
    """``y[b, (g o), h..] = x[b, (g c), stride*h + dilation*k - padding..] W[(g o), c, k..]``, zero outside of x.

    `value` tells what x is, `kernel` is the shape of the weight, which is `constant` where it depends on weights alone.
    NotMultilinear where that has to be and is not.
    """
    shape = value.shape or ()
    if len(shape) != len(kernel) or not all(isinstance(size, int) for size in kernel):
        raise NotMultilinear("a convolution without a batch, or with a kernel of run-time size")
    ahead: list[Label] = []
    inside: list[Label] = []
    behind: list[Label] = []
    windows = []
    steps = zip(sliding.stride, sliding.dilation, sliding.padding, strict=True)
    for k, (stride, dilation, padding) in enumerate(steps):
        size, taps = shape[2 + k], kernel[2 + k]
        if taps == 1 and stride == 1 and padding == (0, 0):
            labels: tuple[Label, ...] = (f"s{k}", f"one{k}", f"s{k}")
        elif isinstance(size, int) and size == taps and dilation == 1 and padding == (0, 0):
            labels = (f"k{k}", f"k{k}", f"one{k}")  # the kernel is as large as what it is applied to
        else:
            labels = (f"i{k}", f"k{k}", f"h{k}")
            windows.append(Window(f"i{k}", f"k{k}", f"h{k}", stride, dilation, padding))
        for side, label in zip((ahead, inside, behind), labels, strict=True):
            side.append(label)
    if windows and not constant:
        raise NotMultilinear("a convolution with a kernel that is computed at run time")
    if windows and value.dtype == "float64":
        raise NotMultilinear("a convolution in float64, which ONNX Runtime does not have")
    sizes: dict[Label, int] = {}
    channels: Label = "c"
    filters: Label = "o"
    if sliding.groups > 1:
        sizes = {"g": sliding.groups, "c": kernel[1], "o": kernel[0] // sliding.groups}
        channels, filters = ("g", "c"), ("g", "o")
    terms = [Product([(x, ["b", channels, *ahead]), (weight, [filters, "c", *inside])])]
    if bias is not None:
        terms.append(Product([(bias, [filters])]))
    return Equation(terms, ["b", filters, *behind], sizes, windows)
