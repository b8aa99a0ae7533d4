"""Nodes that contract cores into an array of a given arrangement, with few arrays of its size on the way.

ONNX Runtime folds them node by node at load and keeps what each makes until all are folded. So the last contraction
is written straight into the order that is wanted: indices of one side are axes that the other is broadcast over.
``W[(i1 i2), (o1 o2)] = sum_r A[i1, o1, r] B[r, i2, o2]`` is one MatMul of ``A[i1, 1, o1, r]`` and ``B[1, i2, r, o2]``
and a Reshape; as a matrix product with all of A's indices first it would need a Transpose and a second Reshape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import onnx_ir as onnx

from tncompile.cost.devices import default_profile
from tncompile.cost.schedule import Schedule, Scheduler
from tncompile.emit.graph import GraphWriter, Groups, Laid, Weights
from tncompile.emit.network import lower
from tncompile.ir import Index, Network, Tensor, Term
from tncompile.ir.tree import Tree, flatten, fold_tree, left_to_right, map_tree

Axes = Sequence[Sequence[Index]]


def scheduled(term: Term, kept: Iterable[Index]) -> Schedule:
    """The schedule of a contraction of cores alone, in the term's own order."""
    sizes = {name: int(index.size) for name, index in term.indices.items()}
    return Scheduler(term, [tuple(kept)], sizes, default_profile(), 4).schedule(term.order)


def fold_nodes(
    term: Term, axes: Axes, parts: Sequence[onnx.Value], dtype: str, weights: Weights
) -> tuple[list[onnx.Node], onnx.Value]:
    """The nodes that contract `parts`, one for each tensor of `term`, to `axes`, and the value they end in."""
    wanted = [_Wanted(term, axes, range(len(parts)))]
    forms: list[tuple[_Last, int] | None] = []  # and where the first of the two halves is in `wanted`
    for array in wanted:  # which grows by the halves while this runs
        form = _Last.best(array)
        forms.append(None if form is None else (form, len(wanted)))
        wanted += form.halves if form is not None else ()
    nodes: list[onnx.Node] = []
    values: dict[int, onnx.Value] = {}
    for place in reversed(range(len(wanted))):
        array, found = wanted[place], forms[place]
        if found is None:
            made, values[place] = _contraction(array, [parts[p] for p in array.places], dtype, weights)
        else:
            form, half = found
            write = GraphWriter("fold", {name: i.size for name, i in term.indices.items()}, dtype, weights, (), {})
            product = Laid(write.op(form.op, [values[half], values[half + 1]]), _names(form.output))
            made, values[place] = write.nodes, write.regroup(product, _names(array.axes)).value
        nodes += made
    return nodes, values[0]


@dataclass(frozen=True)
class _Wanted:
    """What a term makes of cores, in some axes; `places` has the number of each core in the whole contraction."""

    term: Term
    axes: Axes
    places: Sequence[int]

    @property
    def order(self) -> list[Index]:
        return [index for axis in self.axes for index in axis]


