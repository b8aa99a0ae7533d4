"""What a contraction tree costs in a training step, forward and backward, where nothing is known at compile time.

A pair of tensors is contracted by one product of matrices, whose transposes are free to BLAS, so that a tensor has to
be copied only where its indices do not fall into the groups of the product one after the other. With R on both sides
and kept, K on both and summed, M on the left and N on the right alone:

    matmul      left (R M K) @ right (R K N)   -> (R M N)      either side's groups may be turned
    outer       left (R M) * right (R N)       -> (R M N)
    outer_last  left (M R) * right (N R)       -> (M N R)

The gradient of each side is one more product of the same size.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tncompile.cost.layouts import Layout, classify
from tncompile.cost.profile import DeviceProfile
from tncompile.ir.tree import Tree, fold_tree

CALL = 6e-6
"""Seconds that PyTorch takes to begin a product and to turn its sides, on a CPU of today."""
STREAM = 1.2e-10
"""Seconds for each byte that a product of PyTorch reads or writes beyond what profiles say, which are of ONNX Runtime:
0.9 ms for 0.35 for 4096×16 by 16×256, 28 for 25 for 256×2048 by 2048×2048."""
KEPT_LAYOUTS = 6
NEAR_TREES, ALIKE = 8, 2
"""Of the trees whose products take least time, how many are arranged, as copies and memory decide between them; of
those of one time, how many."""
SHORT = 4
"""Elements of a run below which PyTorch copies a permutation no slower."""
Form = Literal["matmul", "outer", "outer_last"]


@dataclass(frozen=True)
class Pair:
    """One contraction: `left` and `right` number the tensors first, then the results of earlier pairs.

    The groups list indices in the order in which they lie once the sides are turned.
    """

    left: int
    right: int
    form: Form
    batch: Layout
    summed: Layout
    only_left: Layout
    only_right: Layout

    @property
    def sides(self) -> tuple[Layout, Layout]:
        """How both sides lie for the product."""
        if self.form == "outer_last":
            return (*self.only_left, *self.batch), (*self.only_right, *self.batch)
        return (*self.batch, *self.only_left, *self.summed), (*self.batch, *self.summed, *self.only_right)

    @property
    def result(self) -> Layout:
        """How the result lies."""
        if self.form == "outer_last":
            return (*self.only_left, *self.only_right, *self.batch)
        return (*self.batch, *self.only_left, *self.only_right)


@dataclass(frozen=True)
class Arrangement:
    """The pairs of a tree, in an order in which they can run, and the predicted seconds of a step with them."""

    pairs: tuple[Pair, ...]
    seconds: float


_Plan = int | tuple["_Plan", "_Plan", Pair]


@dataclass(frozen=True)
class _Way:
    """One way to compute a node of the tree. `trained`: a gradient passes through it."""

    seconds: float
    layout: Layout
    plan: _Plan
    trained: bool


class TrainingCost:
    """Prices one term whose tensors lie as `layouts` say; its result is to lie as `output`.

    `trained[p]` tells whether tensor p needs a gradient. `sizes` are in elements, `itemsize` in bytes.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        output: Layout,
        sizes: Mapping[str, int],
        trained: Sequence[bool],
        profile: DeviceProfile,
        itemsize: int = 4,
    ) -> None:
        self.layouts = [tuple(layout) for layout in layouts]
        self.output = tuple(output)
        self.sizes = dict(sizes)
        self.trained = list(trained)
        self.profile = profile
        self.itemsize = itemsize

    def size(self, names: Collection[str]) -> int:
        """Product of sizes."""
        return math.prod(self.sizes[name] for name in names)

    # ------------------------------------------------------------------------------ one pair

    def forward(self, pair: Pair) -> float:
        """Seconds to compute a pair's result, without copies."""
        r, m, n, k = self._sizes(pair)
        return self._product(r, m, k, n)

    def backward(self, pair: Pair, left: bool, right: bool) -> float:
        """Seconds to compute the gradients that are needed of a pair's sides, without copies."""
        r, m, n, k = self._sizes(pair)
        return left * self._product(r, m, n, k) + right * self._product(r, k, m, n)

    def _sizes(self, pair: Pair) -> tuple[int, int, int, int]:
        groups = (pair.batch, pair.only_left, pair.only_right, pair.summed)
        r, m, n, k = map(self.size, groups)
        return r, m, n, k

    def _product(self, r: int, m: int, k: int, n: int) -> float:
        started = CALL + STREAM * self.itemsize * r * (m * k + k * n + m * n)
        if k == 1:
            return started + self.profile.multiply_time(r * m, n, self.itemsize)
        if m == n == 1 and r > 1:
            return started + self.profile.multiply_time(r, k, self.itemsize)
        return started + self.profile.matmul_time(r, m, k, n, self.itemsize, False)

    def again(self, pair: Pair, pairs: Sequence[Pair]) -> float:
        """Seconds to compute one of some pairs' results once more, with copies."""
        seconds = self.forward(pair)
        for number, side in zip((pair.left, pair.right), pair.sides, strict=True):
            if number < len(self.layouts) and not fits(self.layouts[number], pair):
                seconds += self.copy(self.layouts[number], side)
        number = len(self.layouts) + pairs.index(pair)
        laid = relaid(pairs, len(self.layouts)).get(number)
        return seconds + (self.copy(pair.result, laid) if laid is not None else 0.0)

    # ------------------------------------------------------------------------------ a tree

    def arrange(self, tree: Tree) -> Arrangement:
        """The cheapest arrangement of a tree: the layouts of all intermediates are chosen together."""
        held: dict[str, int] = {}
        for layout in self.layouts:
            for name in layout:
                held[name] = held.get(name, 0) + 1

        def leaf(position: int) -> list[_Way]:
            return [_Way(0.0, self.layouts[position], position, self.trained[position])]

        def join(a: list[_Way], b: list[_Way]) -> list[_Way]:
            for name in (*a[0].layout, *b[0].layout):
                held[name] -= 1
            union = {*a[0].layout, *b[0].layout}
            kept = {name for name in union if held[name] > 0 or name in self.output}
            for name in kept:
                held[name] += 1
            found: dict[Layout, _Way] = {}
            for x, y in itertools.product(a, b):
                for way in self._ways(x, y, kept):
                    known = found.get(way.layout)
                    if known is None or way.seconds < known.seconds:
                        found[way.layout] = way
            return sorted(found.values(), key=lambda way: way.seconds)[:KEPT_LAYOUTS]

        ways = fold_tree(tree, leaf, join)
        total, best = min(((w.seconds + self.ending(w.layout), w) for w in ways), key=lambda found: found[0])
        return Arrangement(_linear(best.plan, len(self.layouts)), total)

    def ending(self, layout: Layout) -> float:
        """Seconds to bring the result into the order of the output, and its gradient back."""
        wanted = tuple(name for name in self.output if name in layout)
        return 0.0 if wanted == layout else 2 * self.copy(layout, wanted)

    def _ways(self, x: _Way, y: _Way, kept: Collection[str]) -> Iterator[_Way]:
        for left, right in ((x, y), (y, x)):
            for pair in pairs_of(left.layout, right.layout, kept):
                seconds = self.step(pair, (left.layout, right.layout), (left.trained, right.trained))
                total = left.seconds + right.seconds + seconds
                yield _Way(total, pair.result, (left.plan, right.plan, pair), left.trained or right.trained)

    def step(self, pair: Pair, lies: tuple[Layout, Layout], trained: tuple[bool, bool]) -> float:
        """Seconds to compute a pair forward and backward, with copies of its sides, which lie so."""
        turned = sum(self.turned(pair, *side) for side in zip(lies, pair.sides, trained, strict=True))
        return self.forward(pair) + self.backward(pair, *trained) + turned

    def turned(self, pair: Pair, layout: Layout, wanted: Layout, trained: bool) -> float:
        """Seconds for the copies of a side of a pair: for its products, and of its own gradient back."""
        return 0.0 if fits(layout, pair) else (1 + trained) * self.copy(layout, wanted)

    def copy(self, layout: Layout, wanted: Layout) -> float:
        """Seconds to bring a tensor from one layout into another: innermost indices that stay stay together."""
        stay = 0
        while stay < len(layout) and layout[-1 - stay] == wanted[-1 - stay]:
            stay += 1
        run, size = self.size(layout[len(layout) - stay :]), self.size(layout)
        return self.profile.permute_time(size, max(run, min(SHORT, size), 1), self.itemsize)


