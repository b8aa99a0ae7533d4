"""Layouts: which index stands where in a row-major array, and what part each plays in a contraction."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tncompile.ir import Term, Window

Layout = tuple[str, ...]
_Order = tuple[int, ...]
_MAX_PERMUTED = 3  # up to 3! orders of a core's free modes are tried
MAX_SPACE = 3  # axes behind the channels that ONNX Runtime's Conv takes


@dataclass(frozen=True)
class Classes:
    """The roles of indices in one contraction, each in the order of the side they come from."""

    batch: Layout
    summed: Layout
    left: Layout
    right: Layout


def classify(left: Layout, right: Layout, kept: Collection[str]) -> Classes:
    """Sort the indices of a pair into R, K, M and N."""
    shared = [i for i in left if i in right]
    return Classes(
        tuple(i for i in shared if i in kept),
        tuple(i for i in shared if i not in kept),
        tuple(i for i in left if i not in right),
        tuple(i for i in right if i not in left),
    )


def reduced_layout(term: Term, position: int, output: Iterable[str]) -> Layout:
    """A tensor's indices, each once and in order, without those that only this tensor has and that are summed."""
    return reduced_layouts(term, output)[position]


def reduced_layouts(term: Term, output: Iterable[str]) -> list[Layout]:
    """`reduced_layout` of every tensor."""
    names = [tuple(dict.fromkeys(i.name for i in t.indices)) for t in term.tensors]
    held = Counter(itertools.chain(output, term.slid, *names))
    return [tuple(name for name in layout if held[name] > 1) for layout in names]


@dataclass(frozen=True)
class Convolution:
    """The roles of indices in a contraction with windows: of the left side in the order in which it must lie, and the
    filters, which the kernel alone has."""

    batch: Layout
    groups: Layout
    channels: Layout
    space: Layout
    filters: Layout

    @property
    def wanted(self) -> Layout:
        """The layout of the left side."""
        return (*self.batch, *self.groups, *self.channels, *self.space)


def convolution(x: Layout, y: Layout, windows: Sequence[Window], kept: Collection[str]) -> Convolution:
    """How a kernel `y` with `windows` over `x` is applied to it; without any, at each place behind the channels."""
    c = classify(x, y, kept)
    axes, kernels = {w.axis for w in windows}, {w.kernel for w in windows}
    start = min(map(x.index, axes or {i for i in x if i in c.summed}))
    behind = [i for i in x[start:] if i in c.left]
    if len(behind) > MAX_SPACE:
        behind = [i for i in behind if i in axes]
    batch = tuple(i for i in c.left if i not in behind)
    return Convolution(batch, c.batch, c.summed, tuple(behind), tuple(i for i in c.right if i not in kernels))


def slide(windows: Iterable[Window], union: Collection[str], kept: set[str]) -> set[str]:
    """The indices that a contraction keeps, where windows whose two sides are in it leave their third index."""
    for w in windows:
        if w.axis in union and w.kernel in union:
            kept = (kept - {w.axis, w.kernel}) | {w.out}
    return kept


def swapped(layout: Layout, wanted: Layout) -> tuple[Layout, Layout] | None:
    """The two neighbouring blocks at the end that change places; None where more than that moves."""
    head = next((k for k, (a, b) in enumerate(zip(layout, wanted, strict=True)) if a != b), 0)
    a, b = layout[head:], wanted[head:]
    cut = a.index(b[0])
    return (a[:cut], a[cut:]) if a[cut:] + a[:cut] == b else None


AT_LEAST = 4
"""What a size that is known only at run time counts for in `halfway`, which writer and price ask alike."""
_LITTLE = 512  # elements, below which a node more takes longer
_WIDE = 16  # elements that are copied as one at no loss
_BLOCK = 8  # bytes up to which ONNX Runtime has a kernel that moves one axis; wider ones are copied block by block
_MOST = 5  # groups: of more it is not looked for


def halfway(layout: Layout, wanted: Layout, sizes: Mapping[str, int], itemsize: int) -> Layout | None:
    """An order between two, from which and to which only two neighbouring groups change places: two Transposes, each of
    one axis, take a fifth of one of several axes. None where one does it, or where little or wide blocks move.

    ``a b c -> a c b -> c b a``. ONNX Runtime makes one Transpose of two with a Reshape between that only splits axes:
    the second takes as one axis what the first made two of.
    """
    runs: list[Layout] = []
    for name in layout:
        if runs and wanted.index(name) == wanted.index(runs[-1][-1]) + 1:
            runs[-1] = (*runs[-1], name)
        else:
            runs.append((name,))
    elements = [math.prod(sizes[name] for name in run) for run in runs]
    places = tuple(sorted(range(len(runs)), key=lambda k: wanted.index(runs[k][0])))
    stays = places[-1] == len(runs) - 1
    if len(runs) > _MOST or math.prod(elements) < _LITTLE or (stays and elements[-1] * itemsize > _BLOCK):
        return None
    for middle, behind in _halves(places):
        if all(not tail - {len(runs) - 1} or math.prod(elements[k] for k in tail) >= _WIDE for tail in behind):
            return tuple(name for k in middle for name in runs[k])
    return None


@lru_cache
def _halves(wanted: _Order) -> tuple[tuple[_Order, tuple[frozenset[int], ...]], ...]:
    """The orders between ascending numbers and the `wanted` one, and what stays behind in either half; first those
    with the least behind. None where one exchange does it, or where the second would only split axes of the first."""
    start, ends = tuple(range(len(wanted))), {0, len(wanted)}
    found = []
    for first, _, made in _exchanges(start):
        if first == wanted:
            return ()
        for second, read, _ in _exchanges(first):
            if second == wanted and {*made} - {*read} - ends:  # something becomes one axis
                found.append((first, (frozenset(first[made[2] :]), frozenset(first[read[2] :]))))
    return tuple(sorted(found, key=lambda half: sum(map(len, half[1]))))


def _exchanges(order: _Order) -> Iterable[tuple[_Order, _Order, _Order]]:
    """An order with two neighbouring groups exchanged, where its axes are cut for that, and those of the result."""
    for i, j, k in itertools.combinations(range(len(order) + 1), 3):
        yield (*order[:i], *order[j:k], *order[i:j], *order[k:]), (i, j, k), (i, i + k - j, k)


def together(layout: Layout, group: Layout) -> bool:
    """Whether a group stands in one piece and in its own order."""
    if not group:
        return True
    start = layout.index(group[0])
    return layout[start : start + len(group)] == group


def orders(group: Layout) -> Iterable[Layout]:
    """Orders of a group to try: all of a few indices, of more its own and the reverse."""
    if len(group) <= _MAX_PERMUTED:
        return itertools.permutations(group)
    return [group, group[::-1]]
