"""Values that have to lie in one order of modes, and the change of that order.

Operations on each element alone neither know nor change the order that the elements lie in. So the values that they
join are one *region*: its order is free where only networks write into it and only networks read what comes out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tncompile.ir import Dim, Network, Node, Opaque, Program, Tensor, dims, networks_of
from tncompile.ir.core import Axis, Index
from tncompile.ir.edit import map_networks, refine, substitute, substitute_tensor
from tncompile.passes.pointwise import joined

Order = tuple[int, ...]
"""The modes of a region, by their present places."""


@dataclass(frozen=True)
class Region:
    """Values of one shape whose modes lie in one order; the first of them in the program, and whether there are
    operations on each element alone among what makes them."""

    values: frozenset[str]
    first: str
    elementwise: bool

    def touches(self, node: Node) -> bool:
        """Whether a network or a switch writes or reads any of the values."""
        return not isinstance(node, Opaque) and not self.values.isdisjoint((node.value.name, *node.inputs))

    def mine(self, network: Network) -> Iterator[Tensor]:
        """The tensors of a network that are values of the region, its output among them."""
        return (t for t in (network.output, *network.operands) if t.name in self.values)


def regions(program: Program) -> list[Region]:
    """The regions of a program whose order is free.

    Besides the single ones, those that sums and products of whole networks join (``x[b, i] + y[b, i]``), as one:
    there both sides may have to change at once for anything to be gained.
    """
    join = _Join()
    fixed = {v.name for v in program.inputs} | {name for _, name in program.outputs}
    for node in program.nodes:
        join.add(node.value.name)
        if not isinstance(node, Opaque):
            moving = (t for n in networks_of(node) for t in n.moving)
            if any(t.steps is None or t.slices or t.windows for t in moving):
                fixed |= {node.value.name, *node.inputs}
            continue
        together = joined(node, program.values)
        if not together:
            fixed |= {node.value.name, *node.inputs}
        for name in together:
            join.union(node.value.name, name)
    closed = {join.root(name) for name in fixed if name in join}
    free = [group for group in join.groups() if join.root(group[0]) not in closed]
    one = {name: group[0] for group in free for name in group}
    wider = _Join()
    for group in free:
        wider.add(group[0])
    for node in program.nodes:
        for name in _as_they_are(node):
            if name in one and node.value.name in one:
                wider.union(one[node.value.name], one[name])
    members = {group[0]: group for group in free}
    several = [[n for first in group for n in members[first]] for group in wider.groups() if len(group) > 1]
    opaque = {node.output.name for node in program.nodes if isinstance(node, Opaque)}
    return [Region(frozenset(group), group[0], not opaque.isdisjoint(group)) for group in (*free, *several)]


def _as_they_are(node: Node) -> set[str]:
    """The operands whose modes lie as those of the result, in every case."""
    if isinstance(node, Opaque):
        return set()
    same = [{t.name for t in n.operands if t.axes == n.output.axes} for n in networks_of(node)]
    return set.intersection(*same)


class _Join:
    """Groups of names, joined pair by pair; each begins with the name that was added first."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}
        self.number: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.parent

    def add(self, name: str) -> None:
        self.number.setdefault(name, len(self.number))
        self.parent.setdefault(name, name)

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def union(self, a: str, b: str) -> None:
        self.add(a)
        self.add(b)
        first, second = sorted((self.root(a), self.root(b)), key=lambda name: self.number[name])
        self.parent[second] = first

    def groups(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.number:
            found.setdefault(self.root(name), []).append(name)
        return list(found.values())


# ------------------------------------------------------------------------------------ modes


@dataclass(frozen=True)
class Modes:
    """The modes of a region, one group for each axis of its values, and the program in whose networks every tensor of
    the region has just these."""

    axes: tuple[Axis, ...]
    program: Program

    @property
    def flat(self) -> Axis:
        """All modes, in row-major order."""
        return tuple(mode for axis in self.axes for mode in axis)

    @property
    def fixed(self) -> int:
        """How many modes in front stay there: those of run-time size where there are two or more, as their sizes would
        have to be computed in each call."""
        dynamic = [not dims.is_static(mode.size) for mode in self.flat]
        return 0 if sum(dynamic) < 2 else sum(1 for _ in itertools.takewhile(bool, dynamic))

    def orders(self, most: int) -> list[Order] | None:
        """Every other order of the modes that may move; None where these are more than `most`."""
        rest = range(self.fixed, len(self.flat))
        if len(rest) > most:
            return None
        return [(*range(self.fixed), *p) for p in itertools.permutations(rest) if p != tuple(rest)]

    def allowed(self, order: Order) -> Order:
        """An order with the modes that stay in front back there."""
        return (*range(self.fixed), *(place for place in order if place >= self.fixed))

    def grouped(self, order: Order) -> tuple[Order, ...]:
        """The axes for another order: as they were, where each keeps its modes; else one for each run-time size, and
        one for the static modes between."""
        ends = list(itertools.accumulate((len(axis) for axis in self.axes), initial=0))
        parts = [order[a:b] for a, b in itertools.pairwise(ends)]
        if all({*part} == {*range(a, b)} for part, (a, b) in zip(parts, itertools.pairwise(ends), strict=True)):
            return tuple(parts)
        runs: list[list[int]] = []
        for place in order:
            static = dims.is_static(self.flat[place].size)
            if static and runs and dims.is_static(self.flat[runs[-1][-1]].size):
                runs[-1].append(place)
            else:
                runs.append([place])
        return tuple(map(tuple, runs))


def modes_of(program: Program, region: Region) -> Modes:
    """Split the indices of the networks around a region until they name its modes alike. CannotEdit where the modes of
    two of them do not nest."""
    shape = program.values[region.first].shape or ()
    modes = Tensor("", tuple((Index(f"m{k}", size),) if size != 1 else () for k, size in enumerate(shape)))
    nodes = list(program.nodes)
    places = [k for k, node in enumerate(nodes) if region.touches(node)]
    while True:
        for network in (case for k in places for case in networks_of(nodes[k])):
            modes = _finer(modes, network, region)
        before = list(nodes)
        for k in places:
            nodes[k] = map_networks(nodes[k], partial(_split, modes=modes, region=region))
        if nodes == before:
            return Modes(modes.axes, replace(program, nodes=tuple(nodes)))


def _finer(modes: Tensor, network: Network, region: Region) -> Tensor:
    """The modes, split as far as the tensors of a network demand."""
    for tensor in region.mine(network):
        for axis in range(len(modes.axes)):
            splits, _ = refine(modes.axes[axis], tensor.axes[axis], {i.name for i in modes.indices})
            modes = substitute_tensor(modes, splits)
    return modes


def _split(network: Network, modes: Tensor, region: Region) -> Network:
    """The network, the first of its tensors that are coarser than the modes split; again until none is."""
    for tensor in region.mine(network):
        for axis, wanted in zip(tensor.axes, modes.axes, strict=True):
            splits, _ = refine(axis, wanted, network.indices)
            if splits:
                return _split(substitute(network, splits), modes, region)
    return network


# ------------------------------------------------------------------------------------ another order


def relaid(modes: Modes, region: Region, order: Order, reschedule: Callable[[Network], Network]) -> Program:
    """The program with the values of a region in another order of modes, and the networks around it scheduled anew."""
    groups = modes.grouped(order)
    shape = tuple(dims.product(modes.flat[place].size for place in group) for group in groups)

    def visit(node: Node) -> Node:
        if isinstance(node, Opaque):
            return _reshaped(node, shape) if node.output.name in region.values else node
        if not region.touches(node):
            return node
        return map_networks(node, lambda network: reschedule(turned(network, region, groups)))

    return replace(modes.program, nodes=tuple(map(visit, modes.program.nodes)))


def turned(network: Network, region: Region, groups: Sequence[Order]) -> Network:
    """A network whose tensors of a region have their modes, which are given by their places, in other groups."""

    def turn(tensor: Tensor) -> Tensor:
        if tensor.name not in region.values or tensor.is_core:
            return tensor
        return replace(tensor, axes=tuple(tuple(tensor.indices[place] for place in group) for group in groups))

    terms = tuple(replace(term, tensors=tuple(map(turn, term.tensors))) for term in network.terms)
    return replace(network, terms=terms, output=turn(network.output))


def _reshaped(node: Opaque, shape: tuple[Dim, ...]) -> Opaque:
    return replace(node, output=replace(node.output, shape=shape))