def pairs_of(x: Layout, y: Layout, kept: Collection[str]) -> Iterator[Pair]:
    """The ways to contract two tensors, x on the left; their numbers are to be filled in."""
    c = classify(x, y, kept)
    orders = dict.fromkeys((c.batch, tuple(i for i in y if i in c.batch)))
    if not c.summed:
        forms: tuple[Form, ...] = ("outer", "outer_last") if c.batch else ("outer",)
        yield from (Pair(0, 0, form, batch, (), c.left, c.right) for form in forms for batch in orders)
        return
    for batch in orders:
        for summed in dict.fromkeys((c.summed, tuple(i for i in y if i in c.summed))):
            yield Pair(0, 0, "matmul", batch, summed, c.left, c.right)


def fits(layout: Layout, pair: Pair) -> bool:
    """Whether a side is the matrices that a product needs as it lies: its groups one after the other, in any order but
    with the batch not innermost."""
    groups = [g for g in (pair.batch, pair.summed, pair.only_left, pair.only_right) if g and g[0] in layout]
    if pair.form == "matmul" and len(groups) > 1 and layout[-1:] == pair.batch[-1:]:
        return False
    return any(sum(order, ()) == layout for order in itertools.permutations(groups))


def relaid(pairs: Sequence[Pair], count: int) -> dict[int, Layout]:
    """How results are to lie that have to be copied for the product that takes them, by their numbers, which go on from
    those of `count` tensors: copied once, where they are made, and not again for each gradient."""
    return {
        number: side
        for pair in pairs
        for number, side in zip((pair.left, pair.right), pair.sides, strict=True)
        if number >= count and not fits(pairs[number - count].result, pair)
    }


