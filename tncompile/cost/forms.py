"""The ways to compute one contraction, and what each takes.

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
from functools import cached_property

from tncompile.cost.kernels import gains_as_image, takes_images
from tncompile.cost.layouts import (
    AT_LEAST,
    MAX_SPACE,
    Classes,
    Layout,
    classify,
    convolution,
    halfway,
    orders,
    swapped,
    together,
)
from tncompile.cost.profile import DeviceProfile
from tncompile.ir.core import Window

Form = tuple[float, str, Layout]
"""Seconds, the name of the form, and the layout that it leaves."""

IMAGE = 4
"""Axes of the values that ONNX Runtime may keep in blocks of channels: batch, channels, and two of space."""

_PRODUCT = 3e-8
"""Seconds to begin one of several products whose left sides are turned as they are read."""

_STRIDE = 2048
"""Bytes from one row of a left side to the next up to which they lie well in the caches."""

_PANEL = 256
"""Columns of a product for which ONNX Runtime reads its left side once."""


@dataclass(frozen=True)
class Forms:
    """Prices the contractions of one term, whose result has the `axes`. `sizes` gives every index its size, in
    elements; `dynamic` are those of which it is known at run time only. `in_order`: the free modes of a core stand in
    the order of the result, as ONNX Runtime's attention reads them."""

    axes: Sequence[Layout]
    sizes: Mapping[str, int]
    profile: DeviceProfile
    itemsize: int
    windows: Sequence[Window] = ()
    dynamic: Collection[str] = ()
    in_order: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether results of this kind may lie in blocks of channels."""
        return len(self.axes) == IMAGE and self.itemsize == 4

    @cached_property
    def _least(self) -> Mapping[str, int]:
        return {name: AT_LEAST if name in self.dynamic else size for name, size in self.sizes.items()}

    @property
    def _output(self) -> Layout:
        return tuple(name for axis in self.axes for name in axis)

    def size(self, names: Iterable[str]) -> int:
        """Product of sizes."""
        return math.prod(self.sizes[i] for i in names)

    def leaves_blocks(self, form: str, order: Layout, both: bool) -> bool:
        """Whether the result of a step, of this form and order, lies in blocks of channels; `both`: what it reads are
        two images that do."""
        return self.in_blocks and (both if form == "multiply" else self.convolves(form, order))

    def convolves(self, form: str, order: Layout) -> bool:
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

    def of(
        self, x: Layout, y: Layout, core: bool, kept: Collection[str], blocked: bool = False, both: bool = False
    ) -> Iterable[Form]:
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

    def _matmuls(self, x: Layout, y: Layout, core: bool, c: Classes) -> Iterable[Form]:
        rows = tuple(i for i in x if i not in c.summed)
        first = (*c.batch, *c.left)  # few products of many rows each; a run-time right side is not broadcast over M1
        in_place = together(rows, c.batch) and (core or not c.batch or rows[: len(c.batch)] == c.batch)
        yield from self._matmul(x, y, core, c, rows if in_place else first)
        if in_place and c.batch and rows != first:
            yield from self._matmul(x, y, core, c, first)

    def _matmul(self, x: Layout, y: Layout, core: bool, c: Classes, base: Layout) -> Iterable[Form]:
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
        one_each = all(sum(i in self.dynamic for i in group) <= 1 for group in (c.left, c.batch))
        stride = self.size((*c.batch, *c.summed)) * self.itemsize
        return bool(c.summed) and x == (*c.left, *c.batch, *c.summed) and one_each and stride <= _STRIDE

    def _merge(self, front: Layout, rows: Layout) -> bool:
        """Whether rows with some modes in front become fewer axes: the Reshape keeps a Transpose and a matmul apart."""
        return front != () and sum(i in self.dynamic for i in rows) <= 1

    def _free(self, group: Layout) -> Iterable[Layout]:
        """The orders that the free modes of a core may take."""
        if self.in_order and {*group} <= {*self._output}:
            return [tuple(i for i in self._output if i in group)]
        return orders(group)

    def _core_lefts(self, x: Layout, c: Classes, turned: float) -> Iterable[Form]:
        block = (*c.batch, *c.summed)
        starts = [min(x.index(i) for i in block)] if block else range(len(x))  # an outer product fits anywhere
        for start in starts:
            yield from self._core_left(x, c, start, turned)
        yield from self._as_image(x, c, turned)

    def _as_image(self, x: Layout, c: Classes, turned: float) -> Iterable[Form]:
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
        blocks = self.in_blocks and k >= self.profile.strip and takes_images(k, self.profile.strip)
        in_one = blocks and not turned and x == (*before, *space, *summed)
        moved = turned + (0.0 if in_one else self.permute(x, wanted))
        for seconds, form, order in self._core_left(wanted, c, len(before), 0.0):
            yield moved + seconds, form, order

    def _pointwise(self, batch: int, channels: int, filters: int, space: int, blocked: bool) -> float:
        """Seconds of a 1x1 convolution in blocks of channels, of an image that comes in them or is put into them."""
        put = 0.0 if blocked or channels < self.profile.strip else self.profile.turned_time(batch, channels, space)
        return put + self.profile.direct_time(batch, channels, filters, 1, space)

    def _core_left(self, x: Layout, c: Classes, start: int, turned: float) -> Iterable[Form]:
        middle, end = start + len(c.batch), start + len(c.batch) + len(c.summed)
        if {*x[start:middle]} != {*c.batch} or {*x[middle:end]} != {*c.summed} or end == len(x):
            return
        before, after = x[:start], x[end:]
        batch = self.size(before) * self.size(c.batch)
        m, k, n = self.size(c.right), self.size(c.summed), self.size(after)
        seconds = turned + self.profile.matmul_time(batch, m, k, n, self.itemsize, True, True)
        # a 1x1 convolution, which ONNX Runtime has not in float64
        if self._has_images(before) and not c.batch and self._is_space(x, after) and self.itemsize != 8:
            whole = self.in_blocks and after == self._space(x, IMAGE - 2)
            if whole and takes_images(k, self.profile.strip):
                seconds = self._pointwise(batch, k, m, n, blocked=turned > 0)
            else:
                seconds = min(seconds, turned + self.profile.conv_time(batch, k, m, n, self.itemsize))
        for free in orders(c.right):
            yield seconds, "core_left", (*before, *x[start:middle], *free, *after)

    def _grouped(self, x: Layout, y: Layout, c: Classes, kept: Collection[str], blocked: bool) -> Iterable[Form]:
        """A 1x1 convolution with groups."""
        if c.batch and c.summed and self.in_blocks:
            parts, space = convolution(x, y, (), kept), self._space(x, IMAGE - 2)
            if parts.space == space and len(space) == IMAGE - 2 and self._has_images(parts.batch):
                yield from self._convolutions(x, y, (), kept, blocked)

    def taken(self, kept: Collection[str], union: Collection[str]) -> set[str]:
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
    ) -> Iterable[Form]:
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

    def _multiply(self, x: Layout, y: Layout, core: bool, c: Classes) -> Form:
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
        middle = None if swap else halfway(layout, wanted, self._least, self.itemsize)
        if middle is not None:
            return self.profile.node + self.permute(layout, middle) + self.permute(middle, wanted)
        sizes = (self.size(swap[0]), self.size(swap[1])) if swap else None
        block = self.size(layout[len(layout) - tail :])
        return self.profile.permute_time(self.size(layout), block, self.itemsize, swap is not None, sizes)
