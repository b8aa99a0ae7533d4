"""Peak memory of a schedule: what is alive at once while a network runs, and what slicing an index saves.

Counted are the operands, every intermediate, permuted copies while both are alive, and what slices leave to be
summed or concatenated. Weights are not: they are there all the time. A bias is added in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tncompile.cost.layouts import Layout, classify, reduced_layout
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.schedule import Schedule, Scheduler
from tncompile.ir.core import Index, Network, Slice, Step, Term

Sizes = Mapping[str, int]


def network_peak(network: Network, sizes: Sizes, itemsize: int) -> int:
    """Bytes alive at once while a scheduled network runs, operands and output included."""
    output = tuple(i.name for i in network.output.indices)
    moving = network.moving
    peak = done = 0
    for term in moving:
        inside, result = term_peak(term, output, sizes)
        peak = max(peak, done + inside)
        done += result
    whole = _size(output, sizes)
    if len(moving) != 1 or done < whole:
        peak = max(peak, done + whole)
    return (operand_elements(network, sizes) + peak) * itemsize


def operand_elements(network: Network, sizes: Sizes) -> int:
    """Elements of what flows into a network, each value once."""
    return sum({t.name: _size([i.name for i in t.indices], sizes) for t in network.operands}.values())


def term_peak(term: Term, output: Sequence[str], sizes: Sizes) -> tuple[int, int]:
    """Elements alive at once while a scheduled term runs, but for its operands; and those of its result."""
    return _sliced_peak(term, output, sizes, term.slices)


def _sliced_peak(term: Term, output: Sequence[str], sizes: Sizes, slices: Sequence[Slice]) -> tuple[int, int]:
    if not slices:
        return _steps_peak(term, output, sizes)
    part_sizes = sliced_sizes(sizes, slices[:1])
    inside, part = _sliced_peak(term, output, part_sizes, slices[1:])
    for position, tensor in enumerate(term.tensors):
        layout = reduced_layout(term, position, output)
        if not tensor.is_core and slices[0].index in layout:
            inside += _size(layout, part_sizes)
    if slices[0].index not in output:
        return max(inside + part, 2 * part), part
    result = part * slices[0].count
    return max(inside + result - part, 2 * result), result


def sliced_sizes(sizes: Sizes, slices: Iterable[Slice]) -> dict[str, int]:
    """Sizes of the indices in the largest slice."""
    return {**sizes, **{s.index: -(-sizes[s.index] // s.count) for s in slices}}


def _steps_peak(term: Term, output: Sequence[str], sizes: Sizes) -> tuple[int, int]:
    layouts = [reduced_layout(term, p, output) for p in range(len(term.tensors))]
    live: dict[int, int] = {}
    peak = 0

    def allocate(elements: int) -> None:
        nonlocal peak
        peak = max(peak, sum(live.values()) + elements)

    for position, tensor in enumerate(term.tensors):
        names = [i.name for i in tensor.indices]
        if not tensor.is_core and layouts[position] != tuple(names):  # its diagonal, or some indices summed
            allocate((_size(names, sizes) if len({*names}) < len(names) else 0) + _size(layouts[position], sizes))
            live[position] = _size(layouts[position], sizes)
    for step in term.steps or ():
        x, y = layouts[step.left], layouts[step.right]
        core = step.right < len(term.tensors) and term.tensors[step.right].is_core
        for side, wanted in zip((step.left, step.right), _wanted(x, y, core, step), strict=True):
            if wanted != layouts[side]:
                allocate(_size(wanted, sizes))
                live[side] = _size(wanted, sizes)
        result = _size(step.order, sizes)
        product = _size({*x, *y}, sizes) if step.form == "multiply" else result
        allocate(product)
        live.pop(step.left, None)
        live.pop(step.right, None)
        allocate(product + (result if product != result else 0))
        live[len(layouts)] = result
        layouts.append(step.order)
    last = layouts[-1]
    if last != tuple(n for n in output if n in last):
        allocate(_size(last, sizes))
    return max(peak, _size(last, sizes)), _size(last, sizes)


def _wanted(x: Layout, y: Layout, core: bool, step: Step) -> tuple[Layout, Layout]:
    """The layouts that a step reads its sides in; a core's is free."""
    c = classify(x, y, {*step.order})
    free = tuple(n for n in step.order if n in c.right)
    if step.form == "core_left" and (c.batch or free):  # in place, but for an image whose channels lie elsewhere
        start = min(map(step.order.index, (*c.batch, *free)))
        behind = step.order[start + len(c.batch) + len(free) :]
        return (*step.order[:start], *c.batch, *c.summed, *behind), y
    if step.form in ("matmul", "fused"):
        rows = tuple(n for n in step.order if n not in c.right)
        batch = tuple(n for n in rows if n in c.batch)
        return (*rows, *c.summed), y if core else (*batch, *c.summed, *free)
    return x, y if core or step.form != "multiply" else (*(n for n in x if n in y), *free)


def _size(names: Iterable[str], sizes: Sizes) -> int:
    return math.prod(sizes[n] for n in names)


def price(
    term: Term, output: Sequence[Sequence[Index]], sizes: Sizes, profile: DeviceProfile, itemsize: int
) -> Schedule:
    """The cost of a scheduled term, whose result has these axes, at some sizes, with that of slicing and of putting the
    slices together."""
    steps = term.steps or ()
    part_sizes = sliced_sizes(sizes, term.slices)
    one = Scheduler(term, output, part_sizes, profile, itemsize).price(steps)
    count = math.prod(s.count for s in term.slices)
    if count == 1:
        return one
    names = [i.name for axis in output for i in axis]
    layouts = [reduced_layout(term, p, names) for p in range(len(term.tensors))]
    cut = {s.index for s in term.slices}
    copied = [a for a, t in zip(layouts, term.tensors, strict=True) if not t.is_core and cut & {*a}]
    copied.append(steps[-1].order if steps else layouts[0])
    elements = 2 * sum(_size(a, part_sizes) for a in copied)
    seconds = one.seconds + len(copied) * profile.node + profile.stream_time(elements, itemsize)
    moved = one.bytes + elements * itemsize
    return replace(one, seconds=count * seconds, flops=count * one.flops, bytes=count * moved)