@dataclass(frozen=True)
class _Last:
    """A last contraction: the two arrays that meet, what is computed of them, and the axes that it has then."""

    op: str
    halves: tuple[_Wanted, _Wanted]
    output: Axes

    @staticmethod
    def best(wanted: _Wanted) -> _Last | None:
        """That of least memory, or None where it is less to contract in any order and to transpose the result.

        A core of kept indices alone, as the scale of a norm, may be applied to either half before they meet.
        """
        found = [_Last.of(wanted, order) for order in _orders(wanted)]
        best = min(found, key=lambda form: form.elements, default=None)
        return None if best is None or best.elements > 4 * _elements(wanted.order) else best

    @staticmethod
    def of(wanted: _Wanted, tree: tuple[Tree, Tree]) -> _Last:
        """That of the two halves of an order.

        Indices that stand together and are of the same halves are one axis. The last axis is the matmul's ``n`` where
        one half alone has it, and what stands before it is its ``m`` where the other alone has that.
        """
        first, second = (_branch(wanted.term, half) for half in tree)
        order = wanted.order
        if order and order[-1].name not in second.indices:
            tree, first, second = tree[::-1], second, first
        kept = {index.name for index in order}
        bond = [index for name, index in first.indices.items() if name in second.indices and name not in kept]

        def homes(index: Index) -> tuple[bool, bool]:
            return index.name in first.indices, index.name in second.indices

        runs = [(of, list(run)) for of, run in groupby(order, homes)]
        last: list[list[list[Index]]] = [[], [], []]
        if bond:
            columns = runs.pop()[1] if runs and runs[-1][0] == (False, True) else []
            rows = runs.pop()[1] if runs and runs[-1][0] == (True, False) else []
            last = [[rows, bond], [bond, columns], [rows, columns]]
        shared = [[run if of[side] else [] for of, run in runs] for side in (0, 1)]
        sides = [
            _Wanted(half, [*lead, *rest], [wanted.places[p] for p in flatten(places)])
            for half, lead, rest, places in zip((first, second), shared, last[:2], tree, strict=True)
        ]
        return _Last("MatMul" if bond else "Mul", (sides[0], sides[1]), [*(run for _, run in runs), *last[2]])

    @property
    def elements(self) -> int:
        """Numbers in its result, in both halves, each with a Reshape, and in what a MatMul keeps for its products."""
        made = 2 * _elements([index for axis in self.output for index in axis])
        halves = sum(2 * _elements(half.order) for half in self.halves if len(half.term.tensors) > 1)
        products = _elements([index for axis in self.output[:-2] for index in axis]) if self.op == "MatMul" else 0
        return made + halves + _PRODUCT * products


_PRODUCT = 22
"""Numbers of four bytes that a batched MatMul of ONNX Runtime 1.31 keeps for each product: pointers, sizes, offsets."""


def _elements(order: Iterable[Index]) -> int:
    return math.prod(int(index.size) for index in order)


def _orders(wanted: _Wanted) -> list[tuple[Tree, Tree]]:
    """The order of a term, and those in which what has kept indices alone meets either half, or the rest, last."""
    term, kept = wanted.term, {index.name for index in wanted.order}
    if isinstance(term.order, int):
        return []
    found = [_pair(term.order)]
    scales = [p for p, tensor in enumerate(term.tensors) if {i.name for i in tensor.indices} <= kept]
    rest = _without(term.order, {*scales})
    if scales and isinstance(rest, tuple):
        left, right = rest
        scale = left_to_right(scales)
        found += [((left, scale), right), (left, (right, scale)), (rest, scale)]
    return found


def _pair(tree: tuple[Any, ...]) -> tuple[Tree, Tree]:
    *first, last = tree
    return first[0] if len(first) == 1 else tuple(first), last


def _without(tree: Tree, places: set[int]) -> Tree | None:
    """An order without some places; every branch of it is a pair."""

    def leaf(place: int) -> Tree | None:
        return None if place in places else place

    def join(a: Tree | None, b: Tree | None) -> Tree | None:
        return (a, b) if a is not None and b is not None else a if b is None else b

    return fold_tree(tree, leaf, join)


def _branch(term: Term, tree: Tree) -> Term:
    places = flatten(tree)
    number = {place: k for k, place in enumerate(places)}
    return Term(tuple(term.tensors[p] for p in places), map_tree(tree, number.__getitem__))


def _contraction(
    wanted: _Wanted, parts: Sequence[onnx.Value], dtype: str, weights: Weights
) -> tuple[list[onnx.Node], onnx.Value]:
    """The nodes of a contraction whose result is transposed and reshaped to what is wanted."""
    operands = tuple(Tensor(str(p), part.axes) for p, part in enumerate(wanted.term.tensors))
    term = Term(operands, wanted.term.order)
    term = replace(term, steps=scheduled(term, wanted.order).steps)
    network = Network("fold", (term,), Tensor("folded", tuple(map(tuple, wanted.axes))), dtype)
    return lower(network, {o.name: part for o, part in zip(operands, parts, strict=True)}, weights, {})


def _names(axes: Axes) -> Groups:
    return tuple(tuple(index.name for index in axis) for axis in axes)
