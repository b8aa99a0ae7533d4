"""Networks that are equal but for the values they read and the numbers in their cores, and the one that they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.core import NETWORK_DTYPES, same_array, sources_of
from tncompile.ir.edit import fresh
from tncompile.passes.stacks import SELECT, SLICE, STACK, Part, part_of

Parts = Mapping[str, Part]
"""The values that are one position along an axis of another value, by name."""


def selections(program: Program) -> dict[str, Part]:
    """The selections among the values of a program; the pass `stacks` makes them of what was unbound."""
    found = {}
    for node in program.nodes:
        if isinstance(node, Opaque) and node.output.dtype in NETWORK_DTYPES:
            part = part_of(node, program, {})
            if part is not None:
                found[node.output.name] = part
    return found


def structure(network: Network) -> object:
    """Equal for networks that compute the same from operands and cores of the same shapes, whatever their names."""
    number = {name: k for k, name in enumerate(network.indices)}
    terms = tuple(
        (tuple((t.is_core, t.form(number)) for t in term.tensors), tuple(w.form(number) for w in term.windows))
        for term in network.terms
    )
    return terms, network.output.form(number), network.dtype


@dataclass(frozen=True)
class Joined:
    """One network for several: `nodes` before it put together what it reads, `reads` take its value apart again."""

    nodes: tuple[Node, ...]
    network: Network
    reads: tuple[Opaque, ...]
    parts: Parts


def join(
    networks: Sequence[Network],
    parts: Parts,
    name: str,
    place: int,
    taken: Collection[str],
    indices: Collection[str] = (),
) -> Joined | None:
    """Networks of equal `structure` as one that has an index more, put at the axis `place` of its value `name`.

    ``y1[b, o] = x[b, i] W1[i, o]`` and ``y2[b, o] = x[b, i] W2[i, o]`` become ``y[n, b, o] = x[b, i] W[n, i, o]``,
    and y1 and y2 selections from it. An operand that is another one in each network is read as one slice where those
    are selections in even steps from one value, else stacked. `indices` are names that the new index must not have.
    None where the networks do not differ at all.
    """
    used = {*taken, name}
    site = Index(fresh("site", {*networks[0].indices, *indices}), len(networks))
    nodes: dict[tuple[str, ...], tuple[tuple[Node, ...], str, int]] = {}

    def tensor_of(same: Sequence[Tensor]) -> Tensor:
        first = same[0]
        if first.data is not None:
            return _core(same, site)
        names = tuple(t.name for t in same)
        if len({*names}) == 1:
            return first
        if names not in nodes:
            nodes[names] = _operand(same, parts, used, networks[0])
            used.update(node.value.name for node in nodes[names][0])
        _, value, axis = nodes[names]
        return Tensor(value, (*first.axes[:axis], (site,), *first.axes[axis:]))

    terms = []
    for k, term in enumerate(networks[0].terms):
        columns = zip(*(n.terms[k].tensors for n in networks), strict=True)
        terms.append(Term(tuple(map(tensor_of, columns)), term.order, windows=term.windows))
    if all(site.name not in term.indices for term in terms):
        return None
    first = networks[0].output
    output = Tensor(name, (*first.axes[:place], (site,), *first.axes[place:]))
    layers = [n for n in dict.fromkeys(n.name for n in networks) if n]
    label = layers[0] if len(layers) == 1 else "+".join(layers) if len(layers) <= 3 else f"{layers[0]}+...+{layers[-1]}"
    network = Network(label, tuple(terms), output, networks[0].dtype, networks[0].source)
    value = network.value
    return Joined(
        tuple(node for group, _, _ in nodes.values() for node in group),
        network,
        tuple(selection(n.value, value, place, k, n) for k, n in enumerate(networks)),
        {n.output.name: Part(value, place, k) for k, n in enumerate(networks)},
    )


def selection(part: Value, value: Value, axis: int, position: int, like: Node) -> Opaque:
    """The node that reads one position along an axis of a value."""
    return Opaque(like.name, SELECT, (Ref(value.name), axis, position), (), part, like.source)


def _core(same: Sequence[Tensor], site: Index) -> Tensor:
    """One core for several: their own where all are one, else a stack of them."""
    first = same[0]
    if all(same_array(first.data, t.data) for t in same[1:]):
        return replace(first, origins=sources_of(same))
    names = list(dict.fromkeys(t.name for t in same))
    name = "+".join(names) if len(names) <= 3 else f"{names[0]}+...+{names[-1]}"
    data = np.stack([t.data for t in same if t.data is not None])
    return Tensor(name, ((site,), *first.axes), data, origins=sources_of(same))


def _operand(
    same: Sequence[Tensor], parts: Parts, taken: Collection[str], like: Network
) -> tuple[tuple[Node, ...], str, int]:
    """The nodes that make one value of several, its name, and the axis along which they lie in it."""
    found = [parts.get(t.name) for t in same]
    known = [p for p in found if p is not None]
    even = len(known) == len(found) and len({(p.value.name, p.axis) for p in known}) == 1
    positions = [p.position for p in known]
    step = positions[1] - positions[0] if even else 0
    if not even or step <= 0 or positions != [*range(positions[0], positions[-1] + 1, step)]:
        shape = tuple(same[0].shape)
        stacked = Value(fresh(f"{like.output.name}.stack", taken), like.dtype, (len(same), *shape))
        refs = tuple(Ref(t.name) for t in same)
        return (Opaque(like.name, STACK, (refs, 0), (), stacked, like.source),), stacked.name, 0
    value, axis = known[0].value, known[0].axis
    shape = value.shape or ()
    if len(known) == shape[axis]:
        return (), value.name, axis
    name = fresh(f"{value.name}.from_{positions[0]}_by_{step}", taken)
    cut = Value(name, value.dtype, (*shape[:axis], len(known), *shape[axis + 1 :]))
    args = (Ref(value.name), axis, positions[0], positions[-1] + 1, step)
    return (Opaque(like.name, SLICE, args, (), cut, like.source),), name, axis


def in_order(program: Program) -> Program:
    """The same nodes, each after those whose values it reads, and else in the order they stood in."""
    made = {node.value.name: node for node in program.nodes}
    done: dict[str, Node] = {}
    for node in program.nodes:
        todo = [node]
        while todo:
            top = todo[-1]
            waiting = [made[n] for n in top.inputs if n in made and n not in done]
            if not waiting:
                done[top.value.name] = todo.pop()
            todo += reversed(waiting)
    return replace(program, nodes=tuple(done.values()))
