"""A term that is trained in slices of one index: which of its products that concerns, what it costs, and the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from tncompile.cost.layouts import Layout
from tncompile.cost.training import Arrangement, Pair, TrainingCost, fits, pairs_of, relaid

START = 4e-5
"""Seconds that PyTorch takes to begin a function of ours, forward and backward."""
STEP = 1.5e-5
"""Seconds that a product in a slice takes beyond `CALL`: a call from Python, a slice to be cut and put in its place."""
LONGER = 10.0
"""How many times the share of a step that not keeping intermediates may add slices may add: they lower its peak."""
MEMORY = 0.25
"""What memory counts beside time: slices are chosen for the least time · memory ** MEMORY."""
WORTH = 0.05
"""The share of time · memory ** MEMORY that slices have to gain; of memory alone, that more slices have to."""
SMALL = 1 << 23
"""Bytes at the peak below which memory is not worth a longer step, and slices gain nothing from caches."""
_COUNTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cut:
    """Some pairs are computed in `count` slices of `index`, and so are their gradients.

    All pairs are computed in `order`, in which these go from `first` up to `last`. For the gradients their results are
    computed again slice by slice, unless the cut `keeps` them.
    """

    index: str
    count: int
    order: tuple[int, ...]
    first: int
    last: int
    keeps: bool


def cut_of(pairs: Sequence[Pair], layouts: Sequence[Layout], index: str, count: int, keeps: bool = False) -> Cut:
    """The cut of all pairs of a tree that have an index.

    What they need and has no such index is computed before, so that it is not computed for each slice.
    """
    lies = [*layouts, *(pair.result for pair in pairs)]
    tensors = len(layouts)
    inside = [k for k, p in enumerate(pairs) if index in lies[p.left] or index in lies[p.right]]
    after: set[int] = set()
    for k, pair in enumerate(pairs):
        if {pair.left - tensors, pair.right - tensors} & {inside[-1], *after}:
            after.add(k)
    before = [k for k in range(len(pairs)) if k not in after and k not in inside]
    return Cut(index, count, (*before, *inside, *sorted(after)), len(before), len(before) + len(inside), keeps)


def moved(pairs: Sequence[Pair], tensors: int, cut: Cut) -> tuple[Pair, ...]:
    """The pairs of a tree in the order of a cut."""
    number = {tensors + k: tensors + new for new, k in enumerate(cut.order)}

    def renumbered(pair: Pair) -> Pair:
        return replace(pair, left=number.get(pair.left, pair.left), right=number.get(pair.right, pair.right))

    return tuple(renumbered(pairs[k]) for k in cut.order)


def gradient_pair(side: Layout, result: Layout, other: Layout, size: Callable[[Collection[str]], int]) -> Pair:
    """The product that gives the gradient of one side, of the tensors 0, the gradient of the result, and 1, the other
    side: the one that copies least, if possible such that the gradient lies as the side does."""
    found = []
    for left, (a, b) in enumerate(((result, other), (other, result))):
        for pair in pairs_of(a, b, side):
            numbered = replace(pair, left=left, right=1 - left)
            # where a side is copied anyhow, it may be into the order of the gradient
            mine, theirs = (tuple(name for name in side if name in of) for of in (pair.only_left, pair.only_right))
            found += [numbered, replace(numbered, only_left=mine, only_right=theirs)]
    lies = (result, other)

    def copied(pair: Pair) -> tuple[int, bool]:
        return sum(size(lies[n]) for n in (pair.left, pair.right) if not fits(lies[n], pair)), pair.result != side

    return min(found, key=copied)


def adds_up(side: Layout, result: Layout, other: Layout, size: Callable[[Collection[str]], int]) -> bool:
    """Whether the gradient of a side that lacks the index of the slices is added to in the product that gives it."""
    pair = gradient_pair(side, result, other, size)
    return _is_one_call(pair) and pair.result == side


def _is_one_call(pair: Pair) -> bool:
    return pair.form == "matmul" and not pair.batch


# ------------------------------------------------------------------------------------ time


def seconds_of(cost: TrainingCost, pairs: Sequence[Pair], cut: Cut) -> float:
    """Predicted seconds of a step with slices, where the pairs are in the order of the cut."""
    lies, needs = _described(cost, pairs)
    part = _part(cost, cut)
    seconds = START + cost.ending(lies[-1])
    for k, pair in enumerate(pairs):
        numbers, trained = (pair.left, pair.right), (needs[pair.left], needs[pair.right])
        sides = (lies[pair.left], lies[pair.right])
        if not cut.first <= k < cut.last:
            seconds += cost.step(pair, sides, trained)
            continue
        once = part.forward(pair) + part.backward(pair, *trained) + STEP * (1 + sum(trained))
        for s, (number, layout, wanted) in enumerate(zip(numbers, sides, pair.sides, strict=True)):
            computed = number - len(cost.layouts)
            if 0 <= computed < cut.first:  # copied before
                seconds += cost.turned(pair, layout, wanted, trained[s])
            else:
                once += part.turned(pair, layout, wanted, trained[s])
                if computed < 0 and trained[1 - s] and not fits(layout, pair):  # once more for the other's gradient
                    once += part.copy(layout, wanted)
            if not cut.first <= computed < k:
                if cut.index in layout or not adds_up(layout, pair.result, sides[1 - s], part.size):
                    once += trained[s] * _put(part, layout)  # its gradient
                if fits(layout, pair) and not _cuts_well(layout, pair, cut.index):
                    once += (1 + trained[1 - s]) * part.copy(layout, layout)
        if k + 1 < cut.last:
            once += 0.0 if cut.keeps else part.again(pair, pairs) + STEP
        elif cut.index in pair.result:
            once += _put(part, pair.result)
            if not _cuts_well(pair.result, pair, cut.index):  # the slice of its gradient
                once += sum(trained) * part.copy(pair.result, pair.result)
        elif not _is_one_call(pair):
            once += _put(part, pair.result)
        seconds += cut.count * once
    return seconds


def _put(part: TrainingCost, layout: Layout) -> float:
    """Seconds to put what a slice makes into the whole, or to add it to that."""
    return part.profile.copy_time(part.size(layout), part.itemsize)


def _cuts_well(layout: Layout, pair: Pair, index: str) -> bool:
    """Whether a slice of a tensor can be read as matrices without a copy."""
    group = next((g for g in (pair.batch, pair.summed, pair.only_left, pair.only_right) if index in g), ())
    return index not in layout or group[:1] == (index,)


def _described(cost: TrainingCost, pairs: Sequence[Pair]) -> tuple[list[Layout], list[bool]]:
    """How each value lies, and whether a gradient passes through it."""
    lies = [*cost.layouts, *(pair.result for pair in pairs)]
    needs = [*cost.trained]
    for pair in pairs:
        needs.append(needs[pair.left] or needs[pair.right])
    return lies, needs


def _part(cost: TrainingCost, cut: Cut) -> TrainingCost:
    sizes = {**cost.sizes, cut.index: -(-cost.sizes[cut.index] // cut.count)}
    return TrainingCost(cost.layouts, cost.output, sizes, cost.trained, cost.profile, cost.itemsize)


# ------------------------------------------------------------------------------------ memory


def peak_of(cost: TrainingCost, pairs: Sequence[Pair], cut: Cut | None = None) -> int:
    """Predicted bytes that a step allocates at once: the result, what is kept or computed again, and gradients.

    The pairs are in the order of the cut. The peak is taken to lie in the sweep back.
    """
    lies, needs = _described(cost, pairs)
    result = cost.size(lies[-1])
    if cut is not None and cut.last == len(pairs) and lies[-1] != tuple(n for n in cost.output if n in lies[-1]):
        result += result  # its gradient is turned once for all slices
    return (result + _Sweep(pairs, lies, needs).peak(cost, range(len(pairs)), cut, cost.size(lies[-1]))) * cost.itemsize


@dataclass(frozen=True)
class _Sweep:
    """The sweep back over pairs, whose values lie so, and of which some need a gradient."""

    pairs: Sequence[Pair]
    lies: Sequence[Layout]
    needs: Sequence[bool]

    def peak(self, cost: TrainingCost, inside: range, cut: Cut | None, live: int, within: Cut | None = None) -> int:
        """Elements alive at once in the sweep over some pairs, with those that are so before it, the last gradient
        among them; `within` is the cut of which these pairs are a slice."""
        steps = [range(k, k + 1) for k in inside]
        if cut is not None:
            steps[cut.first : cut.last] = [range(cut.first, cut.last)]
        if within is not None and within.keeps:  # they are there already, and until the last slice is done
            kept = [0] * len(steps)
        else:
            kept = [self._kept(cost, step, inside, cut is not None and cut.keeps) for step in steps]
        live += sum(kept)
        peak = live
        for step, stored in zip(reversed(steps), reversed(kept), strict=True):
            reads = [n for k in step for n in self._sides(k) if n < self._first or n - self._first not in step]
            own = [n for n in reads if self.needs[n] and not self._is_added(cost, step[0], n, within)]
            made = sum(cost.size(self.lies[n]) for n in own)
            top = cost.size(self.lies[self._first + step[-1]])
            if cut is not None and step == range(cut.first, cut.last):
                peak = max(peak, self._sliced(cost, step, cut, live + made))
            else:
                peak = max(peak, live + made + top * self._turned(step[0]))
            live += made - stored - top * (step[-1] != inside[-1])
        return peak

    def _sliced(self, cost: TrainingCost, step: range, cut: Cut, live: int) -> int:
        part = _part(cost, cut)
        top = part.size(self.lies[self._first + step[-1]]) if self._turned(step[-1]) else 0
        return self.peak(part, step, None, live + top, cut)

    def _is_added(self, cost: TrainingCost, k: int, n: int, cut: Cut | None) -> bool:
        """Whether the gradient of what is no result of a cut, of a side of pair k, is added up in place."""
        left, right = self._sides(k)
        if cut is None or cut.first <= n - self._first < cut.last or cut.index in self.lies[n]:
            return False
        other = self.lies[right if n == left else left]
        return adds_up(self.lies[n], self.pairs[k].result, other, cost.size)

    def _kept(self, cost: TrainingCost, step: range, inside: range, keeps: bool) -> int:
        """Elements that a step keeps for its gradients: what others computed, and copies of its own.

        Of a cut, which keeps no copies, `step` has all pairs; it `keeps` their results or does not.
        """
        size = sum(cost.size(self.lies[self._first + k]) for k in step[:-1]) if keeps else 0
        for k in step:
            for n in self._sides(k):
                computed = n - self._first
                if computed in step:
                    continue
                if computed in inside or (len(step) == 1 and not fits(self.lies[n], self.pairs[k])):
                    size += cost.size(self.lies[n])
        return size

    def _turned(self, k: int) -> bool:
        """Whether the result of a pair is copied into another order, and its gradient back."""
        return self._first + k in relaid(self.pairs, self._first)

    def _sides(self, k: int) -> tuple[int, int]:
        return self.pairs[k].left, self.pairs[k].right

    @property
    def _first(self) -> int:
        """The number of the first pair's result."""
        return len(self.lies) - len(self.pairs)


