"""A multilinear operation as an equation over labels, whatever graph it comes from.

An operation is written as a sum of terms over *labels*: `Equation` pairs every tensor with one label for
each of its axes. A label on no output is summed. An axis of size 1 carries no index, so that broadcasting
needs no rules of its own.
"""

from __future__ import annotations

import math
import string
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tncompile.ir.core import Array, Window

Label = Hashable
S = TypeVar("S")
"""What stands for a tensor: a node of a torch.export graph, or a value of an ONNX graph."""


class NotMultilinear(Exception):
    """The operation, with these arguments, is not a network; it stays opaque. The text says why."""


@dataclass
class Product(Generic[S]):
    """One term: tensors with their labels, times a number, times (optionally) computed constant factors."""

    factors: list[tuple[S, list[Label]]]
    scale: float = 1.0
    constants: list[tuple[str, Array, list[Label]]] = field(default_factory=list)


@dataclass
class Equation(Generic[S]):
    """``output labels = sum of terms``.

    A tuple of labels in the place of one is an axis that groups several, whose sizes `sizes` has. `windows` are named
    by labels; they belong to the terms that have their axis, and their labels stay where they are of size 1.
    """

    terms: list[Product[S]]
    output: Sequence[Label]
    sizes: Mapping[Label, int] = field(default_factory=dict)
    windows: Sequence[Window] = ()


@dataclass
class Reshape(Generic[S]):
    """A reshape of one tensor; whether its modes nest is known only where sizes are."""

    source: S


def labels(prefix: str, count: int) -> list[Label]:
    """``d0, d1, ...``."""
    return [f"{prefix}{k}" for k in range(count)]


def broadcast(rank: int, result: int) -> list[Label]:
    """Labels that align the axes of a tensor to the right of those of a result, as broadcasting does."""
    return labels("d", result)[result - rank :]


def single(source: S, before: list[Label], output: list[Label], scale: float = 1.0) -> Equation[S]:
    """One tensor, times a number."""
    return Equation([Product([(source, before)], scale)], output)


def number(value: Any) -> float:
    """A finite factor. NotMultilinear for anything else."""
    if isinstance(value, (bool, complex)) or not isinstance(value, (int, float)):
        raise NotMultilinear("a factor that is not a plain number")
    if not math.isfinite(value):
        raise NotMultilinear("a factor that is not finite")
    return float(value)


def matmul(a: S, rank_a: int, b: S, rank_b: int) -> Equation[S]:
    """The product of stacked matrices, or of vectors, as numpy defines it."""
    if not rank_a or not rank_b:
        raise NotMultilinear("matmul of a scalar")
    batch = labels("d", max(rank_a, rank_b, 2) - 2)
    left = [*batch[len(batch) - max(rank_a - 2, 0) :], *(["m"] if rank_a > 1 else []), "k"]
    right = [*batch[len(batch) - max(rank_b - 2, 0) :], "k", *(["n"] if rank_b > 1 else [])]
    output = [*batch, *(["m"] if rank_a > 1 else []), *(["n"] if rank_b > 1 else [])]
    return Equation([Product([(a, left), (b, right)])], output)


def einsum(equation: str, operands: Sequence[S], ranks: Sequence[int]) -> Equation[S]:
    """An einsum in text, with ellipsis or without an output as numpy reads them."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if len(subscripts) != len(operands):
        raise NotMultilinear(f"an einsum of {len(subscripts)} subscripts and {len(operands)} operands")
    widths = [rank - len(s.replace("...", "")) for s, rank in zip(subscripts, ranks, strict=True)]
    if any(w < 0 or (w and "..." not in s) for s, w in zip(subscripts, widths, strict=True)):
        raise NotMultilinear("an einsum whose subscripts do not fit its operands")
    ellipsis = [f"...{k}" for k in range(max(widths, default=0))]

    def read(subscript: str, width: int) -> list[Label]:
        before, dots, after = subscript.partition("...")
        return [*before, *(ellipsis[len(ellipsis) - width :] if dots else []), *after]

    factors = [(x, read(s, width)) for x, s, width in zip(operands, subscripts, widths, strict=True)]
    if arrow:
        result = read(output, len(ellipsis))
    else:
        letters = "".join(subscripts).replace(".", "")
        result = [*ellipsis, *(x for x in string.ascii_uppercase + string.ascii_lowercase if letters.count(x) == 1)]
    return Equation([Product(factors)], result)
