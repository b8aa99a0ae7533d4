"""The steps of a plan: products, and products that are computed in slices together with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tncompile.cost.layouts import Layout
from tncompile.cost.slices import Cut, gradient_pair, moved
from tncompile.cost.training import Form, Pair, relaid

Turn = tuple[int, ...]
Size = Callable[[Collection[str]], int]


@dataclass(frozen=True)
class Product:
    """A `Pair` in positions: `turns` bring the sides into the order of the product.

    The first `batch` axes of a turned side are kept by both, the last `summed` ones of the left are summed; of the form
    ``outer_last`` the last `batch` axes are kept by both. Where the result is to lie as the product that takes it needs
    it, `laid` is the permutation that does so.
    """

    left: int
    right: int
    form: Form
    turns: tuple[Turn, Turn]
    batch: int
    summed: int
    laid: Turn | None = None


@dataclass(frozen=True)
class Gradient:
    """The gradient of one side of a product, by one more: its sides 0 and 1 are the gradient of the result, in the
    order before it is `laid`, and the other side. `back` turns what it leaves into the order of the side."""

    product: Product
    back: Turn


@dataclass(frozen=True)
class Sliced:
    """Products that are computed in `count` slices of one index, and their gradients too, for which results are
    computed again slice by slice, unless it `keeps` them.

    They take the values `reads` of the term, which they number from 0 on, then their own results; the last is the
    result. `axes` tells where the index lies in each value and each result: None where it is not, so that slices of it,
    or of its gradient, are added. `gradients` has those of both sides of each product.
    """

    reads: tuple[int, ...]
    products: tuple[Product, ...]
    gradients: tuple[tuple[Gradient, Gradient], ...]
    axes: tuple[int | None, ...]
    count: int
    keeps: bool


Step = Product | Sliced


def steps_of(
    pairs: Sequence[Pair], layouts: Sequence[Layout], cut: Cut | None, size: Size
) -> tuple[list[Step], Layout]:
    """The steps that compute pairs of tensors which lie as `layouts` say, and how their last result lies."""
    if cut is not None:
        pairs = moved(pairs, len(layouts), cut)
    lies = [*layouts]
    wanted = relaid(pairs, len(lies))
    products = []
    for pair in pairs:
        laid = wanted.get(len(lies))
        products.append(_product(pair, lies, laid))
        lies.append(laid or pair.result)
    if cut is None:
        return [*products], lies[-1]
    count = len(layouts)
    inside = range(count + cut.first, count + cut.last)
    sliced = _sliced(products[cut.first : cut.last], pairs[cut.first : cut.last], inside, lies, cut, size)
    after = [_renumbered(p, lambda n: n if n < inside[0] else n - len(inside) + 1) for p in products[cut.last :]]
    return [*products[: cut.first], sliced, *after], lies[-1]


def _product(pair: Pair, lies: Sequence[Layout], laid: Layout | None) -> Product:
    sides = zip((lies[pair.left], lies[pair.right]), pair.sides, strict=True)
    left, right = (_turn(before, after) for before, after in sides)
    turned = None if laid is None else _turn(pair.result, laid)
    return Product(pair.left, pair.right, pair.form, (left, right), len(pair.batch), len(pair.summed), turned)


def _turn(before: Layout, after: Layout) -> Turn:
    return tuple(before.index(name) for name in after)


def _renumbered(product: Product, number: Callable[[int], int]) -> Product:
    return replace(product, left=number(product.left), right=number(product.right))


def _sliced(
    products: Sequence[Product], pairs: Sequence[Pair], inside: range, lies: Sequence[Layout], cut: Cut, size: Size
) -> Sliced:
    reads = [n for p in products for n in (p.left, p.right) if n not in inside]
    number = {n: k for k, n in enumerate((*reads, *inside))}
    gradients = []
    for pair in pairs:
        left, right = lies[pair.left], lies[pair.right]
        gradients.append((_gradient(left, pair.result, right, size), _gradient(right, pair.result, left, size)))

    def axis(n: int) -> int | None:
        return lies[n].index(cut.index) if cut.index in lies[n] else None

    own = tuple(_renumbered(p, number.__getitem__) for p in products)
    return Sliced(tuple(reads), own, tuple(gradients), tuple(map(axis, (*reads, *inside))), cut.count, cut.keeps)


def _gradient(side: Layout, result: Layout, other: Layout, size: Size) -> Gradient:
    pair = gradient_pair(side, result, other, size)
    return Gradient(_product(pair, (result, other), None), _turn(pair.result, side))
