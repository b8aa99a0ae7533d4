"""One step of a schedule -> ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as onnx

from tncompile.cost.layouts import MAX_SPACE, classify, convolution
from tncompile.emit.graph import Arranged, GraphWriter, Group, Groups, Laid
from tncompile.ir import Index, Step, Tensor, Window

Side = Laid | Tensor  # a run-time array, or a core whose order is still free


def laid_out(tensor: Tensor, value: onnx.Value) -> Laid:
    """A tensor as it lies in a value."""
    return Laid(value, tuple(tuple(i.name for i in axis) for axis in tensor.axes))


class Contractions:
    """Writes the steps of one network, whose output has the axes `out_axes`."""

    def __init__(self, write: GraphWriter, dtype: str, out_axes: Groups) -> None:
        self.write = write
        self.dtype = dtype
        self.out_axes = out_axes

    def step(self, left: Laid, right: Side, step: Step, windows: Sequence[Window]) -> Laid:
        """One contraction, of a `left` side that may be reshaped and transposed."""
        right_order = right.order if isinstance(right, Laid) else tuple(i.name for i in right.indices)
        kept = {*step.order}
        if step.form == "multiply":
            return self._multiply(left, right, right_order, step.order)
        if step.form == "convolve":
            assert isinstance(right, Tensor)
            return self._convolve(left, right, windows, step.order)
        c = classify(left.order, right_order, kept)
        free = tuple(n for n in step.order if n in c.right)
        if step.form == "core_left":
            assert isinstance(right, Tensor)
            return self._core_left(left, right, c.batch, c.summed, free, step.order, windows)
        rows = tuple(n for n in step.order if n not in c.right)
        if not c.batch:
            return self._matmul(left, right, rows, c.summed, free, step.form == "fused")
        start = min(map(rows.index, c.batch))
        batch = rows[start : start + len(c.batch)]
        before, after = rows[:start], rows[start + len(c.batch) :]
        axes = (*self.write.gather(before), *self.write.gather(batch))
        tail = self._one(after)
        left = self.write.arrange(left, (*axes, *tail, c.summed))
        single: Groups = ((),) * (len(tail) - 1)  # so that the batch modes of both sides stand above each other
        matrix = self._side(right, (*self.write.gather(batch), *single, c.summed, free))
        value = self.write.op("MatMul", [left.value, matrix.value])
        return Laid(value, (*axes, *tail, free))

    def _one(self, names: Group) -> Groups:
        """Exactly one axis for some indices, or several where run-time sizes forbid one."""
        return self.write.gather(names) if names else ((),)

    def _matmul(self, left: Laid, right: Side, rows: Group, summed: Group, free: Group, fused: bool) -> Laid:
        turned = left.order != (*rows, *summed)
        left = self.write.permute(left, (*rows, *summed))
        lead = self.write.gather(rows, left.axes) if rows else ((),)
        if len(lead) > 1 and ((*lead, summed) != left.axes or (turned and not fused)):
            lead = self.write.gather(rows)  # as few axes as possible: a Reshape is due, or keeps two nodes apart
        left = self.write.regroup(left, (*lead, summed))
        matrix = self._side(right, (summed, free))
        return Laid(self.write.op("MatMul", [left.value, matrix.value]), (*lead, free))

    def _core_left(
        self,
        left: Laid,
        core: Tensor,
        batch: Group,
        summed: Group,
        free: Group,
        order: Group,
        windows: Sequence[Window],
    ) -> Laid:
        image = tuple(name for axis in self._shown(left, windows)[2:] for name in axis)
        if batch or free:
            start = _position(order, (*batch, *free))
        else:
            start = _position(left.order, summed)
            in_place = {*left.order[start : start + len(summed)]} == {*summed}
            if not in_place and image and order[-len(image) :] == image:  # an image of one channel
                start = len(order) - len(image)
        before = order[:start]
        after = order[start + len(batch) + len(free) :]
        batch = order[start : start + len(batch)]
        # in place already, as scheduled, but for images whose channels lie elsewhere
        left = self.write.permute(left, (*before, *batch, *summed, *after), image=True)
        space = self._space(left, before, after, windows)
        if not batch and space and self.dtype != "float64":  # ONNX Runtime has no such Conv
            left = self.write.regroup(left, (before, summed, *space))
            weight = self._side(core, (free, summed, *((),) * len(space)))
            return Laid(self.write.op("Conv", [left.value, weight.value]), (before, free, *space))
        groups = (*self.write.gather(before), *self.write.gather(batch))
        tail = self._one(after)
        if len(tail) > 1:  # several run-time sizes behind: they become batch modes of a row each
            return self._matmul_last(left, core, before, batch, summed, free, after)
        left = self.write.regroup(left, (*groups, summed, *tail))
        matrix = self._side(core, (*self.write.gather(batch), free, summed))
        return Laid(self.write.op("MatMul", [matrix.value, left.value]), (*groups, free, *tail))

    def _convolve(self, left: Laid, core: Tensor, windows: Sequence[Window], order: Group) -> Laid:
        names = tuple(i.name for i in core.indices)
        by_axis = {w.axis: w for w in windows if w.axis in left.order and w.kernel in names}
        parts = convolution(left.order, names, [*by_axis.values()], {*order})
        free = tuple(n for n in order if n in parts.filters)
        channels = (*parts.groups, *parts.channels)
        back = {w.out: w.axis for w in by_axis.values()}
        images: Groups = tuple(tuple(back.get(n, n) for n in axis) for axis in self.out_axes[2:])
        one_each = len(images) <= MAX_SPACE and all(len(axis) <= 1 for axis in images)
        if not one_each or [n for axis in images for n in axis] != [*parts.space]:
            images = tuple((n,) for n in parts.space)
        left = self.write.arrange(left, (parts.batch, channels, *images))  # of one column where the output has one
        slid = [by_axis.get(axis[0]) if axis else None for axis in left.axes[2:]]
        kernels: Groups = tuple(() if w is None else (w.kernel,) for w in slid)
        weight = self._side(core, ((*parts.groups, *free), parts.channels, *kernels))
        padding = [(0, 0) if w is None else w.padding for w in slid]
        value = self.write.op(
            "Conv",
            [left.value, weight.value],
            kernel_shape=[int(self.write.size(axis)) for axis in kernels],
            group=int(self.write.size(parts.groups)),
            strides=[1 if w is None else w.stride for w in slid],
            dilations=[1 if w is None else w.dilation for w in slid],
            pads=[before for before, _ in padding] + [after for _, after in padding],
        )
        space = (axis if w is None else (w.out,) for axis, w in zip(left.axes[2:], slid, strict=True))
        return Laid(value, (parts.batch, (*parts.groups, *free), *space))

    def _space(self, left: Laid, before: Group, after: Group, windows: Sequence[Window]) -> Groups:
        """The axes behind the channels, where a contraction is a 1x1 convolution from (batch, channels, space..)
        to an output with the same space, or what a window makes of it later; none where it is not."""
        shown = self._shown(left, windows)
        for count in (1, 2, 3):
            space = left.axes[len(left.axes) - count :]
            if tuple(n for axis in space for n in axis) == after and all(space):
                one_image = len(shown) == count + 2 and not shown[0]
                single = (before or one_image) and sum(map(self.write.symbolic, before)) <= 1
                if single and shown[-count:] == space:
                    return space
        axes = shown[2:]  # of an image that lies in other axes, where its size is known
        image = len(axes) == 2 and all(axes) and tuple(n for axis in axes for n in axis) == after
        static = not any(map(self.write.symbolic, after)) and sum(map(self.write.symbolic, before)) <= 1
        return axes if image and static and (before or not shown[0]) and self.dtype == "float32" else ()

    def _shown(self, left: Laid, windows: Sequence[Window]) -> Groups:
        """The axes of the output, as they are before the windows over a side are taken."""
        later = {w.out: w.axis for w in windows if w.axis in left.order}
        return tuple(tuple(later.get(n, n) for n in axis) for axis in self.out_axes)

    def _matmul_last(
        self, left: Laid, core: Tensor, before: Group, batch: Group, summed: Group, free: Group, after: Group
    ) -> Laid:
        axes = (*self.write.gather(before), *self.write.gather(batch), *self.write.gather(after))
        left = self.write.arrange(left, (*axes, summed)) if not batch else left
        if batch:
            lead = (*self.write.gather((*before, *after)), *self.write.gather(batch), ())
            left = self.write.arrange(left, (*lead, summed))
            matrix = self._side(core, (*self.write.gather(batch), summed, free))
            result = Laid(self.write.op("MatMul", [left.value, matrix.value]), (*lead, free))
        else:
            result = Laid(self.write.op("MatMul", [left.value, self._side(core, (summed, free)).value]), (*axes, free))
        return self.write.permute(result, (*before, *batch, *free, *after))

    def _multiply(self, left: Laid, right: Side, right_order: Group, order: Group) -> Laid:
        if isinstance(right, Laid) and right_order == order and {*left.order} <= {*order}:
            left, right, right_order = right, left, left.order  # as it lies, and in the axes that it has
        free = tuple(n for n in right_order if n not in left.order)
        full = (*left.order, *(n for n in order if n in free))
        summed = tuple(n for n in left.order if n not in order)

        def kind(name: str) -> tuple[bool, bool, bool]:
            return name in left.order, name in right_order, name in summed

        if all(len({kind(n) for n in axis}) <= 1 for axis in left.axes):
            runs = list(left.axes)
        else:
            runs = self._runs(left.order, kind)
        runs += self._runs(full[len(left.order) :], kind)
        wide: Groups = tuple(run if run and run[0] in left.order else () for run in runs)
        left = self.write.regroup(left, wide)
        narrow = tuple(run if run and run[0] in right_order else () for run in runs)
        if isinstance(right, Tensor):
            while narrow and not narrow[0]:
                narrow = narrow[1:]  # broadcasting aligns to the right
            if not narrow and self.dtype == "float64" and left.axes:
                right, narrow = self._written_out(right, left.axes[-1])
        factor = self._side(right, narrow)
        product = Laid(self.write.op("Mul", [left.value, factor.value]), tuple(runs))
        return self.reduce(product, summed) if summed else product

    def _written_out(self, number: Tensor, axis: Group) -> tuple[Tensor, Groups]:
        """A number along the last axis: ONNX Runtime fuses a plain one into the matmul before, as a float32."""
        if number.data is None or not axis or any(map(self.write.symbolic, axis)):
            return number, ()
        data = np.full([int(self.write.sizes[n]) for n in axis], number.data.reshape(()))
        indices = (Index(n, size) for n, size in zip(axis, data.shape, strict=True))
        return Tensor(number.name, tuple((i,) for i in indices), data), (axis,)

    def _runs(self, names: Group, kind: Callable[[str], object]) -> list[Group]:
        runs: list[Group] = []
        for name in names:
            same = bool(runs) and kind(runs[-1][0]) == kind(name)
            if same and not (self.write.symbolic(name) and any(map(self.write.symbolic, runs[-1]))):
                runs[-1] = (*runs[-1], name)
            else:
                runs.append((name,))
        return runs

    def _side(self, side: Side, groups: Groups) -> Laid:
        """The right side in given groups: a core is arranged at compile time."""
        if isinstance(side, Laid):
            return self.write.arrange(side, groups)
        order = tuple(n for g in groups for n in g)
        names = tuple(i.name for i in side.indices)
        shape = [int(self.write.size(g)) for g in groups]
        shared = self.write.weights.shared.get(id(side.data))
        if shared is not None:
            return self.write.arrange(laid_out(side, shared), groups)
        perm = [names.index(n) for n in order]
        suffix = "" if perm == sorted(perm) else f"[{' '.join(order)}]"
        value = self.write.weights.arranged(side.name + suffix, side.array(), perm, shape)
        Arranged(side, groups).note(value)
        return Laid(value, groups)

    def reduce(self, laid: Laid, summed: Sequence[str]) -> Laid:
        """An array summed over whole axes, neighbours together, the last first: at once would take longer."""
        axes = [k for k, axis in enumerate(laid.axes) if axis and axis[0] in summed]
        while axes:
            run = [axes.pop()]
            while axes and not any(laid.axes[axes[-1] + 1 : run[0]]):  # neighbours, or of size 1 between them
                run = [*range(axes.pop(), run[0]), *run]
            wanted = self.write.constant(f"axes_{'_'.join(map(str, run))}", run)
            kept = tuple(axis for k, axis in enumerate(laid.axes) if k not in run)
            laid = Laid(self.write.op("ReduceSum", [laid.value, wanted], keepdims=0), kept)
        return laid


def _position(order: Group, names: Group) -> int:
    return min(order.index(n) for n in names)
