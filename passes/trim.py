"""Contract nothing that is cut off afterwards, and no zeros that were put around a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.edit import fresh, unique_cores
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.clean import drop_dead
from tncompile.passes.picks import NOTHING, Picks, picks_of, zeros_of
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
    3. Terms that are multiplied by zeros are dropped.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        before = program
        zeros = zeros_of(program)
        if zeros:
            program = replace(program, nodes=tuple(_without(node, zeros, changes) for node in program.nodes))
        while (found := _first(drop_dead(program, []))) is not None:
            program, change = found
            changes.append(change)
        return (unique_cores(drop_dead(program, [])) if changes else before), changes


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


def _first(program: Program) -> tuple[Program, Change] | None:
    """The program with one node taken into the cores of a network; None where there is none left."""
    zeros, values, uses = zeros_of(program), program.values, program.uses
    shown = {name for _, name in program.outputs}
    made = {node.value.name: node for node in program.nodes}
    picks = {name: found for name, node in made.items() if (found := picks_of(node, values, zeros)) is not None}
    for node in program.nodes:
        name = node.value.name
        if isinstance(node, Network):
            reader = _read_before(node, picks)
            if reader is not None:
                return _with(program, {name: (reader,)}), Change(name, "positions are picked in its cores", WHY)
        elif isinstance(node, Opaque) and name in picks:
            source = picks[name].source.name
            producer = made.get(source)
            if isinstance(producer, Network) and uses[source] == 1 and source not in shown:
                nodes = _made_so(producer, node, picks[name], {*values, *program.arrays})
                if nodes is not None:
                    done = _with(program, {source: (), name: nodes})
                    return done, Change(name, f"positions are picked in the cores of {source}", WHY)
    return None


def _with(program: Program, instead: Mapping[str, Sequence[Node]]) -> Program:
    nodes = (new for node in program.nodes for new in instead.get(node.value.name, (node,)))
    return replace(program, nodes=tuple(nodes))


# ------------------------------------------------------------------------------ what a network makes


def _made_so(network: Network, node: Opaque, picks: Picks, taken: set[str]) -> tuple[Node, ...] | None:
    """The nodes that compute what was picked of a network's output; None where that does not go, or gains nothing."""
    before: list[Node] = []
    slid = {name for term in network.terms for window in term.windows for name in window.names}
    for axis, positions in picks.along.items():
        (index, *more) = network.output.axes[axis] or (None,)
        if index is None or more or NOTHING in positions or index.name in slid:
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
        axes = self.axes(tensor)
        if axes == tensor.axes and self.index not in tensor.indices:
            return tensor
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


def _read_before(network: Network, picks: Mapping[str, Picks]) -> Network | None:
    """A network that reads what one of its operands was picked from; None where it reads none such."""
    for number, term in enumerate(network.terms):
        for position, operand in enumerate(term.tensors):
            if not operand.is_core and operand.name in picks:
                new = _term(network, term, position, picks[operand.name])
                if new is not None:
                    return replace(network, terms=(*network.terms[:number], new, *network.terms[number + 1 :]))
    return None


def _term(network: Network, term: Term, position: int, picks: Picks) -> Term | None:
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
        new = Index(fresh(index.name, taken), len(order))
        taken.add(new.name)
        for k in cores:
            tensors[k] = picked(tensors[k], index, [order[p] for p in range(len(order))], new.name)
        tensors[position] = replace(operand, axes=(*operand.axes[:axis], (new,), *operand.axes[axis + 1 :]))
    tensors[position] = replace(tensors[position], name=picks.source.name)
    return replace(term, tensors=tuple(tensors))
