"""Families of nodes that compute the same of different values or with different cores, and what joining one makes of a
program."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Arg, Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.edit import CannotEdit, fresh, inline
from tncompile.passes.equals import Parts, in_order, join, selection, selections, structure
from tncompile.passes.fold import is_view
from tncompile.passes.pointwise import joined as pointwise_inputs
from tncompile.passes.stacks import Part

Family = Sequence[Network]
CAT = "aten.cat.default"


def seeds(program: Program) -> Iterator[Family]:
    """Families of networks that do work, none of which needs another of its own.

    First those that read the same values, or selections from the same value; then those of any values. Queries, keys
    and values of attention are left alone: ONNX Runtime must find them as they are.
    """
    parts = selections(program)
    attended = _attended(program)
    working = [n for n in program.networks if _works(n) and n.output.name not in attended]
    ancestors = _ancestors(program)
    for together in (True, False):
        groups: dict[object, list[Network]] = {}
        for network in working:
            key = (structure(network), _reads(network, parts) if together else None)
            groups.setdefault(key, []).append(network)
        for group in groups.values():
            for family in _antichains(group, ancestors):
                if len(family) > 1:
                    yield sorted(family, key=lambda n: _first_position(n, parts))


def _works(network: Network) -> bool:
    """Whether a network contracts anything: more than a view, a scale or a sum."""
    return any(len(t.tensors) > 1 and len(t.indices) > 1 and t.operands for t in network.terms) and any(
        index.name not in {i.name for i in network.output.indices} for index in network.indices.values()
    )


def _reads(network: Network, parts: Parts) -> object:
    return tuple(
        (parts[t.name].value.name, parts[t.name].axis) if t.name in parts else t.name for t in network.operands
    )


def _attended(program: Program) -> set[str]:
    """What torch's attention reads, or a softmax of products of two values and what it is multiplied by."""
    made = {node.value.name: node for node in program.nodes}
    found: set[str] = set()
    for node in program.nodes:
        if isinstance(node, Opaque) and "scaled_dot_product_attention" in node.target:
            found |= {*node.inputs}
        if isinstance(node, Network) and len({*node.inputs}) > 1:
            weights = [name for name in node.inputs if _is_softmax(made.get(name))]
            scores = [made.get(read) for name in weights for read in made[name].inputs]
            for pair in scores:
                if isinstance(pair, Network) and len({*pair.inputs}) > 1:
                    found |= {*pair.inputs, *node.inputs}
    return found


def _is_softmax(node: Node | None) -> bool:
    return isinstance(node, Opaque) and "softmax" in node.target


def _first_position(network: Network, parts: Parts) -> int:
    return next((parts[t.name].position for t in network.operands if t.name in parts), 0)


def _ancestors(program: Program) -> dict[str, frozenset[str]]:
    """The networks that each value needs."""
    found: dict[str, frozenset[str]] = {}
    for node in program.nodes:
        before = frozenset[str]().union(*(found.get(name, frozenset()) for name in node.inputs))
        found[node.value.name] = before | {node.value.name} if isinstance(node, Network) else before
    return found


def _antichains(group: Sequence[Network], ancestors: Mapping[str, frozenset[str]]) -> list[list[Network]]:
    """A group by how many of its networks each one waits for, one after the other."""
    depth: dict[str, int] = {}
    for network in group:
        name = network.output.name
        depth[name] = 1 + max((depth[a] for a in ancestors[name] if a in depth), default=-1)
    levels: dict[int, list[Network]] = {}
    for network in group:
        levels.setdefault(depth[network.output.name], []).append(network)
    return list(levels.values())


# ------------------------------------------------------------------------------------ joining


def joined(program: Program, family: Family, place: int) -> Program | None:
    """A program in which a family is one network, whose value has the new axis at `place`, and so is all that follows
    from it: what only maps, contracts or adds up the parts of that value."""
    new = _Rewriting(program)
    if not new.join(family, place):
        return None
    while new.step():
        pass
    return new.program


