"""Improve a large contraction tree window by window: every tree of a few of its neighbouring branches is tried.

What `tncompile.cost.exhaustive` does for whole small terms, without the layouts: a subtree of cores alone is free,
so that which cores to merge is part of each window's choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tncompile.cost.profile import DeviceProfile
from tncompile.ir.tree import Tree, fold_tree

WIDTH = 6
"""Branches of a window: 3**WIDTH pairs of subsets are looked at."""

SWEEPS = 3
COMPILE_TIME = 1e-15
"""Seconds that a multiplication of constants counts for: of equal trees, the one that is sooner compiled."""


@dataclass(frozen=True, eq=False)
class _Node:
    """A subtree: the bits of the indices that its result keeps, whether it has cores only, its own steps' seconds."""

    tree: Tree
    legs: int
    constant: bool
    parts: tuple[_Node, _Node] | None
    seconds: float


class Refiner:
    """Rewrites trees of one network, whose tensors have the indices `inputs`; `core[p]` says whether p is constant.

    Seconds are those of each contraction in its best form, without the transposes between them. A product of cores
    of more than `largest` elements is not made.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[str]],
        core: Sequence[bool],
        output: Sequence[str],
        sizes: Mapping[str, int],
        profile: DeviceProfile,
        largest: int,
    ) -> None:
        names = list(dict.fromkeys([*(i for names in inputs for i in names), *output]))
        self._bit = {name: 1 << k for k, name in enumerate(names)}
        self._by_bit = [sizes[name] for name in names]
        self._inputs = [self._bits(names) for names in inputs]
        self._output = self._bits(output)
        self._core = core
        self._profile = profile
        self._largest = largest
        self._sizes: dict[int, int] = {0: 1}
        self._times: dict[tuple[int, int, int, int], float] = {}

    def seconds(self, tree: Tree) -> float:
        """Predicted seconds of a tree, without transposes."""
        return self._build(tree).seconds

    def improve(self, tree: Tree, sweeps: int = SWEEPS) -> Tree:
        """A tree that is no slower: each window in turn is replaced by its best tree, until none gets better."""
        node = self._build(tree)
        for _ in range(sweeps):
            better = self._sweep(node)
            if better.seconds >= node.seconds * (1 - 1e-9):
                break
            node = better
        return node.tree

    # ------------------------------------------------------------------------------ trees

    def _build(self, tree: Tree) -> _Node:
        pending: dict[int, int] = {}
        for legs in (*self._inputs, self._output):
            for bit in _each(legs):
                pending[bit] = pending.get(bit, 0) + 1

        def leaf(position: int) -> _Node:
            return _Node(position, self._inputs[position], self._core[position], None, 0.0)

        def join(a: _Node, b: _Node) -> _Node:
            for bit in _each(a.legs & b.legs):
                pending[bit] -= 1
            summed = 0
            for bit in _each(a.legs | b.legs):
                if pending[bit] == 1:
                    summed |= bit
            return self._joined(a, b, (a.legs | b.legs) & ~summed)

        return fold_tree(tree, leaf, join)

    def _joined(self, a: _Node, b: _Node, legs: int) -> _Node:
        constant = a.constant and b.constant
        step = self._step(a.legs, b.legs, legs, a.constant + b.constant)
        return _Node((a.tree, b.tree), legs, constant, (a, b), a.seconds + b.seconds + step)

    def _sweep(self, root: _Node) -> _Node:
        """One pass over all windows, from the leaves up."""
        order: list[_Node] = []
        todo = [root]
        while todo:
            node = todo.pop()
            order.append(node)
            todo += node.parts or ()
        now: dict[int, _Node] = {}
        for node in reversed(order):
            if node.parts is not None:
                a, b = (now[id(part)] for part in node.parts)
                node_now = self._best(self._joined(a, b, node.legs))
            else:
                node_now = node
            now[id(node)] = node_now
        return now[id(root)]

    def _best(self, root: _Node) -> _Node:
        """The best tree over the window of a subtree: the branches that opening its costliest ones leaves."""
        if root.constant:
            return root
        leaves = list(root.parts or ())
        while len(leaves) < WIDTH:
            inner = [node for node in leaves if node.parts is not None]
            if not inner:
                break
            opened = max(inner, key=lambda node: (node.seconds, self._size(node.legs)))
            place = leaves.index(opened)
            leaves[place : place + 1] = opened.parts or ()
        if len(leaves) < 3:
            return root
        found = self._window(leaves, root.legs)
        return found if found.seconds < root.seconds * (1 - 1e-9) else root

    def _window(self, leaves: Sequence[_Node], legs: int) -> _Node:
        """The best tree of some branches whose contraction keeps the indices `legs`, by all pairs of subsets."""
        count = len(leaves)
        every = (1 << count) - 1
        union = [0] * (every + 1)
        for mask in range(1, every + 1):
            low = mask & -mask
            union[mask] = union[mask ^ low] | leaves[low.bit_length() - 1].legs
        kept = [union[mask] & (union[every ^ mask] | legs) for mask in range(every + 1)]
        constant = [False] * (every + 1)
        best: list[tuple[float, int]] = [(math.inf, 0)] * (every + 1)
        for mask in range(1, every + 1):
            low = mask & -mask
            if mask == low:
                leaf = leaves[low.bit_length() - 1]
                best[mask], kept[mask], constant[mask] = (leaf.seconds, 0), leaf.legs, leaf.constant
                continue
            constant[mask] = constant[low] and constant[mask ^ low]
            if constant[mask] and self._size(kept[mask]) > self._largest:
                continue
            rest = mask ^ low
            part = rest
            least, split = math.inf, 0
            while part:  # the part without the lowest branch
                other = mask ^ part
                total = best[part][0] + best[other][0]
                if total < least:
                    total += self._step(kept[other], kept[part], kept[mask], constant[other] + constant[part])
                    if total < least:
                        least, split = total, part
                part = (part - 1) & rest
            best[mask] = (least, split)

        def build(mask: int) -> _Node:
            split = best[mask][1]
            if not split:
                return leaves[mask.bit_length() - 1]
            return self._joined(build(mask ^ split), build(split), kept[mask])

        return build(every)

    # ------------------------------------------------------------------------------ one contraction

    def _step(self, a: int, b: int, kept: int, constants: int) -> float:
        """Seconds to contract two results, of which so many are constant."""
        key = (a, b, kept, constants)
        if key not in self._times:
            self._times[key] = (
                self._size(a | b) * COMPILE_TIME if constants == 2 else self._priced(a, b, kept, constants == 1)
            )
        return self._times[key]

    def _priced(self, a: int, b: int, kept: int, constant: bool) -> float:
        profile, size = self._profile, self._size
        batch, k = size(a & b & kept), size(a & b & ~kept)
        m, n = size(a & ~b), size(b & ~a)
        whole = batch * k * m * n
        multiply = profile.multiply_time(1, whole, 4)
        if k > 1:
            multiply += profile.reduce_time(batch * m * n, k, 1, 4)
        sides = ((m, n), (n, m))
        return min(multiply, *(profile.matmul_time(batch, x, k, y, 4, constant) for x, y in sides))

    def _size(self, bits: int) -> int:
        known = self._sizes.get(bits)
        if known is None:
            known = math.prod(self._by_bit[bit.bit_length() - 1] for bit in _each(bits))
            self._sizes[bits] = known
        return known

    def _bits(self, names: Sequence[str]) -> int:
        return sum(self._bit[name] for name in dict.fromkeys(names))


def _each(bits: int) -> list[int]:
    """The bits that are set, each alone."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low)
        bits ^= low
    return found
