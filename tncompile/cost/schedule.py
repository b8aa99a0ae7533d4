"""From a contraction tree to steps: how each pair is computed, and in which order its result's modes lie.

A run-time tensor is a row-major array whose *layout* is the order of its indices. Merging or splitting
neighbours is a Reshape and free; anything else is a Transpose and costs its bytes. So the layouts of all
intermediates are chosen together, by dynamic programming over the tree: each node keeps its cheapest few
layouts, and a step's form says which layout it needs and which it leaves.

In one contraction the indices fall into R (on both sides and kept: the batch modes of the matmul), K (on
both and summed), M (left only) and N (right only). The forms:

    matmul     left (M1 R M2 K) @ right (R K N)   -> (M1 R M2 N)     a core on the B side, prepacked
    fused      left (M1 R K M2) @ right (R K N)   -> (M1 R M2 N)     the same; M2 and K change places as it is read
    core_left  right (R N K) @ left (M1 R K M2)   -> (M1 R N M2)     saves a Transpose between two steps
    multiply   left * right, then sum over K      -> (left's order, N)

Where the right side is a core with the kernel of a window over the left one, there is one form alone; a 1x1 convolution
with groups has it beside the others. R then are the groups of the convolution; what stays of the left side stands in
front as a batch, or behind as an axis without a window:

    convolve   left (M R K i..), right (R N K k..) -> (M R N h..)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tncompile.cost.kernels import gains_as_image, takes_images
from tncompile.cost.layouts import (
    MAX_SPACE,
    Classes,
    Layout,
    classify,
    convolution,
    orders,
    reduced_layouts,
    slide,
    swapped,
    together,
)
from tncompile.cost.profile import DeviceProfile
from tncompile.ir import dims
from tncompile.ir.core import Index, Step, Term, Window
from tncompile.ir.tree import Tree, flatten, fold_tree

_Form = tuple[float, str, Layout]
_PRODUCTS = ("matmul", "fused", "core_left")
KEPT_LAYOUTS = 12
IMAGE = 4
"""Axes of the values that ONNX Runtime may keep in blocks of channels: batch, channels, and two of space."""

_PRODUCT = 3e-8
"""Seconds to begin one of several products whose left sides are turned as they are read."""

_STRIDE = 2048
"""Bytes from one row of a left side to the next up to which they lie well in the caches."""

_PANEL = 256
"""Columns of a product for which ONNX Runtime reads its left side once."""


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
        self.term = term
        self.axes = tuple(tuple(i.name for i in axis) for axis in output)
        self.output = tuple(name for axis in self.axes for name in axis)
        self.sizes = sizes
        self.profile = profile
        self.itemsize = itemsize
        self.shown = shown
        self.in_order = in_order
        self.added = added
        self.awaited = awaited
        self.windows = term.windows
        self._layouts = reduced_layouts(term, self.output)
        self._blocked = [not t.is_core and t.name in images for t in term.tensors]
        self._in_blocks = len(self.axes) == IMAGE and itemsize == 4  # whether results of this kind may lie so
        self._dynamic = {i.name for t in term.tensors for i in t.indices if not dims.is_static(i.size)}

    def layout(self, position: int) -> Layout:
        """The order of a tensor's indices as it flows in, or as it is stored."""
        return self._layouts[position]

    def finish(self, left: Layout, form: str, layout: Layout) -> float:
        """Seconds to bring the last result, of a step on a `left` side, into the order and axes of the output."""
        seconds = self.permute(layout, tuple(i for i in self.output if i in layout))
        if form in _PRODUCTS and not self._convolves(form, layout):
            if self.added:
                seconds += self.added * self.profile.multiply_time(1, self.size(layout), self.itemsize)
            if len(self.axes) == IMAGE:  # its space becomes one axis, and again two
                seconds += 2 * self.profile.node
            if self.awaited and self._in_blocks:
                batch, channels, *space = map(self.size, self.axes)
                seconds += self.profile.turned_time(batch, channels, math.prod(space))
        if not self.shown:
            return seconds
        free = {i for i in layout if i not in left}
        rows = tuple(i for i in layout if i in left)
        if form == "matmul" and left != (*rows, *(i for i in left if i not in rows)):  # one axis, as it was turned
            several = sum(not free.issuperset(axis) for axis in self.axes) > 1
            return seconds + (self.profile.copy_time(self.size(layout), self.itemsize) if several else 0.0)
        merged = [axis for axis in self.axes if len(axis) > 1]
        if not merged or (form in ("matmul", "fused") and merged == [self.axes[-1]] and free == {*self.axes[-1]}):
            return seconds
        return seconds + self.profile.copy_time(self.size(layout), self.itemsize)

    def size(self, names: Iterable[str]) -> int:
        """Product of sizes."""
        return math.prod(self.sizes[i] for i in names)

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
            forms = self.forms(x, y, core, {*step.order}, blocked[step.left], both)
            same = (s for s, form, order in forms if (form, order) == (step.form, step.order))
            seconds += min(same, default=math.inf)
            flops += 2.0 * self.size({*x, *y, *step.order} - self._taken(step.order, {*x, *y}))
            moved += (self.size(x) + self.size(y) + self.size(step.order)) * self.itemsize
            peak = max(peak, self.size(step.order))
            layouts.append(step.order)
            blocked.append(self.leaves_blocks(step.form, step.order, both))
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
        self._flops += 2.0 * self.size(kept.union(union) - self._taken(kept, union))
        parts = (a[0].layout, b[0].layout, tuple(kept))
        self._bytes += sum(self.size(p) for p in parts) * self.itemsize
        self._peak = max(self._peak, self.size(kept))

        found: dict[Layout, _Way] = {}
        pairs = [(x, y, b_core) for x in a for y in b]
        if not b_core:
            pairs += [(y, x, False) for x in a for y in b]
        for x, y, core in pairs:
            blocked = self._is_blocked(x.plan)
            both = blocked and self._is_blocked(y.plan) and x.layout == y.layout
            for seconds, form, order in self.forms(x.layout, y.layout, core, kept, blocked, both):
                total = x.seconds + y.seconds + seconds + (self.finish(x.layout, form, order) if root else 0.0)
                known = found.get(order)
                if known is None or total < known.seconds:
                    found[order] = _Way(total, order, _Pair(x.plan, y.plan, form, order, both))
        return sorted(found.values(), key=lambda w: w.seconds)[:KEPT_LAYOUTS]

    # ------------------------------------------------------------------------------ one contraction

    def comes_in_blocks(self, position: int) -> bool:
        """Whether a tensor of the term does."""
        return self._blocked[position]

    def leaves_blocks(self, form: str, order: Layout, both: bool) -> bool:
        """Whether the result of a step, of this form and order, lies in blocks of channels; `both`: what it reads are
        two images that do."""
        return self._in_blocks and (both if form == "multiply" else self._convolves(form, order))

    def _convolves(self, form: str, order: Layout) -> bool:
        """Whether a step of this form and order is a convolution, of one place or of several."""
        if form != "core_left" or self.itemsize == 8 or len(self.axes) < 3:
            return form == "convolve"
        if not self._has_images(tuple(i for i in order if i in self.axes[0])):
            return False
        space = self._space(order, len(self.axes) - 2)
        return space != () and order[-len(space) :] == space

    def _has_images(self, before: Layout) -> bool:
        """Whether modes `before` the channels number images: of one image there are none."""
        return len(self.axes) > 2 and (before != () or not self.axes[0])

    def _is_blocked(self, plan: _Plan) -> bool:
        if isinstance(plan, int):
            return self._blocked[plan]
        return self.leaves_blocks(plan.form, plan.order, plan.both)

    def forms(
        self, x: Layout, y: Layout, core: bool, kept: Collection[str], blocked: bool = False, both: bool = False
    ) -> Iterable[_Form]:
        """Every form of one contraction with its seconds, transposes included; `blocked`: `x` lies in blocks of
        channels; `both`: so does `y`, in the same order."""
        windows = [w for w in self.windows if w.axis in x and w.kernel in y]
        if windows:
            yield from self._convolutions(x, y, windows, kept, blocked) if core else ()
            return
        c = classify(x, y, kept)
        turned = self.profile.copy_time(self.size(x), self.itemsize) if blocked else 0.0
        if c.summed or (c.left and c.right and not c.batch):
            for seconds, form, order in self._matmuls(x, y, core, c):
                yield seconds + turned, form, order
            if core:
                yield from self._core_lefts(x, c, turned)
                yield from self._grouped(x, y, c, kept, blocked)
        seconds, form, order = self._multiply(x, y, core, c)
        yield seconds + (0.0 if both else turned), form, order

    def _matmuls(self, x: Layout, y: Layout, core: bool, c: Classes) -> Iterable[_Form]:
        rows = tuple(i for i in x if i not in c.summed)
        first = (*c.batch, *c.left)  # few products of many rows each; a run-time right side is not broadcast over M1
        in_place = together(rows, c.batch) and (core or not c.batch or rows[: len(c.batch)] == c.batch)
        yield from self._matmul(x, y, core, c, rows if in_place else first)
        if in_place and c.batch and rows != first:
            yield from self._matmul(x, y, core, c, first)

    def _matmul(self, x: Layout, y: Layout, core: bool, c: Classes, base: Layout) -> Iterable[_Form]:
        outer = self.size(base[: base.index(c.batch[0])]) if c.batch else 1
        m = self.size(c.left) // outer
        batch, k, n = outer * self.size(c.batch), self.size(c.summed), self.size(c.right)
        end = max((base.index(i) + 1 for i in c.batch), default=0)
        moved = 0.0 if self._strided(x, c) else self.permute(x, (*base, *c.summed))
        seconds = self.profile.matmul_time(batch, m, k, n, self.itemsize, core and batch == 1)
        if not core:
            seconds += self.permute(y, (*c.batch, *c.summed, *c.right))
        forms = {"matmul": seconds + moved}
        front = self._front(x, (*base, *c.summed), c.summed, end)
        if front is not None and (not c.batch or front == c.batch):
            node, panels = self.profile.node, -(-n // _PANEL)  # turned again for each panel
            if c.batch:
                copied = self.profile.copy_time(2 * panels * self.size(x), self.itemsize)
                forms = {"fused": seconds + max(node, copied)}
            else:
                fused = seconds + max(node, panels * moved) + self.size(front) * _PRODUCT
                apart = seconds + moved + node  # with a Reshape more
                forms = {"matmul": apart, "fused": fused} if self._merge(front, base) else {"fused": fused}
        for free in self._free(c.right) if core else [c.right]:
            yield from ((seconds, form, (*base, *free)) for form, seconds in forms.items())

    def _strided(self, x: Layout, c: Classes) -> bool:
        """Whether the rows of each batch are read from between those of the others, at no cost: ONNX Runtime does so
        where each of the three groups is one axis."""
        one_each = all(sum(i in self._dynamic for i in group) <= 1 for group in (c.left, c.batch))
        stride = self.size((*c.batch, *c.summed)) * self.itemsize
        return bool(c.summed) and x == (*c.left, *c.batch, *c.summed) and one_each and stride <= _STRIDE

    def _merge(self, front: Layout, rows: Layout) -> bool:
        """Whether rows with some modes in front become fewer axes: the Reshape keeps a Transpose and a matmul apart."""
        return front != () and sum(i in self._dynamic for i in rows) <= 1

    def _free(self, group: Layout) -> Iterable[Layout]:
        """The orders that the free modes of a core may take."""
        if self.in_order and {*group} <= {*self.output}:
            return [tuple(i for i in self.output if i in group)]
        return orders(group)

    def _core_lefts(self, x: Layout, c: Classes, turned: float) -> Iterable[_Form]:
        block = (*c.batch, *c.summed)
        starts = [min(x.index(i) for i in block)] if block else range(len(x))  # an outer product fits anywhere
        for start in starts:
            yield from self._core_left(x, c, start, turned)
        yield from self._as_image(x, c, turned)

    def _as_image(self, x: Layout, c: Classes, turned: float) -> Iterable[_Form]:
        """A 1x1 convolution of images that lie in another order. Where their channels lie last ONNX Runtime turns them
        as it puts them in blocks."""
        space = self._space(x, len(self.axes) - 2)
        before = tuple(i for i in x if i in c.left and i not in space)
        summed = tuple(i for i in x if i in c.summed)
        wanted = (*before, *summed, *space)
        if c.batch or not summed or not space or {*wanted} != {*x} or wanted == x:
            return
        if not c.right and together(x, summed):  # to one channel: the sum is taken where they lie
            return
        if not self._has_images(before) or self.itemsize == 8:
            return
        k = self.size(summed)
        blocks = self._in_blocks and k >= self.profile.strip and takes_images(k, self.profile.strip)
        in_one = blocks and not turned and x == (*before, *space, *summed)
        moved = turned + (0.0 if in_one else self.permute(x, wanted))
        for seconds, form, order in self._core_left(wanted, c, len(before), 0.0):
            yield moved + seconds, form, order

    def _pointwise(self, batch: int, channels: int, filters: int, space: int, blocked: bool) -> float:
        """Seconds of a 1x1 convolution in blocks of channels, of an image that comes in them or is put into them."""
        put = 0.0 if blocked or channels < self.profile.strip else self.profile.turned_time(batch, channels, space)
        return put + self.profile.direct_time(batch, channels, filters, 1, space)

    def _core_left(self, x: Layout, c: Classes, start: int, turned: float) -> Iterable[_Form]:
        middle, end = start + len(c.batch), start + len(c.batch) + len(c.summed)
        if {*x[start:middle]} != {*c.batch} or {*x[middle:end]} != {*c.summed} or end == len(x):
            return
        before, after = x[:start], x[end:]
        batch = self.size(before) * self.size(c.batch)
        m, k, n = self.size(c.right), self.size(c.summed), self.size(after)
        seconds = turned + self.profile.matmul_time(batch, m, k, n, self.itemsize, True, True)
        # a 1x1 convolution, which ONNX Runtime has not in float64
        if self._has_images(before) and not c.batch and self._is_space(x, after) and self.itemsize != 8:
            whole = self._in_blocks and after == self._space(x, IMAGE - 2)
            if whole and takes_images(k, self.profile.strip):
                seconds = self._pointwise(batch, k, m, n, blocked=turned > 0)
            else:
                seconds = min(seconds, turned + self.profile.conv_time(batch, k, m, n, self.itemsize))
        for free in orders(c.right):
            yield seconds, "core_left", (*before, *x[start:middle], *free, *after)

    def _grouped(self, x: Layout, y: Layout, c: Classes, kept: Collection[str], blocked: bool) -> Iterable[_Form]:
        """A 1x1 convolution with groups."""
        if c.batch and c.summed and self._in_blocks:
            parts, space = convolution(x, y, (), kept), self._space(x, IMAGE - 2)
            if parts.space == space and len(space) == IMAGE - 2 and self._has_images(parts.batch):
                yield from self._convolutions(x, y, (), kept, blocked)

    def _taken(self, kept: Collection[str], union: Collection[str]) -> set[str]:
        """The axes of the windows that a contraction slides over: it multiplies at each place that they leave."""
        return {w.axis for w in self.windows if w.axis in union and w.out in kept}

    def _is_space(self, x: Layout, modes: Layout) -> bool:
        """Whether modes of a layout are the last axes of the result, or will be once windows over them are taken."""
        return any(self._space(x, count) == modes for count in range(1, min(MAX_SPACE, len(self.axes) - 1) + 1))

    def _space(self, x: Layout, count: int) -> Layout:
        """The modes of the last few axes of the result as a layout has them; none where one of these has none."""
        later = {w.out: w.axis for w in self.windows if w.axis in x}
        axes = self.axes[-count:]
        return tuple(later.get(i, i) for axis in axes for i in axis) if all(axes) else ()

    def _convolutions(
        self, x: Layout, y: Layout, windows: Sequence[Window], kept: Collection[str], blocked: bool
    ) -> Iterable[_Form]:
        parts = convolution(x, y, windows, kept)
        out = {w.axis: w.out for w in windows}
        left = tuple(out.get(i, i) for i in parts.space)
        batch, groups, channels = map(self.size, (parts.batch, parts.groups, parts.channels))
        filters, taps, space = self.size(parts.filters), self.size(w.kernel for w in windows), self.size(left)
        direct = self.itemsize == 4 and self._is_direct(groups, channels, filters, taps, left)
        if direct:
            seconds = self.profile.direct_time(batch * groups, channels, filters, taps, space)
        else:
            volume = len(self.windows) > 2 or len(self.axes) > IMAGE
            seconds = self.profile.convolution_time(
                batch, groups, channels, filters, taps, space, self.itemsize, volume
            )
        moved = self.permute(x, parts.wanted)
        wanted = direct and channels >= self.profile.strip
        priced = groups > 1 and not direct  # with that in it
        if not priced and (blocked != wanted or (blocked and moved)):
            seconds += self.profile.turned_time(batch, groups * channels, self.size(parts.space))
        if direct and len(self.axes) < IMAGE:  # a sequence, as an image of one row between two Reshapes
            seconds += self.profile.turned_time(batch, filters, space)
        for free in orders(parts.filters):
            yield seconds + moved, "convolve", (*parts.batch, *parts.groups, *free, *left)

    def _is_direct(self, groups: int, channels: int, filters: int, taps: int, space: Layout) -> bool:
        """Whether a convolution is computed on images that are not unfolded."""
        axes = self.axes[2:]
        if len(axes) == IMAGE - 2 and tuple(i for axis in axes for i in axis) == space and len(space) <= len(axes):
            strip = self.profile.strip
            return takes_images(channels, strip) if groups == 1 else channels % strip == filters % strip == 0
        one = len(space) == 1 and groups == 1 and len(self.axes) < IMAGE
        return one and gains_as_image(1, channels, filters, taps)

    def _multiply(self, x: Layout, y: Layout, core: bool, c: Classes) -> _Form:
        full = (*x, *c.right)
        here = {*y}
        run = 1  # of the last modes, those that stand on the same sides
        while run < len(full) and all((full[-1 - run] in s) == (full[-1] in s) for s in (here, {*x})):
            run += 1
        length = self.size(full[len(full) - run :])
        seconds = self.profile.multiply_time(self.size(full) // length, length, self.itemsize)
        if not core:
            seconds += self.permute(y, tuple(i for i in full if i in here))
        seconds += self._sum(full, c.summed)
        return seconds, "multiply", (*(i for i in x if i not in c.summed), *c.right)

    def _sum(self, layout: Layout, summed: Collection[str]) -> float:
        """Seconds to sum over modes of a layout, neighbours together, the last ones first."""
        seconds, end = 0.0, len(layout)
        while end:
            start = end - 1
            if layout[start] in summed:
                while start and layout[start - 1] in summed:
                    start -= 1
                behind = tuple(i for i in layout[end:] if i not in summed)
                outer, run, inner = map(self.size, (layout[:start], layout[start:end], behind))
                seconds += self.profile.reduce_time(outer, run, inner, self.itemsize)
            end = start
        return seconds

    def _front(self, layout: Layout, wanted: Layout, inner: Layout, first: int) -> Layout | None:
        """Where only the `inner` modes, last in `wanted`, change places with those just before them: the modes that
        stay in front, at least the `first` few; else None."""
        outer = wanted[: len(wanted) - len(inner)]
        if inner and layout != wanted:
            for cut in range(first, len(outer)):
                if layout == (*outer[:cut], *inner, *outer[cut:]):
                    return outer[:cut]
        return None

    def permute(self, layout: Layout, wanted: Layout) -> float:
        """Seconds to bring a layout into another order."""
        if layout == wanted:
            return 0.0
        tail = 0
        while tail < len(layout) and layout[-1 - tail] == wanted[-1 - tail]:
            tail += 1
        swap = swapped(layout[: len(layout) - tail], wanted[: len(wanted) - tail])
        sizes = (self.size(swap[0]), self.size(swap[1])) if swap else None
        block = self.size(layout[len(layout) - tail :])
        return self.profile.permute_time(self.size(layout), block, self.itemsize, swap is not None, sizes)


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