@dataclass
class _Rewriting:
    """A program while families of it are joined, one after the other; `made` are the values of joined networks."""

    program: Program

    def __post_init__(self) -> None:
        self.made: set[str] = set()

    def join(self, family: Family, place: int) -> bool:
        values = self.program.values
        name = fresh(f"{family[0].output.name}.all", values)
        done = join(family, selections(self.program), name, place, values)
        if done is None:
            return False
        self._replace({n.output.name: None for n in family}, (*done.nodes, done.network, *done.reads))
        self.made.add(name)
        return True

    def _replace(self, gone: Mapping[str, None], nodes: Sequence[Node]) -> None:
        kept = [node for node in self.program.nodes if node.value.name not in gone]
        self.program = in_order(replace(self.program, nodes=(*kept, *nodes)))

    def step(self) -> bool:
        """Join one more family of readers of what is joined already; whether there was one."""
        parts = {name: part for name, part in selections(self.program).items() if part.value.name in self.made}
        return self._map(parts) or self._network(parts) or self._sum(parts) or self._concatenation(parts)

    def _map(self, parts: Parts) -> bool:
        """An operation on each element alone of every part."""
        groups: dict[object, list[tuple[Part, Opaque]]] = {}
        for node in self.program.nodes:
            read = pointwise_inputs(node, self.program.values) if isinstance(node, Opaque) else ()
            if isinstance(node, Opaque) and len(read) == 1 and read[0] in parts and len(node.inputs) == 1:
                part = parts[read[0]]
                value = part.value
                args, kwargs = _arguments(node, read[0], value.name)
                groups.setdefault((node.target, repr(args), repr(kwargs)), []).append((part, node))
        for pairs in groups.values():
            part, first = pairs[0]
            shape = part.value.shape or ()
            if sorted(p.position for p, _ in pairs) != [*range(int(shape[part.axis]))]:
                continue
            args, kwargs = _arguments(first, next(iter(first.inputs)), part.value.name)
            name = fresh(f"{first.output.name}.all", self.program.values)
            whole = replace(first, args=args, kwargs=kwargs, output=Value(name, first.output.dtype, shape))
            reads = [selection(n.output, whole.output, p.axis, p.position, n) for p, n in pairs]
            self._replace({n.output.name: None for _, n in pairs}, (whole, *reads))
            self.made.add(name)
            return True
        return False

    def _network(self, parts: Parts) -> bool:
        """Networks that read the parts, each one of them."""
        groups: dict[object, list[Network]] = {}
        for node in self.program.nodes:
            if isinstance(node, Network) and any(t.name in parts for t in node.operands) and not is_view(node):
                groups.setdefault((structure(node), _reads(node, parts)), []).append(node)
        ancestors = _ancestors(self.program)
        for group in groups.values():
            for family in _antichains(group, ancestors):
                family = sorted(family, key=lambda n: _first_position(n, parts))
                if len(family) > 1 and self.join(family, 0):
                    return True
        return False

    def _sum(self, parts: Parts) -> bool:
        """Terms of one network, each of another part: one term, summed over the parts."""
        known = selections(self.program)
        for network in self.program.nodes:
            if not isinstance(network, Network) or len(network.terms) < 2:
                continue
            groups: dict[object, list[Term]] = {}
            for term in network.terms:
                if any(t.name in parts for t in term.operands):
                    single = replace(network, terms=(term,))
                    groups.setdefault((structure(single), _reads(single, known)), []).append(term)
            for group in groups.values():
                if len(group) < 2:
                    continue
                family = [replace(network, terms=(term,)) for term in group]
                done = join(family, known, network.output.name, 0, self.program.values, network.indices)
                if done is not None:
                    rest = [t for t in network.terms if not any(t is g for g in group)]
                    whole = replace(network, terms=(*done.network.terms, *rest))
                    self._replace({network.output.name: None}, (*done.nodes, whole))
                    return True
        return False

    def _concatenation(self, parts: Parts) -> bool:
        """All parts of a value, one after the other along an axis: a view."""
        for node in self.program.nodes:
            if not isinstance(node, Opaque) or node.target != CAT or not isinstance(node.args[0], tuple):
                continue
            found = [parts.get(a.name) if isinstance(a, Ref) else None for a in node.args[0]]
            known = [p for p in found if p is not None]
            axis = node.args[1] if len(node.args) > 1 else dict(node.kwargs).get("dim", 0)
            if len(known) < len(found) or not known or not isinstance(axis, int):
                continue
            value, at = known[0].value, known[0].axis
            shape = value.shape or ()
            if [(p.value.name, p.axis, p.position) for p in known] != [(value.name, at, k) for k in range(len(known))]:
                continue
            if shape[at] == len(known):
                self._replace({node.output.name: None}, (_merged(node, value, at, axis % (len(shape) - 1)),))
                return True
        return False


def multiplied_out(program: Program, known: Collection[str]) -> Program:
    """A program in which networks that are not `known` are put into the one network that reads each, biases and all.

    ``sum over n of g[b, n] · (h[n, b, k] W[n, k, o] + bias[n, o])``, a mixture of experts, becomes a term for the
    products and one for the biases, which `fold` leaves alone: what that costs is for who asks to weigh.
    """
    nodes: dict[str, Node] = {node.value.name: node for node in program.nodes}
    for name in [name for name in nodes if name not in known and program.uses[name] == 1]:
        producer = nodes[name]
        reader = next((n for n in nodes.values() if name in n.inputs), None)
        if isinstance(producer, Network) and isinstance(reader, Network):
            with contextlib.suppress(CannotEdit):
                nodes[reader.output.name] = inline(reader, producer)
                del nodes[name]
    return replace(program, nodes=tuple(nodes.values()))


def _merged(node: Opaque, value: Value, at: int, axis: int) -> Network:
    """The view of a value whose axis `at` is the outer part of the axis that is number `axis` without it."""
    indices = [Index(f"d{k}", size) for k, size in enumerate(value.shape or ())]
    others = [i for k, i in enumerate(indices) if k != at]
    axes = tuple((indices[at], i) if k == axis else (i,) for k, i in enumerate(others))
    term = Term((Tensor(value.name, tuple((i,) for i in indices)),))
    return Network(node.name, (term,), Tensor(node.output.name, axes), value.dtype, node.source)


def _arguments(node: Opaque, old: str, new: str) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    def visit(arg: Arg) -> Arg:
        if isinstance(arg, tuple):
            return tuple(map(visit, arg))
        return Ref(new) if isinstance(arg, Ref) and arg.name == old else arg

    return tuple(map(visit, node.args)), tuple((k, visit(v)) for k, v in node.kwargs)
