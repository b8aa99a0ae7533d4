"""Layouts: which index stands where in a row-major array, and what part each plays in a contraction."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tncompile.ir import Term, Window

Layout = tuple[str, ...]
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
