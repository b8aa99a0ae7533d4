"""Contract nothing that is cut off afterwards, and no zeros that were put around a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.edit import fresh, unique_cores
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.clean import drop_dead
from tncompile.passes.picks import NOTHING, Picks, after, picks_of, zeros_of
from tncompile.passes.stacks import SLICE

WHY = "only what is read of it is computed"


@dataclass(frozen=True)
class Trim(Pass):
    """Take slices, rolls, flips and zeros around a value into the cores beside them.

    ```
    network f: f[b, k] = x[b, i] F[i, k]                      (a Fourier transform, of which few modes are kept)
    opaque s = aten.slice.Tensor(%f, 1, 0, 8)
    opaque p = aten.constant_pad_nd.default(%s, [0, 56])
    network y: y[b, o] = p[b, k] G[k, o]
    ->
    network s: s[b, k] = x[b, i] F'[i, k]                     F' = F[:, :8]
    network y: y[b, o] = s[b, k] G'[k, o]                     G' = G[:8]
    ```

    1. What is picked of a network's output along an axis of one index, which nothing else reads, is picked in each of
       its cores that have the index; of an operand that has it a slice is read, where the network does work.
    2. A network reads what a value was picked from where the index is summed, lies on no other operand, and all
       positions are still read: in its cores they are put in that order, and those that are 0 are dropped.
    3. Terms that are multiplied by zeros are dropped. (Here and in 2, weights are taken to be finite.)
    4. A core that others have too is not copied for the order of its positions alone.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        zeros = zeros_of(program)
        nodes = [_without(node, zeros, changes) for node in program.nodes] if zeros else [*program.nodes]
        done = replace(program, nodes=tuple(nodes))
        while True:
            before = len(changes)
            done = _readers(drop_dead(done, []), changes)
            done = _producers(drop_dead(done, []), changes)
            if len(changes) == before:
                break
        return (unique_cores(done) if changes else program), changes


def _without(node: Node, zeros: frozenset[str], changes: list[Change]) -> Node:
    """A network without the terms that are 0, where the others still give every size that is known at run time only."""
    if not isinstance(node, Network) or node.output.name in zeros:
        return node
    terms = tuple(t for t in node.terms if not any(o.name in zeros for o in t.operands))
    known = {name for term in terms for name in term.indices}
    lost = any(not isinstance(i.size, int) and i.name not in known for i in node.output.indices)
    if len(terms) == len(node.terms) or lost:
        return node
    changes.append(Change(node.output.name, f"dropped {len(node.terms) - len(terms)} terms", "they are 0 everywhere"))
    return replace(node, terms=terms)


def _all_picks(program: Program) -> dict[str, tuple[Picks, ...]]:
    """What every node picks of the value that it reads, and of what that was picked from in turn."""
    zeros, values = zeros_of(program), program.values
    found: dict[str, tuple[Picks, ...]] = {}
    for node in program.nodes:
        own = picks_of(node, values, zeros)
        if own is not None:
            deeper = (after(below, own) for below in found.get(own.source.name, ()))
            found[node.value.name] = (own, *(picks for picks in deeper if picks is not None))
    return found


def _shared(program: Program) -> frozenset[int]:
    """The arrays that several cores have, or a core and another node."""
    count = Counter(id(core.data) for network in program.networks for core in network.cores)
    count.update(map(id, program.weights.values()))
    return frozenset(array for array, uses in count.items() if uses > 1)


def _readers(program: Program, changes: list[Change]) -> Program:
    """Networks that read what their operands were picked from."""
    picks, shared = _all_picks(program), _shared(program)
    if not picks:
        return program
    nodes = []
    for node in program.nodes:
        while isinstance(node, Network) and (reader := _read_before(node, picks, shared)) is not None:
            node = reader
            changes.append(Change(node.output.name, "positions are picked in its cores", WHY))
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))


def _producers(program: Program, changes: list[Change]) -> Program:
    """Networks that compute what is picked of their outputs."""
    picks, shared = _all_picks(program), _shared(program)
    uses, shown = program.uses, {name for _, name in program.outputs}
    taken = {*program.values, *program.arrays}
    nodes: dict[str, Node] = {}
    for node in program.nodes:
        name = node.value.name
        nodes[name] = node
        if not isinstance(node, Opaque) or name not in picks:
            continue
        deepest = picks[name][-1]
        passed = [one.source.name for one in picks[name]]
        source = passed[-1]
        producer = nodes.get(source)
        if not isinstance(producer, Network) or any(uses.get(n, 0) != 1 or n in shown for n in passed):
            continue
        made = _made_so(producer, node, deepest, taken, shared)
        if made is not None:
            for gone in (*passed, name):
                del nodes[gone]
            nodes |= {new.value.name: new for new in made}
            changes.append(Change(name, f"positions are picked in the cores of {source}", WHY))
    return replace(program, nodes=tuple(nodes.values()))


# ------------------------------------------------------------------------------ what a network makes


