"""Slices of one index: of cores at compile time, of run-time arrays by Slice nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from tncompile.emit.graph import GraphWriter, Groups, Laid
from tncompile.errors import UnsupportedError
from tncompile.ir import Dim, Index, Slice, Tensor

Sides = list[Laid | Tensor]


def in_slices(
    slices: Sequence[Slice],
    sides: Sequence[Laid | Tensor],
    write: GraphWriter,
    output: Collection[str],
    run: Callable[[Sides], Laid],
) -> Laid:
    """What `run` makes of all parts of some sides: their sum, or one after another where `output` has the index."""
    if not slices:
        return run([*sides])
    index, count = slices[0].index, slices[0].count
    sizes, operands = write.sizes, write.operands
    joined = index in output
    length = None if isinstance(sizes[index], int) else _length(index, sides, write)
    if length is not None and not joined:
        raise UnsupportedError(f"slices of {index}, which has a run-time size and is summed")
    parts: list[Laid] = []
    for number in range(count):
        cut = _Cut(index, sizes[index], count, number, _run_time_bounds(length, count, number, write))
        cuts: Sides = [cut.of_core(s) if isinstance(s, Tensor) else cut.of_array(s, write) for s in sides]
        write.sizes = {**sizes, index: cut.part}
        write.operands = [s for s in cuts if isinstance(s, Laid)]
        part = in_slices(slices[1:], cuts, write, output, run)
        parts.append(cut.trimmed(part, write) if joined else part)
        write.sizes, write.operands = sizes, operands
        if not joined and len(parts) == 2:  # added at once, so that no more than two are alive
            parts = [Laid(write.op("Add", [p.value for p in parts]), part.axes)]
    if not joined:
        return parts[0]
    return Laid(write.op("Concat", [p.value for p in parts], axis=_axis(parts[0], index)), parts[0].axes)


@dataclass(frozen=True)
class _Bounds:
    """Where a slice of a run-time size begins and ends, and where the array that stands for it ends.

    A slice may be empty, where there are fewer elements than slices. But ONNX Runtime refuses some matmuls of empty
    arrays (1.31: a batched one, once it has fused a Transpose into it): one element is computed and not kept.
    """

    start: onnx.Value
    stop: onnx.Value
    filled: onnx.Value


@dataclass(frozen=True)
class _Cut:
    """The slice number `number` of `count` of an index: from ``size * number // count`` to where the next begins."""

    index: str
    size: Dim
    count: int
    number: int
    bounds: _Bounds | None

    @property
    def part(self) -> Dim:
        """The size of the slice; a symbol of its own where the index has a run-time size."""
        if isinstance(self.size, int):
            start, stop = self._static(self.size)
            return stop - start
        return f"slice_of_{self.index}"

    def _static(self, size: int) -> tuple[int, int]:
        return size * self.number // self.count, size * (self.number + 1) // self.count

    def of_core(self, core: Tensor) -> Tensor:
        """The slice of a core, or the core itself where it does not have the index."""
        names = [i.name for i in core.indices]
        if self.index not in names:
            return core
        array, axis = core.array(), names.index(self.index)
        start, stop = self._static(array.shape[axis])
        part = np.take(array, range(start, stop), axis)
        indices = tuple(Index(n, size) for n, size in zip(names, part.shape, strict=True))
        return Tensor(f"{core.name}[{self.index}={start}:{stop}]", tuple((i,) for i in indices), part)

    def of_array(self, laid: Laid, write: GraphWriter) -> Laid:
        """The slice of a run-time array, written while `write` still has the sizes of the whole."""
        if self.index not in laid.order:
            return laid
        laid = _headed(laid, self.index, write)
        if self.bounds is None:
            start, stop = self._static(int(self.size))
            rest = _rest(laid, self.index, write)
            places = [write.constant(f"slice_{place}", [place]) for place in (start * rest, stop * rest)]
        else:
            places = [self._times_rest(v, laid, write) for v in (self.bounds.start, self.bounds.filled)]
        return self._slice(laid, places, write)

    def trimmed(self, laid: Laid, write: GraphWriter) -> Laid:
        """A result with its index at the head of an axis, and without the element that stands for none."""
        laid = _headed(laid, self.index, write)
        if self.bounds is None or self.number == self.count - 1:  # the last is never empty
            return laid
        kept = write.op("Sub", [self.bounds.stop, self.bounds.start])
        return self._slice(laid, [write.constant("slice_0", [0]), self._times_rest(kept, laid, write)], write)

    def _times_rest(self, value: onnx.Value, laid: Laid, write: GraphWriter) -> onnx.Value:
        rest = _rest(laid, self.index, write)
        return value if rest == 1 else write.op("Mul", [value, write.constant(f"size_{rest}", [rest])])

    def _slice(self, laid: Laid, places: Sequence[onnx.Value], write: GraphWriter) -> Laid:
        axis = _axis(laid, self.index)
        return Laid(write.op("Slice", [laid.value, *places, write.constant(f"axes_{axis}", [axis])]), laid.axes)


def _run_time_bounds(length: onnx.Value | None, count: int, number: int, write: GraphWriter) -> _Bounds | None:
    if length is None:
        return None

    def place(number: int) -> onnx.Value:
        if number == 0:
            return write.constant("slice_0", [0])
        if number == count:
            return length
        product = write.op("Mul", [length, write.constant(f"size_{number}", [number])])
        return write.op("Div", [product, write.constant(f"size_{count}", [count])])

    start, stop = place(number), place(number + 1)
    if number == count - 1:
        return _Bounds(start, stop, stop)
    one = write.op("Add", [start, write.constant("size_1", [1])])
    return _Bounds(start, stop, write.op("Max", [stop, one]))


def _length(index: str, sides: Sequence[Laid | Tensor], write: GraphWriter) -> onnx.Value:
    """The run-time size of an index."""
    laid = next((s for s in sides if isinstance(s, Laid) and index in s.order), None)
    if laid is None:
        raise UnsupportedError(f"slices of {index}, which has a run-time size and is on no operand")
    laid = _headed(laid, index, write)
    axis, rest = _axis(laid, index), _rest(laid, index, write)
    size = write.op("Shape", [laid.value], start=axis, end=axis + 1)
    return size if rest == 1 else write.op("Div", [size, write.constant(f"size_{rest}", [rest])])


def _headed(laid: Laid, index: str, write: GraphWriter) -> Laid:
    """The array with its axes split so that one begins with an index: a slice of it is a slice of that axis."""
    groups: Groups = ()
    for group in laid.axes:
        at = group.index(index) if index in group else 0
        end = at + 1 if index in group and any(map(write.symbolic, group[at + 1 :])) else len(group)
        groups += tuple(g for g in (group[:at], group[at:end], group[end:]) if g) or ((),)
    return write.regroup(laid, groups)


def _axis(laid: Laid, index: str) -> int:
    """The axis that begins with an index."""
    return next(k for k, group in enumerate(laid.axes) if group[:1] == (index,))


def _rest(laid: Laid, index: str, write: GraphWriter) -> int:
    """Elements along an index's axis for each element of the index."""
    return int(write.size(laid.axes[_axis(laid, index)][1:]))
