"""Every contraction tree of a small term, with its compile-time merges and layouts, in one dynamic programme.

Over subsets of the term's tensors, as in the optimal search for contraction orders (arXiv:1304.6112), with two
differences: a subset of cores alone is computed at compile time and costs nothing, and a subset with an operand
keeps its cheapest ways *by layout*, so that the transposes between steps are part of the search.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from tncompile.cost.layouts import Layout, slide
from tncompile.cost.schedule import KEPT_LAYOUTS, Scheduler
from tncompile.ir.tree import Tree

_Way = tuple[float, Layout, Tree, bool]
MAX_WORK = 7_000
"""About how many pairs of ways a search may look at: a term of seven cores on one operand."""

SMALL = 1 << 14
"""Elements that cores without an index in common may have together, to be merged into one."""


def best_trees(
    scheduler: Scheduler, merged: Callable[[tuple[int, ...]], Tree | None], keep: int, within: float
) -> list[Tree] | None:
    """The `keep` cheapest trees, best first; None where the term is too large to look at all of them.

    `merged` gives the order in which a group of cores is merged, None where their product is too large. Ways that
    cost more than `within` seconds are not followed.
    """
    search = _Search(scheduler, merged, keep, within)
    return search.run() if search.work() <= MAX_WORK else None


class _Search:
    def __init__(
        self, scheduler: Scheduler, merged: Callable[[tuple[int, ...]], Tree | None], keep: int, within: float
    ) -> None:
        term = scheduler.term
        self.scheduler = scheduler
        self.merged = merged
        self.keep = keep
        self.within = within
        self.count = len(term.tensors)
        self.core = [t.is_core for t in term.tensors]
        layouts = [scheduler.layout(p) for p in range(self.count)]
        names = list(dict.fromkeys(i for layout in layouts for i in layout))
        bit = {name: 1 << k for k, name in enumerate(names)}
        links = {name: 1 << len(names) + k for k, w in enumerate(scheduler.windows) for name in (w.axis, w.kernel)}
        self.names = names
        self.tensor_bits = [sum(bit[i] | links.get(i, 0) for i in layout) for layout in layouts]
        self.output_bits = sum(bit.get(i, 0) for i in {*scheduler.output, *links})
        self.all = (1 << self.count) - 1
        self.operands = sum(1 << p for p, core in enumerate(self.core) if not core)
        self.ways: dict[int, list[_Way]] = {}
        self.bits: dict[int, int] = {0: 0}

    def work(self) -> int:
        """About how many pairs of ways the search will look at."""
        cores = self.count - self.operands.bit_count()
        if self.count > 12:
            return MAX_WORK + 1
        others = self.operands.bit_count()
        with_cores = 3**cores * (2**others - 1) * KEPT_LAYOUTS // 4
        return int(with_cores + 3**self.count * (KEPT_LAYOUTS // 2) ** 2 // 4 * (others > 1))

    def run(self) -> list[Tree]:
        for mask in sorted(range(1, self.all + 1), key=int.bit_count):
            if mask & (mask - 1) == 0:
                position = mask.bit_length() - 1
                self.ways[mask] = [
                    (0.0, self.scheduler.layout(position), position, self.scheduler.comes_in_blocks(position))
                ]
            elif not mask & self.operands:
                joins = self._connected(mask) or self.scheduler.forms.size(self._kept(mask)) <= SMALL
                tree = self.merged(tuple(self._positions(mask))) if joins else None
                self.ways[mask] = [] if tree is None else [(0.0, self._kept(mask), tree, False)]
            else:
                self.ways[mask] = self._joined(mask)
        best: dict[Tree, float] = {}
        for seconds, _, tree, _ in self.ways[self.all]:
            best[tree] = min(seconds, best.get(tree, seconds))
        return heapq.nsmallest(self.keep, best, key=lambda tree: best[tree])

    def _joined(self, mask: int) -> list[_Way]:
        """The ways to compute a subset with an operand, from those of its parts."""
        kept = self._kept(mask)
        whole = mask == self.all
        found: dict[Layout, list[_Way]] = {}
        for a, b in self._splits(mask):
            for x, y, core in self._pairs(a, b):
                both = x[3] and y[3] and x[1] == y[1]
                for seconds, form, layout in self.scheduler.forms.of(x[1], y[1], core, kept, x[3], both):
                    total = x[0] + y[0] + seconds
                    if whole:
                        total += self.scheduler.finish(x[1], form, layout)
                    if total > self.within:
                        continue
                    here = found.setdefault(layout, [])
                    here.append((total, layout, (x[2], y[2]), self.scheduler.forms.leaves_blocks(form, layout, both)))
        limit = self.keep if whole else 2
        ways = [way for here in found.values() for way in _cheapest(here, limit)]
        return ways if whole else heapq.nsmallest(2 * KEPT_LAYOUTS, ways, key=lambda way: way[0])

    def _pairs(self, a: int, b: int) -> Iterator[tuple[_Way, _Way, bool]]:
        if not b & self.operands:
            yield from ((x, y, True) for x in self.ways[a] for y in self.ways[b])
        elif not a & self.operands:
            yield from ((y, x, True) for x in self.ways[a] for y in self.ways[b])
        else:
            for x in self.ways[a]:
                for y in self.ways[b]:
                    yield x, y, False
                    yield y, x, False

    def _splits(self, mask: int) -> Iterator[tuple[int, int]]:
        """The ways to part a subset in two that share an index; all ways where no two parts do."""
        low = mask & -mask
        rest = mask ^ low
        apart = []
        joined = False
        part = rest
        while part:
            part = (part - 1) & rest
            a, b = low | part, rest ^ part
            if self.ways[a] and self.ways[b]:
                if self._bits(a) & self._bits(b):
                    joined = True
                    yield a, b
                else:
                    apart.append((a, b))
        if not joined:
            yield from apart

    def _positions(self, mask: int) -> list[int]:
        return [p for p in range(self.count) if mask >> p & 1]

    def _bits(self, mask: int) -> int:
        """The indices on the tensors of a subset."""
        if mask not in self.bits:
            low = mask & -mask
            self.bits[mask] = self._bits(mask ^ low) | self.tensor_bits[low.bit_length() - 1]
        return self.bits[mask]

    def _kept(self, mask: int) -> Layout:
        """The indices of a subset's contraction, in order of first use."""
        kept = self._bits(mask) & (self._bits(self.all & ~mask) | self.output_bits)
        names = tuple(name for k, name in enumerate(self.names) if kept >> k & 1)
        left = slide(self.scheduler.windows, names, {*names})
        return (*(name for name in names if name in left), *(w.out for w in self.scheduler.windows if w.out in left))

    def _connected(self, mask: int) -> bool:
        reached = mask & -mask
        while True:
            bits = self._bits(reached)
            grown = reached
            for position in self._positions(mask & ~reached):
                if self.tensor_bits[position] & bits or not self.tensor_bits[position]:
                    grown |= 1 << position
            if grown == reached:
                return reached == mask
            reached = grown


def _cheapest(ways: list[_Way], limit: int) -> list[_Way]:
    """The cheapest few with different trees."""
    best: dict[Tree, _Way] = {}
    for way in ways:
        if way[2] not in best or way[0] < best[way[2]][0]:
            best[way[2]] = way
    return heapq.nsmallest(limit, best.values(), key=lambda way: way[0])
