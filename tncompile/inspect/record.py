"""The program as plain JSON data, complete but for the numbers of weights and cores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tncompile.errors import SourceRef
from tncompile.inspect.bonds import bonds
from tncompile.ir.core import Array, Index, Node, Program, Switch, Tensor, Term
from tncompile.ir.opaque import Arg, Constant, Opaque, Ref, Value

FORMAT = "tncompile.program"
VERSION = 1

Record = dict[str, Any]


def to_json(program: Program) -> Record:
    """A program as dicts, lists, strings and numbers, ready for `json.dumps`.

    The keys are those of the IR's classes. A network's term lists its tensors with their parameters, its bonds
    (see `tncompile.inspect.bonds.Bond`) with the positions of the tensors they join, its `order` as nested
    lists of positions, the `slices` it is computed in, and its `steps`, or None before they are chosen. A switch
    lists its cases, networks that compute the same value, each with the sizes it serves. An index is meant by its
    name; sizes are numbers, or strings where symbolic. In arguments, ``{"ref": name}`` is a value or a weight,
    ``{"constant": spelling}`` something of torch's, ``{"float": "nan"}`` (or ``"inf"``, ``"-inf"``) a float
    that JSON does not have. Parameters count an array once however often it is used.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": [_value(v) for v in program.inputs],
        "outputs": [{"name": public, "value": name} for public, name in program.outputs],
        "weights": [
            {**_value(Value(name, str(array.dtype), array.shape)), **_size({name: array})}
            for name, array in program.weights.items()
        ],
        "nodes": [_node(n) for n in program.nodes],
        **_size(program.arrays),
    }


def _node(node: Node) -> Record:
    common = {
        "kind": type(node).__name__.lower(),
        "name": node.name,
        "value": _value(node.value),
        "reads": list(node.inputs),
        "source": _source(node.source),
    }
    if isinstance(node, Opaque):
        arguments = {"args": [_arg(a) for a in node.args], "kwargs": {k: _arg(v) for k, v in node.kwargs}}
        return {**common, "target": node.target, **arguments}
    if isinstance(node, Switch):
        cases = [{"serves": r, **_node(case)} for r, case in zip(node.ranges, node.cases, strict=True)]
        return {**common, "symbol": node.symbol, "limits": list(node.limits), "cases": cases}
    return {
        **common,
        "dtype": node.dtype,
        "output": _axes(node.output),
        "indices": [{"name": i.name, "size": i.size} for i in node.indices.values()],
        "terms": [_term(t, node.output.indices) for t in node.terms],
        **_size({t.name: t.data for t in node.cores if t.data is not None}),
    }


def _term(term: Term, output: Iterable[Index]) -> Record:
    steps = term.steps
    return {
        "tensors": [
            {
                "position": position,
                "name": tensor.name,
                "kind": "core" if tensor.is_core else "operand",
                **_axes(tensor),
                "parameters": 0 if tensor.data is None else tensor.data.size,
            }
            for position, tensor in enumerate(term.tensors)
        ],
        "bonds": [
            {
                "name": bond.index.name,
                "size": bond.index.size,
                "kind": bond.kind,
                "tensors": list(bond.tensors),
                "output": bond.is_open,
            }
            for bond in bonds(term, output)
        ],
        "order": _lists(term.order),
        "slices": [{"index": s.index, "count": s.count} for s in term.slices],
        "steps": None
        if steps is None
        else [
            {"number": number, "form": s.form, "left": s.left, "right": s.right, "order": list(s.order)}
            for number, s in enumerate(steps, start=len(term.tensors))
        ],
    }


def _axes(tensor: Tensor) -> Record:
    return {
        "indices": [i.name for i in tensor.indices],
        "axes": [[i.name for i in axis] for axis in tensor.axes],
        "shape": list(tensor.shape),
    }


def _size(arrays: dict[str, Array]) -> Record:
    return {
        "parameters": sum(a.size for a in arrays.values()),
        "bytes": sum(a.size * a.dtype.itemsize for a in arrays.values()),
    }


def _value(value: Value) -> Record:
    shape = None if value.shape is None else list(value.shape)
    return {"name": value.name, "dtype": value.dtype, "shape": shape}


def _source(source: SourceRef) -> Record | None:
    if source == SourceRef():
        return None
    return {"module": source.module, "file": source.file, "line": source.line, "code": source.code}


def _arg(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.name}
    if isinstance(arg, Constant):
        return {"constant": arg.spelling}
    if isinstance(arg, tuple):
        return [_arg(a) for a in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": float.__repr__(arg)}
    return arg


def _lists(tree: Any) -> Any:
    return [_lists(t) for t in tree] if isinstance(tree, tuple) else tree
