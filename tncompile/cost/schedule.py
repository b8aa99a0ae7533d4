"""From a contraction tree to steps: how each pair is computed, and in which order its result's modes lie.

A run-time tensor is a row-major array whose *layout* is the order of its indices. Merging or splitting
neighbours is a Reshape and free; anything else is a Transpose and costs its bytes. So the layouts of all
intermediates are chosen together, by dynamic programming over the tree: each node keeps its cheapest few
layouts, and a step's form (`tncompile.cost.forms`) says which layout it needs and which it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tncompile.cost.forms import IMAGE, Forms
from tncompile.cost.layouts import Layout, reduced_layouts, slide
from tncompile.cost.profile import DeviceProfile
from tncompile.ir import dims
from tncompile.ir.core import Index, Step, Term
from tncompile.ir.tree import Tree, flatten, fold_tree

_PRODUCTS = ("matmul", "fused", "core_left")
KEPT_LAYOUTS = 12


@dataclass(frozen=True)
class Schedule:
    """Steps with their predicted cost: seconds, FLOPs, bytes read and written, elements of the largest result."""

    steps: tuple[Step, ...]
    seconds: float
    flops: float
    bytes: float
    peak: int


@dataclass(frozen=True)
class _Pair:
    """A contraction of two plans."""

    left: _Plan
    right: _Plan
    form: str
    order: Layout
    both: bool  # whether both sides lie in blocks of channels, in the same order


_Plan = int | _Pair


@dataclass(frozen=True)
class _Way:
    """One way to compute a node of the tree."""

    seconds: float
    layout: Layout
    plan: _Plan


class Scheduler:
    """Schedules trees of one term. `sizes` gives every index of the term its size, in elements.

    `output` are the axes of the result, which is `shown` where it is an output of the model: ONNX Runtime writes an
    output into memory of its own, so that a Reshape at the end is a copy. Anywhere else it costs nothing. `in_order`:
    the free modes of a core stand in the order of the output, as ONNX Runtime's attention reads them. `images` are the
    operands that come in blocks of channels; the result is for one who takes it as it is. So often something is
    `added` to it, which a convolution does as it stores and a matmul in one more pass. `awaited`: who reads it takes it
    to lie in blocks.
    """

    def __init__(
        self,
        term: Term,
        output: Sequence[Sequence[Index]],
        sizes: Mapping[str, int],
        profile: DeviceProfile,
        itemsize: int,
        shown: bool = False,
        in_order: bool = False,
        images: Collection[str] = (),
        added: int = 0,
        awaited: bool = False,
    ) -> None:
        axes = tuple(tuple(i.name for i in axis) for axis in output)
        dynamic = {i.name for t in term.tensors for i in t.indices if not dims.is_static(i.size)}
        self.term = term
        self.output = tuple(name for axis in axes for name in axis)
        self.forms = Forms(axes, sizes, profile, itemsize, term.windows, dynamic, in_order)
        passed_on = len(term.tensors) == 1 and [[i.name for i in a] for a in term.tensors[0].axes] == [*map(list, axes)]
        self.shown = shown and not passed_on
        self.added = added
        self.awaited = awaited
        self.windows = term.windows
        self._layouts = reduced_layouts(term, self.output)
        self._blocked = [not t.is_core and t.name in images for t in term.tensors]

    def layout(self, position: int) -> Layout:
        """The order of a tensor's indices as it flows in, or as it is stored."""
        return self._layouts[position]

    def comes_in_blocks(self, position: int) -> bool:
        """Whether a tensor of the term comes in blocks of channels."""
        return self._blocked[position]

    def finish(self, left: Layout, form: str, layout: Layout) -> float:
        """Seconds to bring the last result, of a step on a `left` side, into the order and axes of the output."""
        forms, profile = self.forms, self.forms.profile
        seconds = forms.permute(layout, tuple(i for i in self.output if i in layout))
        if form in _PRODUCTS and not forms.convolves(form, layout):
            if self.added:
                seconds += self.added * profile.multiply_time(1, forms.size(layout), forms.itemsize)
            if len(forms.axes) == IMAGE:  # its space becomes one axis, and again two
                seconds += 2 * profile.node
            if self.awaited and forms.in_blocks:
                batch, channels, *space = map(forms.size, forms.axes)
                seconds += profile.turned_time(batch, channels, math.prod(space))
        return seconds + (
            profile.copy_time(forms.size(layout), forms.itemsize) if self._copies(left, form, layout) else 0
        )

    def _copies(self, left: Layout, form: str, layout: Layout) -> bool:
        """Whether the last result is copied into an output of the model: a Reshape is behind it."""
        if not self.shown:
            return False
        axes = self.forms.axes
        free = {i for i in layout if i not in left}
        rows = tuple(i for i in layout if i in left)
        if form == "matmul" and left != (*rows, *(i for i in left if i not in rows)):  # one axis, as it was turned
            return sum(not free.issuperset(axis) for axis in axes) > 1
        merged = [axis for axis in axes if len(axis) > 1]
        only_free = merged == [axes[-1]] and free == {*axes[-1]} if merged else False
        return bool(merged) and not (form in ("matmul", "fused") and only_free)

    def schedule(self, tree: Tree) -> Schedule:
        """The cheapest schedule of a tree. A subtree of cores alone counts as one core, but has no steps: merge
        it first to get some that can be run."""
        return self.schedules(tree, 1)[0]

    def schedules(self, tree: Tree, keep: int) -> list[Schedule]:
        """The cheapest schedules of a tree, best first, each with another last step or last layout."""
        self._flops = self._bytes = 0.0
        self._peak = 0
        self._count: dict[str, int] = dict.fromkeys(self.term.slid, 1)
        for position in range(len(self.term.tensors)):
            for name in self.layout(position):
                self._count[name] = self._count.get(name, 0) + 1
        ways = self._ways(tree)
        totals = (self._flops, self._bytes, self._peak)
        best = sorted(ways, key=lambda way: way.seconds)[:keep]
        return [Schedule(_linear(w.plan, len(self.term.tensors)), w.seconds, *totals) for w in best]

    def price(self, steps: Sequence[Step]) -> Schedule:
        """The cost of given steps, maybe found at other sizes; infinite where a side does not lie as its step's form
        needs it."""
        term, count = self.term, len(self.term.tensors)
        layouts = [self.layout(p) for p in range(count)]
        seconds, flops, moved, peak = 0.0, 0.0, 0.0, 0
        blocked = [*self._blocked]
        for step in steps:
            x, y = layouts[step.left], layouts[step.right]
            core = step.right < count and term.tensors[step.right].is_core
            both = blocked[step.left] and blocked[step.right] and x == y
            forms = self.forms.of(x, y, core, {*step.order}, blocked[step.left], both)
            same = (s for s, form, order in forms if (form, order) == (step.form, step.order))
            seconds += min(same, default=math.inf)
            flops += 2.0 * self.forms.size({*x, *y, *step.order} - self.forms.taken(step.order, {*x, *y}))
            moved += (self.forms.size(x) + self.forms.size(y) + self.forms.size(step.order)) * self.forms.itemsize
            peak = max(peak, self.forms.size(step.order))
            layouts.append(step.order)
            blocked.append(self.forms.leaves_blocks(step.form, step.order, both))
        last = steps[-1] if steps else None
        seconds += self.finish(layouts[last.left], last.form, last.order) if last else self._as_it_is(layouts[0])
        return Schedule(tuple(steps), seconds, flops, moved, peak)

    def _as_it_is(self, layout: Layout) -> float:
        return self.finish(layout, "", layout)

    # ------------------------------------------------------------------------------ the tree

    def _ways(self, tree: Tree) -> list[_Way]:
        if isinstance(tree, int):
            return [_Way(self._as_it_is(self.layout(tree)), self.layout(tree), tree)]
        left = len(flatten(tree)) - 1  # joins to do: the last one is the root

        def leaf(position: int) -> tuple[list[_Way], bool]:
            return [_Way(0.0, self.layout(position), position)], self.term.tensors[position].is_core

        def join(a: tuple[list[_Way], bool], b: tuple[list[_Way], bool]) -> tuple[list[_Way], bool]:
            nonlocal left
            left -= 1
            return self._join(*a, *b, left == 0), a[1] and b[1]

        return fold_tree(tree, leaf, join)[0]

    def _join(self, a: list[_Way], a_core: bool, b: list[_Way], b_core: bool, root: bool) -> list[_Way]:
        names_a, names_b = a[0].layout, b[0].layout
        for names in (names_a, names_b):
            for name in names:
                self._count[name] -= 1
        union = tuple(dict.fromkeys((*names_a, *names_b)))
        kept = slide(self.windows, union, {i for i in union if i in self.output or self._count[i] > 0})
        for name in kept:
            self._count[name] = self._count.get(name, 0) + 1
        if a_core and b_core:  # computed at compile time
            return [_Way(0.0, tuple(i for i in union if i in kept), a[0].plan)]
        if a_core:
            a, b, b_core = b, a, True
        self._flops += 2.0 * self.forms.size(kept.union(union) - self.forms.taken(kept, union))
        parts = (a[0].layout, b[0].layout, tuple(kept))
        self._bytes += sum(self.forms.size(p) for p in parts) * self.forms.itemsize
        self._peak = max(self._peak, self.forms.size(kept))

        found: dict[Layout, _Way] = {}
        pairs = [(x, y, b_core) for x in a for y in b]
        if not b_core:
            pairs += [(y, x, False) for x in a for y in b]
        for x, y, core in pairs:
            blocked = self._is_blocked(x.plan)
            both = blocked and self._is_blocked(y.plan) and x.layout == y.layout
            for seconds, form, order in self.forms.of(x.layout, y.layout, core, kept, blocked, both):
                total = x.seconds + y.seconds + seconds + (self.finish(x.layout, form, order) if root else 0.0)
                known = found.get(order)
                if known is None or total < known.seconds:
                    found[order] = _Way(total, order, _Pair(x.plan, y.plan, form, order, both))
        return sorted(found.values(), key=lambda w: w.seconds)[:KEPT_LAYOUTS]

    def _is_blocked(self, plan: _Plan) -> bool:
        if isinstance(plan, int):
            return self._blocked[plan]
        return self.forms.leaves_blocks(plan.form, plan.order, plan.both)


class OpenEnded(Scheduler):
    """Schedules terms whose results may stay in any order and in any axes."""

    def finish(self, left: Layout, form: str, layout: Layout) -> float:
        """Nothing."""
        return 0.0


def _linear(plan: _Plan, count: int) -> tuple[Step, ...]:
    """Steps in an order in which each comes after what it reads, results numbered from `count`."""
    steps: list[Step] = []
    todo: list[tuple[_Plan, bool]] = [(plan, False)]
    done: list[int] = []
    while todo:
        item, ready = todo.pop()
        if isinstance(item, int):
            done.append(item)
        elif ready:
            right, left = done.pop(), done.pop()
            steps.append(Step(left, right, item.form, item.order))
            done.append(count + len(steps) - 1)
        else:
            todo += [(item, True), (item.right, False), (item.left, False)]
    return tuple(steps)
