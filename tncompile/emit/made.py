"""Nodes that passes made, as ONNX, where no exporter writes the opaque ones of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir

from tncompile.errors import UnsupportedError
from tncompile.ir import Arg, Opaque, Ref, references

Values = Mapping[str, onnx_ir.Value]
"""The ONNX value for each of the program's."""


def made(item: Opaque, values: Values) -> list[onnx_ir.Node]:
    """The nodes for an opaque node that is in no file; the last one has its value.

    Passes make copies of operations on each element alone (`onnx.…`), and selections, slices and stacks (`aten.…`);
    the importer makes `onnx.Identity` of a weight that is an output.
    """
    domain, _, operator = item.target.partition(".")
    if domain == "onnx":
        inputs = [values[arg.name] if isinstance(arg, Ref) else None for arg in item.args]
        attributes: dict[str, Any] = dict(item.kwargs)
        return [_named(item, onnx_ir.node(operator, inputs, attributes))]
    if item.target not in _MADE:
        raise UnsupportedError(f"{item.target} cannot be written as ONNX")
    *before, last = _MADE[item.target](item, values)
    return [*before, _named(item, last)]


def _named(item: Opaque, node: onnx_ir.Node) -> onnx_ir.Node:
    node.name = f"{item.output.name}/{node.op_type}"
    node.outputs[0].name = item.output.name
    return node


def _constant(item: Opaque, name: str, numbers: Any) -> onnx_ir.Node:
    value = onnx_ir.tensor(numbers, dtype=onnx_ir.DataType.INT64)
    result = onnx_ir.Value(name=f"{item.output.name}/{name}")
    return onnx_ir.node("Constant", [], {"value": value}, outputs=[result], name=result.name)


def _read(item: Opaque, values: Values) -> list[onnx_ir.Value]:
    return [values[ref.name] for ref in references(item.args)]


def _select(item: Opaque, values: Values) -> Sequence[onnx_ir.Node]:
    _, axis, position = item.args
    index = _constant(item, "position", position)
    return [index, onnx_ir.node("Gather", [*_read(item, values), index.outputs[0]], {"axis": _integer(axis)})]


def _slice(item: Opaque, values: Values) -> Sequence[onnx_ir.Node]:
    _, axis, start, end, *rest = item.args
    limits = {"start": start, "end": end, "axis": axis, "step": rest[0] if rest else 1}
    constants = [_constant(item, name, [_integer(number)]) for name, number in limits.items()]
    return [*constants, onnx_ir.node("Slice", [*_read(item, values), *(c.outputs[0] for c in constants)])]


def _stack(item: Opaque, values: Values) -> Sequence[onnx_ir.Node]:
    axis = _constant(item, "axis", [_integer(item.args[1])])
    parts = [onnx_ir.node("Unsqueeze", [value, axis.outputs[0]]) for value in _read(item, values)]
    for number, part in enumerate(parts):
        part.name = part.outputs[0].name = f"{item.output.name}/Unsqueeze_{number}"
    return [axis, *parts, onnx_ir.node("Concat", [p.outputs[0] for p in parts], {"axis": _integer(item.args[1])})]


def _integer(arg: Arg) -> int:
    assert isinstance(arg, int)
    return arg


_MADE: Mapping[str, Callable[[Opaque, Values], Sequence[onnx_ir.Node]]] = {
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.stack.default": _stack,
}
