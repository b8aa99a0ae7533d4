"""The program as a Graphviz drawing."""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Iterator, Sequence

from tncompile.errors import SourceRef
from tncompile.inspect.bonds import Bond, bonds, levels
from tncompile.ir.core import Axis, Index, Network, Program, Switch, Tensor, Term
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Opaque, Value

HEADER = """\
digraph program {
  graph [fontname="Helvetica", fontsize=12, rankdir=TB, nodesep=0.35, ranksep=0.45, forcelabels=true];
  node [fontname="Helvetica", fontsize=10, style=filled, color="#78909c", fillcolor="#eceff1"];
  edge [fontname="Helvetica", fontsize=9, color="#607d8b", fontcolor="#37474f"];
"""
VALUE = 'shape=box, style="filled,rounded", fillcolor="#e8f5e9", color="#43a047"'
OPERAND = 'shape=box, fillcolor="#e3f2fd", color="#1e88e5"'
RESULT = 'shape=box, fillcolor="#bbdefb", color="#1e88e5"'
CORE = 'shape=circle, margin="0.02", fillcolor="#ffe0b2", color="#fb8c00"'
OPAQUE = 'shape=box, fillcolor="#eeeeee", color="#9e9e9e"'
HYPEREDGE = 'shape=point, width=0.09, fontsize=9, fontcolor="#37474f", color="#455a64", fillcolor="#455a64"'
NETWORK = 'style="rounded,filled", color="#b0bec5", fillcolor="#fafafa", labeljust=l, fontcolor="#455a64"'
TERM = 'style="rounded,dashed", color="#b0bec5", labeljust=l, fontcolor="#78909c", fontsize=10'
FLOW = 'color="#43a047", penwidth=1.6, arrowsize=0.8'


def to_dot(program: Program) -> str:
    """A program in Graphviz's language, for ``dot -Tsvg``.

    Each network is a cluster, each of its terms one inside where there are several. Cores are circles,
    operands and the result boxes, bonds edges named ``index:size``, hyperedges points. Green arrows are the
    data flow, grey boxes opaque nodes with the weights they read.
    """
    ids = {name: f"v{number}" for number, name in enumerate(program.values)}
    body: list[str] = []
    for value in program.inputs:
        body.append(_node(ids[value.name], [value.name, _typed(value)], VALUE))
    for node in program.nodes:
        if isinstance(node, Opaque):
            body += _opaque(node, ids, program)
        elif isinstance(node, Switch):
            body += _switch(node, ids)
        else:
            body += _network(node, ids, ids[node.output.name])
    for number, (public, name) in enumerate(program.outputs):
        body.append(_node(f"o{number}", [public], VALUE))
        body.append(f"{ids[name]} -> o{number} [{FLOW}];")
    return HEADER + "".join(f"  {line}\n" for line in body) + "}\n"


