"""Nodes that pick positions along axes of a value: slices, selections, rolls, flips, and zeros put around it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tncompile.ir import Network, Node, Opaque, Program, Ref, Value
from tncompile.ir.core import NETWORK_DTYPES
from tncompile.ir.opaque import Arg
from tncompile.passes.stacks import SELECT, SLICE

ROLL, FLIP, PAD = "aten.roll.default", "aten.flip.default", "aten.constant_pad_nd.default"
SCATTER = "aten.slice_scatter.default"
NOTHING = -1
"""In the place of a position: there is a zero."""
_ZEROS = ("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default")
_OF_ZEROS = (SLICE, ROLL, FLIP, PAD, SELECT, "aten.clone.default", "aten.expand.default")


@dataclass(frozen=True)
class Picks:
    """``value[..., j, ...] = source[..., positions[j], ...]`` along each axis of `along`, 0 at `NOTHING`.

    Where an axis is `dropped`, one position is picked of it, and the value does not have it.
    """

    source: Value
    along: Mapping[int, tuple[int, ...]]
    dropped: int | None = None


def after(lower: Picks, upper: Picks) -> Picks | None:
    """What is picked of what is picked, at once; None where axes are counted differently."""
    if lower.dropped is not None:
        return None
    along = dict(lower.along)
    for axis, positions in upper.along.items():
        below = along.get(axis)
        along[axis] = positions if below is None else tuple(p if p == NOTHING else below[p] for p in positions)
    return Picks(lower.source, along, upper.dropped)


def zeros_of(program: Program) -> frozenset[str]:
    """The values that are 0 everywhere."""
    found: set[str] = set()
    for node in program.nodes:
        if isinstance(node, Opaque):
            read = node.args[0] if node.args else None
            again = node.target in _OF_ZEROS and isinstance(read, Ref) and read.name in found
            if node.target in _ZEROS or (again and not (node.target == PAD and _value(node))):
                found.add(node.output.name)
        elif isinstance(node, Network) and all(any(t.name in found for t in term.operands) for term in node.terms):
            found.add(node.output.name)
    return frozenset(found)


def picks_of(node: Node, values: Mapping[str, Value], zeros: Collection[str]) -> Picks | None:
    """What a node picks; None where it does something else, or where sizes are not known."""
    if not isinstance(node, Opaque) or node.target not in _READ or node.kwargs:
        return None
    args = node.args
    if node.target == SCATTER:
        base, args = args[0], args[1:]
        if not isinstance(base, Ref) or base.name not in zeros:
            return None
    source = values.get(args[0].name) if isinstance(args[0], Ref) else None
    if source is None or source.shape is None or source.dtype not in NETWORK_DTYPES:
        return None
    if source.dtype != node.output.dtype:  # written into zeros of another
        return None
    along = _READ[node.target](source.shape, node.output.shape or (), args[1:])
    if along is None:
        return None
    return Picks(source, along, next(iter(along)) if node.target == SELECT else None)


_Shape = Sequence[object]
_Along = dict[int, tuple[int, ...]]


def _slice(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    found = _range(shape, args)
    return None if found is None else {found[0]: tuple(found[1])}


def _select(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    dim, position = args
    size = shape[axis := dim % len(shape)] if isinstance(dim, int) else None
    return {axis: (position % size,)} if isinstance(size, int) and isinstance(position, int) else None


def _scatter(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    found = _range(made, args)
    if found is None:
        return None
    positions = [NOTHING] * len(range(_int(made[found[0]])))
    for j, p in enumerate(found[1]):
        positions[p] = j
    return {found[0]: tuple(positions)}


def _range(shape: _Shape, args: Sequence[Arg]) -> tuple[int, range] | None:
    """The axis of ``(dim=0, start=None, end=None, step=1)`` and the positions along it."""
    defaults: tuple[Arg, ...] = (0, None, None, 1)
    dim, start, end, step = (*args, *defaults[len(args) :])
    size = shape[axis := dim % len(shape)] if isinstance(dim, int) else None
    if not isinstance(size, int) or not isinstance(step, int):
        return None
    if not isinstance(start, int | None) or not isinstance(end, int | None):
        return None
    return axis, range(size)[start:end:step]


def _roll(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    shifts, dims = (*args, ())[:2]
    if not isinstance(shifts, tuple) or not isinstance(dims, tuple) or len(shifts) != len(dims):
        return None
    along: _Along = {}
    for shift, dim in zip(shifts, dims, strict=True):
        axis = int(dim) % len(shape)
        size = shape[axis]
        if not isinstance(size, int) or not isinstance(shift, int) or axis in along:
            return None
        along[axis] = tuple((j - shift) % size for j in range(size))
    return along or None


def _flip(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    axes = [int(dim) % len(shape) for dim in args[0]] if isinstance(args[0], tuple) else []
    if not axes or not all(isinstance(shape[axis], int) for axis in axes):
        return None
    return {axis: tuple(reversed(range(_int(shape[axis])))) for axis in axes}


def _pad(shape: _Shape, made: _Shape, args: Sequence[Arg]) -> _Along | None:
    widths, value = (*args, 0)[:2]
    if not isinstance(widths, tuple) or value != 0 or not all(isinstance(width, int) for width in widths):
        return None
    along: _Along = {}
    for k in range(len(widths) // 2):
        axis, (before, after) = len(shape) - 1 - k, widths[2 * k : 2 * k + 2]
        size = shape[axis]
        if before or after:
            if not isinstance(size, int):
                return None
            along[axis] = tuple(p if 0 <= p < size else NOTHING for p in range(-before, size + after))
    return along or None


def _value(node: Opaque) -> Arg:
    """What a node pads with."""
    return node.args[2] if len(node.args) > 2 else 0


def _int(size: object) -> int:
    assert isinstance(size, int)
    return size


_READ = {SLICE: _slice, SELECT: _select, ROLL: _roll, FLIP: _flip, PAD: _pad, SCATTER: _scatter}
