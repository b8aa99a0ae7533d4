"""Chunks and slices of equal width as selections: a view splits their axis, and each is one position along it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.core import NETWORK_DTYPES
from tncompile.ir.edit import fresh
from tncompile.ir.opaque import Arg
from tncompile.passes.equals import selection
from tncompile.passes.stacks import GETITEM, SLICE

_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")


@dataclass(frozen=True)
class Piece:
    """`width` elements along an axis of a value, from ``position * width`` on."""

    value: Value
    axis: int
    width: int
    position: int


def as_selections(program: Program) -> Program:
    """``x[:, 32:64]`` read as position 1 of the second axis of ``x[b, (n c)]`` with c of 32."""
    splits = {n.output.name: n for n in program.nodes if isinstance(n, Opaque) and n.target in _SPLITS}
    pieces = {
        node.output.name: piece
        for node in program.nodes
        if isinstance(node, Opaque) and (piece := _piece(node, program, splits)) is not None
    }
    views: dict[tuple[str, int, int], Network] = {}
    nodes: list[Node] = []
    for node in program.nodes:
        piece = pieces.get(node.value.name)
        if piece is None:
            nodes.append(node)
            continue
        key = (piece.value.name, piece.axis, piece.width)
        if key not in views:
            taken = {*program.values, *(view.output.name for view in views.values())}
            views[key] = _split(piece, fresh(f"{piece.value.name}.by_{piece.width}", taken), node)
            nodes.append(views[key])
        if piece.width > 1:
            nodes.append(selection(node.value, views[key].value, piece.axis, piece.position, node))
        else:
            nodes += _unit(node, views[key].value, piece)
    return replace(program, nodes=tuple(nodes))


def _piece(node: Opaque, program: Program, splits: dict[str, Opaque]) -> Piece | None:
    """What a slice or an element of a split reads, where all pieces of that width fill their axis."""
    read: Arg
    if node.target == GETITEM and isinstance(node.args[0], Ref) and node.args[0].name in splits:
        source = splits[node.args[0].name]
        sizes = source.args[1]
        if isinstance(sizes, tuple) and len({*sizes}) > 1:
            return None
        read, axis = source.args[0], source.args[2] if len(source.args) > 2 else dict(source.kwargs).get("dim", 0)
        counted, first = True, node.args[1]
    elif node.target == SLICE and len(node.args) == 4:
        read, axis, first, _ = node.args
        counted, first = False, 0 if first is None else first
    else:
        return None
    value = program.values.get(read.name) if isinstance(read, Ref) else None
    shape, cut = (value.shape if value else None), node.output.shape
    if value is None or shape is None or cut is None or not isinstance(axis, int) or value.dtype not in NETWORK_DTYPES:
        return None
    axis %= len(shape)
    size, width = shape[axis], cut[axis]
    if not isinstance(size, int) or not isinstance(width, int) or not 0 < width < size or size % width:
        return None
    if not isinstance(first, int):
        return None
    if counted:
        return Piece(value, axis, width, first)
    start = first if first >= 0 else max(first + size, 0)
    return None if start % width else Piece(value, axis, width, start // width)


def _split(piece: Piece, name: str, like: Node) -> Network:
    """The view of a value with the axis of its pieces in two: which piece, and where in it."""
    shape = piece.value.shape or ()
    axes = tuple((Index(f"d{k}", size),) for k, size in enumerate(shape))
    parts = (Index("piece", int(shape[piece.axis]) // piece.width), Index("width", piece.width))
    inner = parts if piece.width > 1 else parts[:1]
    read = (*axes[: piece.axis], inner, *axes[piece.axis + 1 :])
    shown = (*axes[: piece.axis], *((i,) for i in inner), *axes[piece.axis + 1 :])
    term = Term((Tensor(piece.value.name, read),))
    return Network(like.name, (term,), Tensor(name, shown), piece.value.dtype, like.source)


def _unit(node: Node, view: Value, piece: Piece) -> tuple[Node, Node]:
    """A slice of one element: a selection, and the axis of size 1 that it left."""
    shape = view.shape or ()
    part = Value(f"{node.value.name}.at", view.dtype, (*shape[: piece.axis], *shape[piece.axis + 1 :]))
    axes: list[tuple[Index, ...]] = [(Index(f"d{k}", size),) for k, size in enumerate(part.shape or ())]
    term = Term((Tensor(part.name, tuple(axes)),))
    output = Tensor(node.value.name, (*axes[: piece.axis], (), *axes[piece.axis :]))
    network = Network(node.name, (term,), output, view.dtype, node.source)
    return selection(part, view, piece.axis, piece.position, node), network
