"""Weights that a node reads as they are: recurrent layers, and tables of ONNX models.

Their cores are contracted when the model is loaded: the file is smaller, what runs stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from tncompile.ir import Index, Opaque, Program, Ref, Tensor
from tncompile.ir.opaque import Arg, references

_TORCH_CELLS = ("aten.lstm.input", "aten.gru.input")
_ONNX_CELLS = ("onnx.LSTM", "onnx.GRU", "onnx.RNN")
_GATHER = "onnx.Gather"
_FOLDED = {"torch": 8192, "onnx": 4096}
"""Numbers up to which such a weight would be dense in the file: torch's exporter puts the matrices of a small cell
together, and little that nodes of an ONNX model read is computed at once."""


@dataclass(frozen=True)
class Held:
    """A weight that a node holds: the axes of it that are contracted, and what they are contracted with.

    `tensor` is the value that is read, with an index for each axis, of which the weight contracts `read`; both are None
    where the graph does not show it, and for a table, of which `rows` is the value that has the numbers of the rows.
    """

    weight: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    output: str
    tensor: Tensor | None = None
    read: Index | None = None
    rows: str | None = None


def held(program: Program) -> Iterator[Held]:
    """What the nodes of a program hold, in order of execution, a weight as often as it is read."""
    readers = _first_results(program)
    for node in program.nodes:
        if not isinstance(node, Opaque):
            continue
        if node.target in _TORCH_CELLS:
            yield from _torch_cell(node, program, readers.get(node.output.name))
        elif node.target in _ONNX_CELLS:
            yield from _onnx_cell(node, program)
        elif node.target == _GATHER:
            yield from _table(node, program)


def _torch_cell(node: Opaque, program: Program, result: str | None) -> Iterator[Held]:
    """``lstm(x, state, [w_ih, w_hh, biases ..] of each layer and direction, ...)``; weights are [gates·out, in].

    The first layer reads x; the states of the last one are the result. What is between is not shown. Small matrices are
    left out: the file would have them dense.
    """
    matrices = [r.name for r in references(node.args[2]) if _is_large(r.name, program, 2, 0)]
    layers, both = node.args[4], node.args[7]
    if not isinstance(layers, int) or len(matrices) != 2 * layers * (2 if both else 1):
        return  # with a projection there is a third matrix each
    width = len(matrices) // layers
    for number, weight in enumerate(matrices):
        recurrent = number % 2 == 1
        value = None
        if number < width and not recurrent:
            value = _name(node.args[0])
        elif number >= len(matrices) - width and recurrent:
            value = result
        if _is_large(weight, program, 2, _FOLDED["torch"]):
            yield _contracting(program, weight, 2, value, node.output.name)


def _onnx_cell(node: Opaque, program: Program) -> Iterator[Held]:
    """``LSTM(x, W, R, ...)``: weights are [directions, gates·out, in]."""
    for position, value in ((1, _name(node.args[0])), (2, None)):
        weight = _name(node.args[position])
        if _is_large(weight, program, 3, _FOLDED["onnx"]):
            yield _contracting(program, weight, 3, value, node.output.name)


def _table(node: Opaque, program: Program) -> Iterator[Held]:
    weight, rows = _name(node.args[0]), _name(node.args[1])
    axis = dict(node.kwargs).get("axis", 0)
    large = _is_large(weight, program, 2, _FOLDED["onnx"])
    if large and weight is not None and rows is not None and rows in program.values and axis == 0:
        yield Held(weight, (0,), (1,), node.output.name, rows=rows)


def _is_large(weight: str | None, program: Program, rank: int, least: int) -> TypeGuard[str]:
    """Whether an argument is a weight of so many axes and more than `least` numbers."""
    array = program.weights.get(weight) if weight is not None else None
    return array is not None and array.ndim == rank and array.size > least


def _contracting(program: Program, weight: str, rank: int, value: str | None, output: str) -> Held:
    """A weight whose last axis is contracted with the last one of a value: of two directions, with each half of it."""
    size = program.weights[weight].shape[-1]
    outs = tuple(range(rank - 1))
    shape = program.values[value].shape if value in program.values and value is not None else None
    last = shape[-1] if shape else None
    if not shape or value is None or not isinstance(last, int) or last % size:
        return Held(weight, (rank - 1,), outs, output)
    read = Index("in", size)
    axes = [(Index(f"row{k}", n),) for k, n in enumerate(shape[:-1])]
    whole = (read,) if last == size else (Index("direction", last // size), read)
    return Held(weight, (rank - 1,), outs, output, Tensor(value, (*axes, whole)), read)


def _first_results(program: Program) -> Mapping[str, str]:
    """The value that takes the first of several results, by what gives them."""
    return {
        name: node.output.name
        for node in program.nodes
        if isinstance(node, Opaque) and node.target == "operator.getitem" and node.args[1:] == (0,)
        if (name := _name(node.args[0])) is not None
    }


def _name(arg: Arg) -> str | None:
    return arg.name if isinstance(arg, Ref) else None
