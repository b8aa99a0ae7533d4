"""Compiled ONNX files in fewer bits: each network as it is chosen, or all that can be.

The rounding is onnxruntime.quantization's. A key of a choice is the value of a network (``tncompile.network`` in the
metadata of its nodes), or the first output of another node that reads weights: an embedding table, an LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.runtime.quantized_finish import finish, store
from tncompile.runtime.quantized_graph import Constants, graphs_of, identity, read, subgraphs, written
from tncompile.runtime.quantized_names import Names
from tncompile.runtime.quantized_ranges import ranges
from tncompile.runtime.quantized_round import BITS, STORED, check_bits, simulated, stored_bytes
from tncompile.runtime.quantized_sheet import Ranges, Sheet, back, dynamic, four, static
from tncompile.runtime.quantized_sites import Site, sites
from tncompile.runtime.quantized_stored import Writer, eight_bit_rows, four_bit_rows

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["BITS", "STORED", "Reader", "quantizable", "quantize", "readers", "simulated", "stored_bytes", "whole"]

_CARRIERS = {
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
}
"""What ONNX Runtime computes in eight bits too, where all that flows in is in eight bits already."""

_MERGING = ("Add", "Mul", "Concat")  # all their inputs are data

Replacements = dict[str, list["NodeProto"]]


def quantizable(model: bytes) -> dict[str, tuple[str, ...]]:
    """What each network, and each other node that reads float32 weights, can be computed in, as `BITS` are ordered.

    A network of several nodes has a way that any of them has; the others then stay float32. Weights of less than 256
    numbers do not count, and more for what is smaller in the file alone. LoadError where the model cannot be read.
    """
    found: dict[str, set[str]] = {}
    for site in sites(Constants(read(model))):
        found.setdefault(site.key, set()).update(site.bits)
    return {key: tuple(b for b in BITS if b in bits) for key, bits in found.items()}


@dataclass(frozen=True)
class Reader:
    """A node that reads weights of so many `numbers`, made of some initializers, and what it can be computed in."""

    initializers: tuple[str, ...]
    numbers: int
    bits: tuple[str, ...]


def readers(model: bytes) -> dict[str, tuple[Reader, ...]]:
    """The nodes of each key of `quantizable`, in order of execution. LoadError where the model cannot be read."""
    constants = Constants(read(model))
    found: dict[str, list[Reader]] = {}
    for site in sites(constants):
        names = [source for name in site.weights.values() for source in sorted(constants.sources(name))]
        numbers = sum(math.prod(constants.shape(name)) for name in site.weights.values())
        found.setdefault(site.key, []).append(Reader(tuple(dict.fromkeys(names)), numbers, site.bits))
    return {key: tuple(nodes) for key, nodes in found.items()}


def quantize(model: bytes, choice: Mapping[str, str], calibration: Sequence[Mapping[str, Array]] = ()) -> bytes:
    """A model whose networks are computed as chosen: keys are those of `quantizable`, what is not named stays as it is.

    `calibration` has inputs by name, for ``int8-static``. Between two convolutions so computed, operations without
    weights that ONNX Runtime has in eight bits are computed so too. A weight that is smaller in the file alone stays
    float32 where another node reads it as such. Metadata stays, also on nodes that take the place of others. The same
    arguments give the same bytes. TNCompileError for an unknown key, for what it cannot be computed in, for missing or
    unfit calibration data.
    """
    proto = read(model)
    constants = Constants(proto)
    found = sites(constants)
    chosen = _chosen(found, choice)
    if not chosen:
        return model
    names = Names.of(proto)
    groups = _grouped(chosen)
    values = [value for group in groups if group.bits == "int8-static" for value in _flowing(group.nodes, constants)]
    seen = ranges(proto, [*dict.fromkeys(values)], calibration) if values else {}
    replaced: Replacements = {}
    for group in groups:
        replaced |= _computed(group, constants, seen, names)
    for graph in [*graphs_of(proto.graph)][::-1]:  # inner ones first, as what is put into a graph is a copy
        _rewrite(graph, replaced)
    store(proto, {site.key: bits for site, bits in chosen if bits in STORED}, names)
    finish(proto, names)
    return written(proto)


def whole(model: bytes, bits: str, calibration: Sequence[Mapping[str, Array]] = ()) -> bytes:
    """A model with all that can be in one way of `BITS`, as one would use onnxruntime.quantization by itself.

    With ``int8`` convolutions stay float32, as ONNX Runtime advises: computed so they are slower. With ``int8-static``
    tables and LSTMs are ``int8``. The model itself where nothing can be. TNCompileError as of `quantize`.
    """
    check_bits(bits)
    ways = (bits, "int8") if bits == "int8-static" else (bits,)
    known = quantizable(model)
    choice = {key: next((way for way in ways if way in can), "fp32") for key, can in known.items()}
    return quantize(model, choice, calibration)


def _chosen(found: Sequence[Site], choice: Mapping[str, str]) -> list[tuple[Site, str]]:
    """The sites that are to change, and to what."""
    ways: dict[str, set[str]] = {}
    for site in found:
        ways.setdefault(site.key, set()).update(site.bits)
    for key, bits in choice.items():
        check_bits(bits)
        if key not in ways:
            some = ", ".join([*ways][:5]) + (", …" if len(ways) > 5 else "")
            raise TNCompileError(f"nothing to quantize is called {key!r} in this model; it has {some or 'nothing'}")
        if bits not in ways[key]:
            known = ", ".join(b for b in BITS if b in ways[key])
            raise TNCompileError(f"{key} cannot be computed in {bits}, only in {known}")
    wanted = [(site, choice.get(site.key, "fp32")) for site in found]
    return [(site, bits) for site, bits in wanted if bits != "fp32" and bits in site.bits]


@dataclass(frozen=True)
class _Group:
    """Nodes of one graph that are computed in one way, and are quantized together."""

    graph: GraphProto
    bits: str
    nodes: Sequence[NodeProto]


def _grouped(chosen: Sequence[tuple[Site, str]]) -> list[_Group]:
    """The nodes that are not computed in float32 any more; a table and an LSTM are no part of what others are."""
    found: dict[tuple[int, str, str], tuple[GraphProto, list[NodeProto]]] = {}
    for site, bits in chosen:
        if bits not in STORED:
            kind = site.node.op_type if site.node.op_type in ("Gather", "LSTM") else ""
            found.setdefault((id(site.graph), bits, kind), (site.graph, []))[1].append(site.node)
    return [
        _Group(graph, bits, _carried(graph, nodes) if bits == "int8-static" else nodes)
        for (_, bits, _), (graph, nodes) in found.items()
    ]


def _computed(group: _Group, constants: Constants, seen: Ranges, names: Names) -> Replacements:
    """What takes the place of the nodes of a group."""
    if group.nodes[0].op_type == "Gather":
        return {identity(node): _table(node, group.bits, constants, names) for node in group.nodes}
    part = Sheet.of(group.nodes, _shown(group.graph, group.nodes), constants)
    ways: dict[str, Callable[[Sheet], ModelProto]]
    ways = {"int8": dynamic, "int8-static": partial(static, ranges=seen), "int4": four}
    return back(group.nodes, part, ways[group.bits](part), constants, names)


def _table(node: NodeProto, bits: str, constants: Constants, names: Names) -> list[NodeProto]:
    """A Gather whose table stays in fewer bits."""
    writer = Writer(node.name or identity(node), names, {p.key: p.value for p in node.metadata_props})
    write = eight_bit_rows if bits == "int8" else four_bit_rows
    write(writer, constants.array(node.input[0]), node.input[1], node.output[0])
    return writer.nodes


def _flowing(nodes: Sequence[NodeProto], constants: Constants) -> list[str]:
    """The values that nodes to be computed in eight bits read and compute."""
    return [
        name
        for node in nodes
        for name in (*(node.input if node.op_type in _MERGING else node.input[:1]), *node.output)
        if name not in constants
    ]


def _carried(graph: GraphProto, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, and what is computed of their results in eight bits all the same, in order."""
    wanted = {identity(node) for node in nodes}
    eight = {node.output[0] for node in nodes if node.op_type == "Conv"}
    found = []
    for node in graph.node:
        data = node.input if node.op_type in _MERGING else node.input[:1]
        carried = node.op_type in _CARRIERS and data and {*data} <= eight and len(node.output) == 1
        if carried:
            eight.add(node.output[0])
        if carried or identity(node) in wanted:
            found.append(node)
    return found


def _shown(graph: GraphProto, nodes: Sequence[NodeProto]) -> set[str]:
    """The values of some nodes that others read, or that the graph shows."""
    inside = {identity(node) for node in nodes}
    shown = {output.name for output in graph.output}
    for node in graph.node:
        shown |= set() if identity(node) in inside else {*node.input}
        for inner in (g for part in subgraphs(node) for g in graphs_of(part)):
            shown |= {o.name for o in inner.output} | {name for n in inner.node for name in n.input}
    return shown


def _rewrite(graph: GraphProto, replaced: Replacements) -> None:
    """Put what takes the place of nodes into a graph."""
    nodes = [new for node in graph.node for new in replaced.get(identity(node), [node])]
    if any(identity(node) in replaced for node in graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