def quote(text: str) -> str:
    """A string of Graphviz's that shows `text` as it is."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") + '"'


def _lines(lines: Sequence[str]) -> str:
    return '"' + "\\n".join(quote(line)[1:-1] for line in lines if line) + '"'


def _node(identifier: str, label: Sequence[str], style: str, tooltip: str = "") -> str:
    tip = f", tooltip={quote(tooltip)}" if tooltip else ""
    return f"{identifier} [label={_lines(label)}, {style}{tip}];"


def _shape(shape: Sequence[Dim]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _typed(value: Value) -> str:
    return value.dtype if value.shape is None else f"{value.dtype} {_shape(value.shape)}"


def _axes(tensor: Tensor) -> str:
    groups = (" ".join(i.name for i in axis) for axis in tensor.axes)
    return ", ".join(g if len(axis) == 1 else f"({g})" for g, axis in zip(groups, tensor.axes, strict=True))


def _sized(index: Index) -> str:
    return index.name if index.name == index.size else f"{index.name}:{index.size}"


def _tooltip(source: SourceRef) -> str:
    return "" if source == SourceRef() else f"{source}  {source.code}".rstrip()


def _opaque(node: Opaque, ids: dict[str, str], program: Program) -> Iterator[str]:
    here = ids[node.value.name]
    reads = [name for name in node.inputs if name not in ids]
    weights = [f"{name} {_shape(program.weights[name].shape)}" for name in reads if name in program.weights]
    yield _node(here, [node.target, *weights, _typed(node.output)], OPAQUE, _tooltip(node.source) or node.value.name)
    for name in node.inputs:
        if name in ids:
            yield f"{ids[name]} -> {here} [{FLOW}];"


def _switch(switch: Switch, ids: dict[str, str]) -> Iterator[str]:
    """Every case as a network of its own, joined where the value is."""
    here = ids[switch.value.name]
    yield _node(here, [switch.value.name, _typed(switch.value)], RESULT, switch.value.name)
    for number, (serves, case) in enumerate(zip(switch.ranges, switch.cases, strict=True)):
        yield from _network(case, ids, f"{here}_c{number}")
        yield f"{here}_c{number} -> {here} [{FLOW}, label={quote(f' {switch.symbol} {serves} ')}];"


def _network(network: Network, ids: dict[str, str], here: str) -> Iterator[str]:
    place = network.source
    origin = f"  ({os.path.basename(place.file)}:{place.line})" if place.file else ""
    yield f"subgraph cluster_{here} {{"
    tip = quote(_tooltip(place) or network.label)
    yield f"  graph [label={quote(network.label + origin)}, {NETWORK}, tooltip={tip}];"
    stem = _stem([t.name for t in network.cores])
    for number, term in enumerate(network.terms):
        inside = list(_term(f"{here}_{number}", term, network.output.indices, stem))
        if len(network.terms) > 1:
            title = f"term {number}" if number == 0 else f"+ term {number}"
            yield f"  subgraph cluster_{here}_{number} {{"
            yield f"    graph [label={quote(title)}, {TERM}];"
            yield from (f"    {line}" for line in inside)
            yield "  }"
        else:
            yield from (f"  {line}" for line in inside)
    result = [network.output.name, f"[{_axes(network.output)}]", _typed(network.value)]
    yield "  " + _node(here, result, RESULT, network.output.name)
    # outside the terms' clusters, which would otherwise draw the result into them
    for number, term in enumerate(network.terms):
        yield from (f"  {line}" for line in _edges(f"{here}_{number}", here, term, network.output.indices))
    yield "}"
    for number, term in enumerate(network.terms):
        for position, tensor in enumerate(term.tensors):
            if not tensor.is_core:
                yield f"{ids[tensor.name]} -> {here}_{number}_t{position} [{FLOW}];"


def _term(prefix: str, term: Term, output: Axis, stem: str) -> Iterator[str]:
    """The nodes of a term; cores as far from the operands as one another stand side by side."""
    level = levels(term)
    for position, tensor in enumerate(term.tensors):
        here = f"{prefix}_t{position}"
        about = f"{tensor.name} [{_axes(tensor)}] {_shape(tensor.shape)}"
        if tensor.is_core:
            yield _node(here, _core_lines(tensor.name.removeprefix(stem)), CORE, about)
        else:
            yield _node(here, [tensor.name, f"[{_axes(tensor)}]"], OPERAND, about)
    for number, bond in enumerate(bonds(term, output)):
        if bond.kind == "hyperedge":
            yield f'{prefix}_i{number} [label="", xlabel={quote(_sized(bond.index))}, {HYPEREDGE}];'
    for depth in sorted({*level.values()}):
        row = [f"{prefix}_t{p}" for p, d in level.items() if d == depth]
        if len(row) > 1:
            yield f"{{ rank=same; {'; '.join(row)}; }}"


def _core_lines(name: str) -> list[str]:
    """The lines in a core's circle; of a core merged from many, only how many (the tooltip has the names)."""
    merged = name.split("*")
    if len(merged) > 3:
        return [f"{len(merged)} cores", "merged"]
    return re.split(r"\*|(?<=\w)\.(?=\w)", name)


def _edges(prefix: str, result: str, term: Term, output: Axis) -> Iterator[str]:
    level = levels(term)
    found = bonds(term, output)
    for number, bond in enumerate(found):
        yield from _bond(prefix, result, number, bond, level)
    # a term without open indices still belongs to the result; the rest keeps the result below every core
    style = "invis" if any(bond.is_open for bond in found) else "dotted"
    for position, depth in level.items():
        if depth == max(level.values()):
            yield f"{prefix}_t{position} -> {result} [dir=none, style={style}];"


def _bond(prefix: str, result: str, number: int, bond: Bond, level: dict[int, int]) -> Iterator[str]:
    """The edges of an index, drawn downwards: from the operands to the result."""
    ends = sorted(bond.tensors, key=lambda p: (level[p], p))
    tensors = [f"{prefix}_t{p}" for p in ends]
    if bond.kind == "hyperedge":
        middle = f"{prefix}_i{number}"
        for position, tensor in zip(ends, tensors, strict=True):
            above = level[position] == level[ends[0]]
            yield f"{tensor} -> {middle} [dir=none];" if above else f"{middle} -> {tensor} [dir=none];"
        if bond.is_open:
            yield f"{middle} -> {result} [dir=none];"
    elif bond.kind != "sum":
        first, second = [*tensors, *([result] if bond.is_open else [])]
        # the blanks keep the label off the line; Graphviz 2.43 fails on some labels within a rank
        beside = bond.kind == "bond" and level[ends[0]] == level[ends[1]]
        label = quote(f" {_sized(bond.index)} ")
        yield f"{first} -> {second} [dir=none, {'minlen=2, xlabel' if beside else 'label'}={label}];"


def _stem(names: Sequence[str]) -> str:
    """The dotted beginning that all names share."""
    paths = [name.split("*")[0].split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)
