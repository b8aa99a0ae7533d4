"""The program as a networkx graph."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tncompile.inspect.bonds import bonds
from tncompile.ir.core import Axis, Network, Program, Switch, Term
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Opaque

if TYPE_CHECKING:
    import networkx


def to_networkx(program: Program) -> networkx.MultiDiGraph[str]:
    """A program as one multigraph of values, tensors and hyperedges.

    Nodes have a `kind`, and for `to_undirected` or drawing a `label`:

    - ``input``, ``opaque``, ``network``, ``switch`` (``value:NAME``): a value, with `name`, `dtype`, `shape`; a node
      also has `layer` and `source`, an opaque one `target`, a network `parameters`. The cases of a switch are
      networks ``value:NAME/RANGE`` that flow into it.
    - ``weight`` (``weight:NAME``): a weight that an opaque node reads, with `name`, `dtype`, `shape`, `parameters`.
    - ``output`` (``output:NAME``): an output of the program, with `name`.
    - ``core``, ``operand`` (``tensor:VALUE/TERM/POSITION``): a tensor of the network that computes VALUE, with
      `name`, `network`, `term`, `position`, `axes` (lists of index names), `shape`, `parameters`.
    - ``hyperedge`` (``index:VALUE/TERM/NUMBER``): an index with three ends or more, with `index`, `size`,
      `network`, `term`.

    Edges have a `kind` too:

    - ``flow``: a value goes into an operand, an opaque node or an output. Its direction counts.
    - ``bond``, ``trace`` (a loop), ``open`` (from a tensor to its network's value), ``hyperedge`` (to or from the
      hyperedge's node): an index, with `index` and `size`. The direction is from the lower position to the
      higher, then to the output, and means nothing.

    An index that is summed within one tensor is no edge.
    """
    import networkx

    graph = networkx.MultiDiGraph()
    for value in program.inputs:
        shaped = _shaped("input", value.name, value.dtype, value.shape)
        graph.add_node(f"value:{value.name}", label=value.name, **shaped)
    for name, array in program.weights.items():
        shaped = _shaped("weight", name, str(array.dtype), array.shape)
        graph.add_node(f"weight:{name}", label=name, **shaped, parameters=array.size)
    for node in program.nodes:
        here = f"value:{node.value.name}"
        shaped = _shaped(type(node).__name__.lower(), node.value.name, node.value.dtype, node.value.shape)
        graph.add_node(here, label=node.value.name, **shaped, layer=node.name, source=str(node.source))
        if isinstance(node, Opaque):
            graph.nodes[here]["target"] = node.target
            for name in node.inputs:
                origin = f"value:{name}" if name in program.values else f"weight:{name}"
                graph.add_edge(origin, here, kind="flow")
        elif isinstance(node, Switch):
            for serves, case in zip(node.ranges, node.cases, strict=True):
                name = f"{node.value.name}/{serves}"
                graph.add_node(f"value:{name}", label=serves, **shaped | {"kind": "network"}, layer=node.name)
                _add_network(graph, name, case)
                graph.add_edge(f"value:{name}", here, kind="flow")
        else:
            _add_network(graph, node.output.name, node)
    for public, name in program.outputs:
        graph.add_node(f"output:{public}", label=public, kind="output", name=public)
        graph.add_edge(f"value:{name}", f"output:{public}", kind="flow")
    return graph


def networkx_json(program: Program) -> str:
    """The graph of `to_networkx` as JSON text, for ``networkx.node_link_graph(data, edges="edges")``."""
    graph = to_networkx(program)
    # by hand, as node_link_data has changed its arguments and its keys from version to version
    data = {
        "directed": True,
        "multigraph": True,
        "graph": graph.graph,
        "nodes": [{**attributes, "id": node} for node, attributes in graph.nodes(data=True)],
        "edges": [
            {**attributes, "source": source, "target": target, "key": key}
            for source, target, key, attributes in graph.edges(keys=True, data=True)
        ],
    }
    return json.dumps(data, indent=1)


def _shaped(kind: str, name: str, dtype: str, shape: tuple[Dim, ...] | None) -> dict[str, Any]:
    return {"kind": kind, "name": name, "dtype": dtype, "shape": None if shape is None else list(shape)}


def _add_network(graph: Any, value: str, network: Network) -> None:
    cores = {t.name: t.data.size for t in network.cores if t.data is not None}
    graph.nodes[f"value:{value}"]["parameters"] = sum(cores.values())
    for number, term in enumerate(network.terms):
        _add_term(graph, value, number, term, network.output.indices)


def _add_term(graph: Any, value: str, number: int, term: Term, output: Axis) -> None:
    place = {"network": value, "term": number}

    def tensor_id(position: int) -> str:
        return f"tensor:{value}/{number}/{position}"

    for position, tensor in enumerate(term.tensors):
        graph.add_node(
            tensor_id(position),
            label=tensor.name,
            kind="core" if tensor.is_core else "operand",
            name=tensor.name,
            **place,
            position=position,
            axes=[[i.name for i in axis] for axis in tensor.axes],
            shape=list(tensor.shape),
            parameters=0 if tensor.data is None else tensor.data.size,
        )
        if not tensor.is_core:
            graph.add_edge(f"value:{tensor.name}", tensor_id(position), kind="flow")
    for count, bond in enumerate(bonds(term, output)):
        label = {"index": bond.index.name, "size": bond.index.size}
        ends = [tensor_id(p) for p in bond.tensors] + ([f"value:{value}"] if bond.is_open else [])
        if bond.kind == "hyperedge":
            middle = f"index:{value}/{number}/{count}"
            graph.add_node(middle, label=bond.index.name, kind="hyperedge", **label, **place)
            for end in ends:
                edge = (middle, end) if end.startswith("value:") else (end, middle)
                graph.add_edge(*edge, kind="hyperedge", **label)
        elif bond.kind != "sum":
            graph.add_edge(*ends, kind=bond.kind, **label)