def _linear(plan: _Plan, count: int) -> tuple[Pair, ...]:
    """The pairs of a plan in post-order, numbered."""
    pairs: list[Pair] = []
    done: list[int] = []
    todo: list[_Plan | Pair] = [plan]
    while todo:
        item = todo.pop()
        if isinstance(item, int):
            done.append(item)
        elif isinstance(item, Pair):
            right, left = done.pop(), done.pop()
            pairs.append(Pair(left, right, item.form, item.batch, item.summed, item.only_left, item.only_right))
            done.append(count + len(pairs) - 1)
        else:
            left_plan, right_plan, pair = item
            todo += [pair, right_plan, left_plan]
    return tuple(pairs)


# ------------------------------------------------------------------------------------ search

EXHAUSTIVE_UP_TO = 9


def cheapest_trees(cost: TrainingCost, most: int = NEAR_TREES) -> list[Tree]:
    """The trees whose products take least time forward and backward, copies not counted, the first the best one; none
    for too many tensors."""
    count = len(cost.layouts)
    if count > EXHAUSTIVE_UP_TO:
        return []
    full = (1 << count) - 1
    holders: dict[str, int] = {}
    for position, layout in enumerate(cost.layouts):
        for name in layout:
            holders[name] = holders.get(name, 0) | 1 << position
    kept: dict[int, Layout] = {}
    for subset in range(1, full + 1):
        inside = [name for name, mask in holders.items() if mask & subset]
        kept[subset] = tuple(n for n in inside if n in cost.output or holders[n] & ~subset)
    trained = [any(t for p, t in enumerate(cost.trained) if s >> p & 1) for s in range(full + 1)]
    best: dict[int, list[tuple[float, Tree]]] = {1 << p: [(0.0, p)] for p in range(count)}
    for subset in range(1, full + 1):
        if subset in best:
            continue
        low = subset & -subset
        ways: list[tuple[float, int, int, int]] = []
        part = (subset - 1) & subset
        while part:
            if part & low:  # each split once
                rest = subset ^ part
                pair = next(pairs_of(kept[part], kept[rest], kept[subset]))
                seconds = cost.forward(pair) + cost.backward(pair, trained[part], trained[rest])
                for i, (a, _) in enumerate(best[part]):
                    for j, (b, _) in enumerate(best[rest][: most // (i + 1)]):  # of those behind, `most` are no worse
                        ways.append((a + b + seconds, part, i, j))
            part = (part - 1) & subset
        best[subset] = [
            (seconds, (best[part][i][1], best[subset ^ part][j][1])) for seconds, part, i, j in _different(ways, most)
        ]
    return [tree for _, tree in best[full]]


def _different(ways: list[tuple[float, int, int, int]], most: int) -> list[tuple[float, int, int, int]]:
    """The first of some ways by seconds, `ALIKE` of those of about one time."""
    ways.sort()
    taken: Counter[str] = Counter()
    found = []
    for way in ways:
        taken[key := f"{way[0]:.2e}"] += 1
        if taken[key] <= ALIKE:
            found.append(way)
            if len(found) == most:
                break
    return found


# ------------------------------------------------------------------------------------ memory

SMALL = 1 << 16
"""Bytes of intermediates that are not worth computing again."""
CHECKPOINT = 1.5e-4
"""Seconds that PyTorch takes to leave out what a term computes, and to compute it again."""


def is_recomputed(cost: TrainingCost, arrangement: Arrangement, share: float) -> bool:
    """Whether the intermediates of a term are better computed again in the backward pass than kept.

    That is where it is predicted to add at most `share` to the time of a step; always, where that is inf.
    """
    pairs = arrangement.pairs[:-1]
    if not pairs or math.isinf(share):
        return bool(pairs)
    kept = sum(cost.size(pair.result) for pair in pairs) * cost.itemsize
    seconds = CHECKPOINT + sum(cost.again(pair, arrangement.pairs) for pair in pairs)
    return kept >= SMALL and seconds <= share * arrangement.seconds