# ------------------------------------------------------------------------------------ choice


def best_cut(cost: TrainingCost, arrangement: Arrangement, share: float) -> Cut | None:
    """The slices that are best by time and memory, of those that take at most `LONGER` times `share` longer; None where
    those are hardly better than none. Where `share` is inf, those with the lowest peak, of equals the fewest.
    """
    pairs = arrangement.pairs
    if share == 0 or len(pairs) < 2 or not any(cost.trained):
        return None
    whole = peak_of(cost, pairs)
    if whole < SMALL and share < math.inf:
        return None
    found = []
    for cut in _cuts(cost, pairs):
        order = moved(pairs, len(cost.layouts), cut)
        peak, seconds = peak_of(cost, order, cut), seconds_of(cost, order, cut)
        if peak < whole and seconds <= arrangement.seconds * (1 + LONGER * share):
            found.append((peak, seconds, cut))
    if not found:
        return None
    if share < math.inf:
        peak, seconds, best = min(found, key=lambda f: f[1] * f[0] ** MEMORY)
        gained = 1 - seconds * peak**MEMORY / (arrangement.seconds * whole**MEMORY)
        return best if gained >= WORTH else None
    least = min(peak for peak, _, _ in found)
    return min((cut for peak, _, cut in found if peak <= least * (1 + WORTH)), key=lambda c: c.count)


def _cuts(cost: TrainingCost, pairs: Sequence[Pair]) -> Iterator[Cut]:
    """All ways to slice one index."""
    for index in dict.fromkeys(name for layout in cost.layouts for name in layout):
        for count in _COUNTS:
            if count <= cost.sizes[index]:
                yield cut_of(pairs, cost.layouts, index, count)
                yield cut_of(pairs, cost.layouts, index, count, keeps=True)
