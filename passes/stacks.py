"""Take apart no tensor that is put together again: stacks of slices become slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.core import NETWORK_DTYPES
from tncompile.ir.opaque import Arg
from tncompile.passes.base import Change, Context, Pass

SELECT, SLICE, STACK = "aten.select.int", "aten.slice.Tensor", "aten.stack.default"
UNBIND, GETITEM = "aten.unbind.int", "operator.getitem"


@dataclass(frozen=True)
class Part:
    """One position along an axis of a value."""

    value: Value
    axis: int
    position: int


@dataclass(frozen=True)
class Stacks(Pass):
    """Read slices where a model stacks what it had taken apart.

    ```
    opaque p: tuple = aten.unbind.int(%h)               opaque q = operator.getitem(%p, 0)   (and so on)
    opaque s: float32[4, b, r] = aten.stack.default([%q, %q_2, %q_4, %q_6])
    ->
    opaque s: float32[4, b, r] = aten.slice.Tensor(%h, 0, 0, 7, 2)
    ```

    1. An element of an unbound tensor is a selection from it; a selection from an axis of size 1 is a view.
    2. A stack is a slice where its parts are selections from one axis of one tensor, in even steps upwards; where
       they are all there are it is the tensor itself. A stack along another axis is the slice, permuted.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        tuples: dict[str, Opaque] = {}
        parts: dict[str, Part] = {}
        for node in program.nodes:
            if not isinstance(node, Opaque):
                nodes.append(node)
                continue
            if node.target == UNBIND:
                tuples[node.output.name] = node
            part = part_of(node, program, tuples)
            if part is not None:
                parts[node.output.name] = part
                nodes.append(_selection(node, part))
                continue
            stacked = _stacked(node, parts)
            if stacked is not None:
                value = stacked[0].value.name
                changes.append(
                    Change(node.output.name, f"{len(stacked)} slices of {value} are read at once", "a stack")
                )
                nodes += _slice(node, stacked)
                continue
            nodes.append(node)
        return replace(program, nodes=tuple(nodes)), changes


def part_of(node: Opaque, program: Program, tuples: dict[str, Opaque]) -> Part | None:
    """What a node selects."""
    if node.target == GETITEM and isinstance(node.args[0], Ref) and node.args[0].name in tuples:
        source, position = tuples[node.args[0].name], node.args[1]
        axis: Arg = source.args[1] if len(source.args) > 1 else dict(source.kwargs).get("dim", 0)
        source_value = source.args[0]
    elif node.target == SELECT and len(node.args) == 3:
        source_value, axis, position = node.args
    else:
        return None
    value = program.values.get(source_value.name) if isinstance(source_value, Ref) else None
    if value is None or value.shape is None or not isinstance(axis, int) or not isinstance(position, int):
        return None
    axis %= len(value.shape)
    size = value.shape[axis]
    return Part(value, axis, position % size) if isinstance(size, int) else None


def _selection(node: Opaque, part: Part) -> Node:
    shape = part.value.shape or ()
    if shape[part.axis] == 1 and part.value.dtype in NETWORK_DTYPES:
        return _view(node, part.value, [a for a in range(len(shape)) if a != part.axis])
    return replace(node, target=SELECT, args=(Ref(part.value.name), part.axis, part.position), kwargs=())


def _stacked(node: Opaque, parts: dict[str, Part]) -> list[Part] | None:
    """The parts of a stack, where they are even steps along one axis of one value."""
    if node.target != STACK or not isinstance(node.args[0], tuple) or not node.args[0]:
        return None
    found = [parts.get(a.name) if isinstance(a, Ref) else None for a in node.args[0]]
    known = [p for p in found if p is not None]
    if len(known) < len(found) or len({(p.value.name, p.axis) for p in known}) > 1:
        return None
    whole = len(known) == (known[0].value.shape or ())[known[0].axis]
    if known[0].value.dtype not in NETWORK_DTYPES and (whole or _turned(node, known[0])):
        return None  # it would be a network, and networks are of floats
    step = _step(known)
    even = all(p.position == known[0].position + k * step for k, p in enumerate(known))
    return known if even and step > 0 else None


def _turned(node: Opaque, part: Part) -> bool:
    """Whether a stack puts its parts along another axis than they were selected from."""
    return _along(node, part.value) != part.axis


def _along(node: Opaque, value: Value) -> int:
    """The axis along which a node stacks parts of a value."""
    to: Arg = node.args[1] if len(node.args) > 1 else dict(node.kwargs).get("dim", 0)
    assert isinstance(to, int)
    return to % len(value.shape or ())


def _step(parts: Sequence[Part]) -> int:
    return parts[1].position - parts[0].position if len(parts) > 1 else 1


def _slice(node: Opaque, stacked: Sequence[Part]) -> list[Node]:
    """The nodes that read a stack as a slice."""
    first, last = stacked[0], stacked[-1]
    value, axis, step = first.value, first.axis, _step(stacked)
    shape = value.shape or ()
    to = _along(node, value)
    order = [a for a in range(len(shape)) if a != axis]
    order.insert(to, axis)
    if len(stacked) == shape[axis]:
        return [_view(node, value, order)]
    args = (Ref(value.name), axis, first.position, last.position + 1, step)
    cut = Value(node.output.name, value.dtype, (*shape[:axis], len(stacked), *shape[axis + 1 :]))
    if to == axis:
        return [replace(node, target=SLICE, args=args, kwargs=(), output=cut)]
    cut = replace(cut, name=f"{node.output.name}.slice")
    return [replace(node, target=SLICE, args=args, kwargs=(), output=cut), _view(node, cut, order)]


def _view(node: Opaque, value: Value, order: Sequence[int]) -> Network:
    """A network that puts some axes of a value in an order; those left out have size 1."""
    index = {axis: Index(f"d{axis}", (value.shape or ())[axis]) for axis in order}
    axes = tuple((index[axis],) if axis in index else () for axis in range(len(value.shape or ())))
    output = Tensor(node.output.name, tuple((index[axis],) for axis in order))
    return Network(node.name, (Term((Tensor(value.name, axes),)),), output, value.dtype, node.source)