def _made_so(
    network: Network, node: Opaque, picks: Picks, taken: set[str], shared: Collection[int]
) -> tuple[Node, ...] | None:
    """The nodes that compute what was picked of a network's output; None where that does not go, or gains nothing."""
    before: list[Node] = []
    slid = {name for term in network.terms for window in term.windows for name in window.names}
    for axis, positions in picks.along.items():
        (index, *more) = network.output.axes[axis] or (None,)
        if index is None or more or not positions or NOTHING in positions or index.name in slid:
            return None
        if len(positions) >= int(index.size) and _has(network.cores, index, shared):
            return None
        cut = _Cut(index, positions, node if network.cores else None, taken, before)
        try:
            output = cut.axes(network.output)
            terms = tuple(replace(t, tensors=tuple(map(cut.tensor, t.tensors))) for t in network.terms)
        except _Stays:
            return None
        network = replace(network, terms=terms, output=replace(network.output, axes=output))
    shown = tuple(a for k, a in enumerate(network.output.axes) if k != picks.dropped)
    return *before, replace(network, output=Tensor(node.output.name, shown))


def _has(cores: Sequence[Tensor], index: Index, shared: Collection[int]) -> bool:
    """Whether one of some cores has an index and an array that others have too."""
    return any(id(core.data) in shared and index in core.indices for core in cores)


class _Stays(Exception):
    """A tensor of which positions cannot be picked."""


@dataclass
class _Cut:
    """Picks `positions` of an index in the tensors of a network; of operands by slices `before` it, which come from the
    same place as the node `like`, where there is one."""

    index: Index
    positions: Sequence[int]
    like: Opaque | None
    taken: set[str]
    before: list[Node]

    def axes(self, tensor: Tensor) -> tuple[tuple[Index, ...], ...]:
        """The axes of a tensor of which the positions were picked."""
        if sum(i.name == self.index.name for i in tensor.indices) > 1:
            raise _Stays  # a diagonal
        new = Index(self.index.name, len(self.positions))
        return tuple(tuple(new if i.name == new.name else i for i in axis) for axis in tensor.axes)

    def tensor(self, tensor: Tensor) -> Tensor:
        """A core with the positions, or an operand that has them."""
        if self.index not in tensor.indices:
            return tensor
        axes = self.axes(tensor)
        return picked(tensor, self.index, self.positions) if tensor.is_core else self._operand(tensor, axes)

    def _operand(self, tensor: Tensor, axes: tuple[tuple[Index, ...], ...]) -> Tensor:
        axis = next((k for k, a in enumerate(tensor.axes) if [*a] == [self.index]), None)
        first, last = self.positions[0], self.positions[-1]
        step = self.positions[1] - first if len(self.positions) > 1 else 1
        if self.like is None or axis is None or step < 1 or [*self.positions] != [*range(first, last + 1, step)]:
            raise _Stays
        result = Tensor(fresh(f"{tensor.name}.part", self.taken), axes)
        self.taken.add(result.name)
        value = Value(result.name, self.like.output.dtype, result.shape)
        args = (Ref(tensor.name), axis, first, last + 1, step)
        self.before.append(Opaque(self.like.name, SLICE, args, (), value, self.like.source))
        return result


def picked(core: Tensor, index: Index, positions: Sequence[int], name: str = "") -> Tensor:
    """A core with some positions of an index, which may get another name."""
    new = Index(name or index.name, len(positions))
    axis = next(k for k, i in enumerate(core.indices) if i.name == index.name)
    data = np.ascontiguousarray(np.take(core.array(), positions, axis))
    axes = tuple((new if i.name == index.name else i,) for i in core.indices)
    return Tensor(f"{core.name.removesuffix('.part')}.part", axes, data, origins=core.sources)


# ------------------------------------------------------------------------------ what a network reads


def _read_before(network: Network, picks: Mapping[str, Sequence[Picks]], shared: Collection[int]) -> Network | None:
    """A network that reads what one of its operands was picked from; None where it reads none such."""
    for number, term in enumerate(network.terms):
        for position, operand in enumerate(term.tensors):
            for way in picks.get(operand.name, ()) if not operand.is_core else ():
                new = _term(network, term, position, way, shared)
                if new is not None:
                    return replace(network, terms=(*network.terms[:number], new, *network.terms[number + 1 :]))
    return None


def _term(network: Network, term: Term, position: int, picks: Picks, shared: Collection[int]) -> Term | None:
    """A term that reads the source of the picks at one position; None where its cores cannot do what they did."""
    if picks.dropped is not None:
        return None
    taken = {*network.indices}
    tensors = list(term.tensors)
    shape = picks.source.shape or ()
    for axis, positions in picks.along.items():
        operand = tensors[position]
        (index, *more) = operand.axes[axis] or (None,)
        if index is None or more or index.name in {i.name for i in network.output.indices} | term.slid:
            return None
        counts = [sum(i.name == index.name for i in t.indices) for t in tensors]
        cores = [k for k, t in enumerate(tensors) if counts[k] and t.is_core]
        order = {p: j for j, p in enumerate(positions) if p != NOTHING}
        kept = len(positions) - positions.count(NOTHING)
        if max(counts) > 1 or not cores or len(cores) + 1 < sum(counts) or not len(order) == kept == shape[axis]:
            return None
        if kept == len(positions) and _has([tensors[k] for k in cores], index, shared):
            return None
        new = Index(fresh(index.name, taken), len(order))
        taken.add(new.name)
        for k in cores:
            tensors[k] = picked(tensors[k], index, [order[p] for p in range(len(order))], new.name)
        tensors[position] = replace(operand, axes=(*operand.axes[:axis], (new,), *operand.axes[axis + 1 :]))
    tensors[position] = replace(tensors[position], name=picks.source.name)
    return replace(term, tensors=tuple(tensors))
