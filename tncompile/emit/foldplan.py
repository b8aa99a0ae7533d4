"""In which pairs constants are contracted at load, so that little is made on the way.

ONNX Runtime folds node by node and keeps what each makes until all are folded: what counts is the sum, each Reshape
and Transpose included. So a contraction is written straight into the order that is wanted where that is less: indices
of one side are axes that the other is broadcast over. ``W[(i1 i2), (o1 o2)] = sum_r A[i1, o1, r] B[r, i2, o2]`` is one
MatMul of ``A[i1, 1, o1, r]`` and ``B[1, i2, r, o2]`` and a Reshape; as a matrix product with all of A's indices first
it would need a Transpose and a second Reshape. The pairs are searched for too, as a tensor may be smaller where it
enters early, as the scale of a norm does, or late.

Indices are numbers here, so that equal contractions of other names are planned once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, groupby

Axis = tuple[int, ...]
Axes = tuple[Axis, ...]

_PRODUCT, _FLOP = 4, 1 / 4096
"""Numbers kept that one product of a batched MatMul, and one operation, are as bad as: both far less than what
their time is worth (0.2 microseconds, as long as 35 numbers, and a 57th), as load takes little time, and memory is
short."""

_ALL_PAIRS, _CUTS, _MIDDLE = 8, 16, 64
"""Tensors of which every two parts are tried; every cut and each of them apart; the cuts at the ends and in the middle.
Of more it is the middle alone."""

_TRIALS = 3000
"""Pairs of parts that are tried, after which each part is taken apart where that looks best."""


@dataclass(frozen=True)
class Fold:
    """How tensors are contracted to an array of `axes`.

    `places` are the tensors, in the order in which they were given. One alone is in the file as it is wanted; of more,
    the two `halves` meet in a node of type `op`, whose result has the axes `met` and is brought into `axes`. `made`
    numbers are kept on the way, the result's included; `flops` and `products` of batched matmuls are computed.
    """

    places: tuple[int, ...]
    axes: Axes
    made: int
    flops: int = 0
    products: int = 0
    op: str = ""
    met: Axes = ()
    halves: tuple[Fold, ...] = ()

    @property
    def badness(self) -> float:
        """What is to be least."""
        return self.made + _PRODUCT * self.products + _FLOP * self.flops


@lru_cache(maxsize=1 << 14)
def plan_fold(tensors: tuple[Axis, ...], sizes: tuple[int, ...], axes: Axes) -> Fold:
    """The fold of least memory of tensors, at least one, each given by its indices, to `axes`; `sizes` are those of all
    indices."""
    return _Search(tensors, sizes).best(tuple(range(len(tensors))), axes)


class _Search:
    def __init__(self, tensors: tuple[Axis, ...], sizes: tuple[int, ...]) -> None:
        self.tensors = tensors
        self.sizes = sizes
        self.found: dict[tuple[tuple[int, ...], Axes], Fold] = {}
        self.trials = 0

    def best(self, places: tuple[int, ...], axes: Axes) -> Fold:
        key = places, axes
        if key not in self.found:
            self.found[key] = Fold(places, axes, 0) if len(places) == 1 else self._met(places, axes)
        return self.found[key]

    def _met(self, places: tuple[int, ...], axes: Axes) -> Fold:
        forms = [form for pair in _pairs(places) for form in self._forms(pair, axes)]
        best: Fold | None = None
        for form in sorted(forms, key=lambda form: form.least):
            if best is not None and (form.least >= best.badness or self.trials >= _TRIALS):
                break
            self.trials += 1
            halves = tuple(self.best(half, side) for half, side in zip(form.pair, form.sides, strict=True))
            fold = Fold(
                places,
                axes,
                form.made + sum(half.made for half in halves),
                form.flops + sum(half.flops for half in halves),
                form.products + sum(half.products for half in halves),
                form.op,
                form.met,
                halves,
            )
            if best is None or fold.badness < best.badness:
                best = fold
        assert best is not None
        return best

    def _forms(self, pair: _Pair, axes: Axes) -> Iterator[_Form]:
        """The ways in which two parts may meet."""
        order = _order(axes)
        first, second = ({i for p in half for i in self.tensors[p]} for half in pair)
        if order and order[-1] not in second:
            pair, first, second = pair[::-1], second, first
        bond = tuple(sorted((first & second) - {*order}))
        homes = {i: (i in first, i in second) for i in order}
        yield self._form(pair, _runs(order, homes), bond, axes)  # straight into the order, in as few axes as can be
        yield self._form(pair, [(homes[i], (i,)) for i in order], bond, axes)  # in one axis for each index
        as_wanted = [run for axis in axes for run in _runs(axis, homes) or [(_NEITHER, ())]]
        form = self._form(pair, as_wanted, bond, axes)
        if form.met == axes:
            yield form
        turned = tuple(sorted(order, key=lambda i: _TURNED.index(homes[i])))
        if bond and turned != order:  # as one matrix product for each index of both, which is transposed then
            yield self._form(pair, _runs(turned, homes), bond, axes)

    def _form(self, pair: _Pair, runs: list[tuple[_Home, Axis]], bond: Axis, axes: Axes) -> _Form:
        """Each of `runs` is one axis of the result. The last is the matmul's ``n`` where the second half alone has it,
        and what is before it is its ``m`` where the first alone has that: in the example above the runs i1, i2, o1, o2
        are met in ``[i1, i2, o1, o2]`` by sides ``[i1, 1, o1, r]`` and ``[i2, r, o2]``."""
        last: tuple[Axes, Axes, Axes] = ((), (), ())
        lead = [*runs]
        if bond:
            columns = lead.pop()[1] if lead and lead[-1][0] in (_SECOND, _NEITHER) else ()
            rows = lead.pop()[1] if lead and lead[-1][0] in (_FIRST, _NEITHER) else ()
            last = ((rows, bond), (bond, columns), (rows, columns))
        leads = [tuple(run if of[side] else () for of, run in lead) for side in (0, 1)]
        if lead and lead[0][1]:  # else an axis of size 1 is wanted in front
            leads = [_without_ones(side) for side in leads]
        sides = ((*leads[0], *last[0]), (*leads[1], *last[1]))
        met = (*(run for _, run in lead), *last[2])
        size = self._size(_order(axes))
        made = size if met == axes else 2 * size
        if _order(met) != _order(axes):
            made = 4 * size  # a Reshape, a Transpose and a Reshape
        products = self._size(i for _, run in lead for i in run) if bond else 0
        flops = 2 * size * self._size(bond) if bond else size
        least = made + _PRODUCT * products + _FLOP * flops
        least += sum(self._size(_order(side)) for half, side in zip(pair, sides, strict=True) if len(half) > 1)
        return _Form(pair, sides, "MatMul" if bond else "Mul", met, made, flops, products, least)

    def _size(self, indices: Iterable[int]) -> int:
        return math.prod(self.sizes[i] for i in indices)


_Pair = tuple[tuple[int, ...], tuple[int, ...]]
_Home = tuple[bool, bool]  # whether the first half has an index, and the second

_BOTH, _FIRST, _SECOND, _NEITHER = (True, True), (True, False), (False, True), (False, False)
_TURNED: Sequence[_Home] = (_BOTH, _FIRST, _SECOND)  # batch, rows and columns of a MatMul


@dataclass(frozen=True)
class _Form:
    """One way in which two parts meet: the axes of both sides, and of the result; `least` is a bound of the badness."""

    pair: _Pair
    sides: tuple[Axes, Axes]
    op: str
    met: Axes
    made: int
    flops: int
    products: int
    least: float


def _pairs(places: tuple[int, ...]) -> Iterator[_Pair]:
    """Two parts of some places, in every way that is tried."""
    count = len(places)
    if count <= _ALL_PAIRS:
        for size in range(count - 1):
            for rest in combinations(places[1:], size):
                first = (places[0], *rest)
                yield first, tuple(p for p in places if p not in first)
        return
    cuts = range(1, count) if count <= _CUTS else {1, count // 2, count - 1} if count <= _MIDDLE else {count // 2}
    for cut in cuts:
        yield places[:cut], places[cut:]
    for k in range(1, count - 1) if count <= _CUTS else ():
        yield (*places[:k], *places[k + 1 :]), (places[k],)


def _runs(order: Sequence[int], homes: Mapping[int, _Home]) -> list[tuple[_Home, Axis]]:
    """Neighbours of one home."""
    return [(home, tuple(run)) for home, run in groupby(order, homes.__getitem__)]


def _without_ones(lead: Axes) -> Axes:
    """Axes that are broadcast anyway, as none stands before them, are left out."""
    used = next((k for k, axis in enumerate(lead) if axis), len(lead))
    return lead[used:]


def _order(axes: Axes) -> Axis:
    return tuple(index for axis in axes for index in axis)
