"""Equal sites of one network: parts of a chain, a tree or a grid that are computed at once, and what is left then."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tncompile.cost.search import optimal
from tncompile.ir import Network, Node, Tensor, Term
from tncompile.ir.edit import drop_tensors, fresh, outside
from tncompile.passes.base import Context
from tncompile.passes.equals import Parts, join, structure
from tncompile.passes.worth import Seconds, Worth, gains, ratio, total

Cell = tuple[int, ...]
"""Positions of tensors in a term; those of all cells of a family play the same parts in the same order."""

LARGEST = 8
"""Sites that one cell may have: what `order` then searches has two tensors for each."""
FEWEST = 3
"""Cells that are worth a look: fewer are as fast one by one."""


@dataclass(frozen=True)
class State:
    """A network, of one term with operands, and the nodes before it that compute its equal parts."""

    network: Network
    nodes: tuple[Node, ...]
    parts: Parts

    @property
    def position(self) -> int:
        """Of the term that has operands."""
        return next(k for k, term in enumerate(self.network.terms) if not term.is_constant)

    @property
    def term(self) -> Term:
        """The term that has operands."""
        return self.network.terms[self.position]


class Levels:
    """Looks for the levels of equal cells by which a network is computed fastest.

    The chain of a matrix product state over 64 pixels: its sites contracted with their cores in one network, their
    products by twos in the next, and so on; or the first level by fours at once; or the rest of any level one
    after the other. All of those are paths through the same states, whose networks are priced.
    """

    def __init__(self, worth: Worth, taken: Collection[str]) -> None:
        self.worth = worth
        self.context: Context = worth.context
        self.taken = {*taken}

    def best(self, start: State) -> tuple[State, Seconds, Seconds]:
        """The state to end in, what the start is predicted to take, and what that does."""
        before = self._rest(start)
        self._best: tuple[float, State, Seconds] = (1.0, start, before)
        self._seen: dict[object, float] = {}
        self._follow(start, before, self.worth.nothing)
        _, state, after = self._best
        return state, before, after

    def _follow(self, state: State, before: Seconds, spent: Seconds) -> None:
        for cells in sorted(families(state), key=lambda cells: -len(cells[0])):  # good ways soon, to prune others by
            joined = self.joined(state, cells)
            if joined is None:
                continue
            following, new = joined
            now = total(spent, self.worth.nodes(new))
            key, so_far = structure(following.network), ratio(before, now)
            if so_far >= min(self._best[0], self._seen.get(key, float("inf"))):
                continue  # as far as this for less, or the whole of it
            self._seen[key] = so_far
            seconds = total(now, self._rest(following))
            if ratio(before, seconds) < self._best[0] and gains(before, seconds, 0.0):
                self._best = (ratio(before, seconds), following, seconds)
            self._follow(following, before, now)

    def _rest(self, state: State) -> Seconds:
        """Seconds of a state's network, with the selections that it reads."""
        reads = {t.name: t for t in state.term.operands if t.name in state.parts}
        moves = (self.worth.move(t.shape, state.network.dtype) for t in reads.values())
        return total(self.worth.node(state.network), *moves)

    def joined(self, state: State, cells: Sequence[Cell]) -> tuple[State, tuple[Node, ...]] | None:
        """The state in which some cells are one network, and the nodes that this takes."""
        network, term = state.network, state.term
        taken = self.taken | {node.value.name for node in state.nodes}
        name = fresh(f"{network.output.name}.sites", taken)
        extracted = [_extracted(network, term, cell, f"{name}.{k}") for k, cell in enumerate(cells)]
        joined = join(extracted, state.parts, name, 0, taken)
        if joined is None:
            return None
        rest = self._without(network, term, cells, extracted)
        terms = tuple(rest if k == state.position else t for k, t in enumerate(network.terms))
        new = (*joined.nodes, joined.network)
        parts = {**state.parts, **joined.parts}
        return State(replace(network, terms=terms), (*state.nodes, *new, *joined.reads), parts), new

    def _without(self, network: Network, term: Term, cells: Sequence[Cell], extracted: Sequence[Network]) -> Term:
        """The term with one operand in the place of each cell."""
        tensors = list(term.tensors)
        for cell, part in zip(cells, extracted, strict=True):
            tensors[cell[0]] = part.output
        gone = {p for cell in cells for p in cell[1:]}
        rest = drop_tensors(replace(term, tensors=tuple(tensors), steps=None), gone)
        sizes = self.context.index_sizes(network, self.context.batches[-1])
        inputs = [tuple(dict.fromkeys(i.name for i in t.indices)) for t in rest.tensors]
        kept = tuple(i.name for i in network.output.indices if i.name in rest.indices)
        return replace(rest, order=optimal(inputs, kept, sizes))


def _extracted(network: Network, term: Term, cell: Cell, name: str) -> Network:
    """The contraction of one cell's tensors as a network: its value has an axis for each index that others need."""
    tensors = tuple(term.tensors[p] for p in cell)
    needed = outside(term, cell, network.output.indices)
    kept = {i.name: i for t in tensors for i in t.indices if i.name in needed}
    shown = {i.name for i in network.output.indices}
    order = sorted(kept.values(), key=lambda i: i.name not in shown)  # the batch, then the bonds
    output = Tensor(name, tuple((i,) for i in order))
    return Network(network.name, (Term(tensors),), output, network.dtype, network.source)


# ------------------------------------------------------------------------------------ finding cells


def families(state: State) -> Iterator[list[Cell]]:
    """Families of disjoint cells of equal structure: cores with the selections that they meet, selections alone, and
    what neighbours among those make together, by twos, fours and eights."""
    bonds = _Bonds(state)
    for family in (*bonds.around_cores(), *bonds.selected()):
        grown, size = _equal(state, family), 1
        while len(grown) >= FEWEST and size <= LARGEST:
            if len(grown[0]) > 1:
                yield grown
            grown, size = _equal(state, bonds.pairs(grown)), 2 * size


def _equal(state: State, cells: Sequence[Cell]) -> list[Cell]:
    """The largest part of some cells whose networks have one structure."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(structure(_extracted(state.network, state.term, cell, "")), []).append(cell)
    return max(groups.values(), key=len, default=[])


class _Bonds:
    """Which tensors of a term meet at which index."""

    def __init__(self, state: State) -> None:
        self.term = state.term
        self.parts = state.parts
        self.shown = {i.name for i in state.network.output.indices}
        self.holders: dict[str, list[int]] = {}
        for position, tensor in enumerate(self.term.tensors):
            for name in dict.fromkeys(i.name for i in tensor.indices):
                self.holders.setdefault(name, []).append(position)

    def _bond(self, name: str) -> bool:
        """Whether an index joins just two tensors and is summed."""
        return len(self.holders[name]) == 2 and name not in self.shown

    def around_cores(self) -> list[list[Cell]]:
        """Cores of one shape, each with the selections that it meets at the same places."""
        groups: dict[object, list[Cell]] = {}
        used: set[int] = set()
        for position, core in enumerate(self.term.tensors):
            if core.is_core:
                met, where = self._met(position, used)
                if met:
                    used |= {*met}
                    key = (tuple(tuple(i.size for i in axis) for axis in core.axes), where)
                    groups.setdefault(key, []).append((*met, position))
        return [sorted(group, key=self._place) for group in groups.values() if len(group) >= FEWEST]

    def _met(self, position: int, used: Collection[int]) -> tuple[list[int], object]:
        """The selections that a core shares a bond with, and where each stands in its value and meets the core."""
        met: list[int] = []
        where = []
        for place, index in enumerate(self.term.tensors[position].indices):
            others = [p for p in self.holders[index.name] if p != position] if self._bond(index.name) else []
            part = self.parts.get(self.term.tensors[others[0]].name) if others else None
            if part is None or others[0] in used or self.term.tensors[others[0]].is_core:
                continue
            at = [i.name for i in self.term.tensors[others[0]].indices].index(index.name)
            where.append((place, part.value.name, part.axis, at))
            if others[0] not in met:
                met.append(others[0])
        return met, tuple(where)

    def selected(self) -> list[list[Cell]]:
        """The selections from one axis of one value."""
        groups: dict[object, list[Cell]] = {}
        for position, tensor in enumerate(self.term.tensors):
            part = None if tensor.is_core else self.parts.get(tensor.name)
            if part is not None:
                groups.setdefault((part.value.name, part.axis), []).append((position,))
        return [sorted(group, key=self._place) for group in groups.values() if len(group) >= FEWEST]

    def _place(self, cell: Cell) -> int:
        return self.parts[self.term.tensors[cell[0]].name].position

    def pairs(self, cells: Sequence[Cell]) -> list[Cell]:
        """Neighbours among some cells, two by two: those that a bond joins at the same two places."""
        owner = {p: k for k, cell in enumerate(cells) for p in cell}
        places: list[dict[str, int]] = [
            {name: n for n, name in enumerate(i.name for p in cell for i in self.term.tensors[p].indices)}
            for cell in cells
        ]
        edges: dict[tuple[int, int], dict[int, int]] = {}
        for name, holders in self.holders.items():
            if not self._bond(name) or not all(p in owner for p in holders):
                continue
            a, b = (owner[p] for p in holders)
            if a != b:
                for x, y in ((a, b), (b, a)):
                    edges.setdefault((places[x][name], places[y][name]), {})[x] = y
        if not edges:
            return []
        following = max(edges.values(), key=len)  # of equal ones the first
        return [(*cells[a], *cells[b]) for a, b in _matched(following, len(cells))]


def _matched(following: Mapping[int, int], count: int) -> Iterator[tuple[int, int]]:
    """Disjoint pairs along chains, from the head of each; a ring begins anywhere."""
    used: set[int] = set()
    for start in (*(k for k in range(count) if k not in {*following.values()}), *range(count)):
        here: int | None = start
        while here is not None and here not in used:
            then = following.get(here)
            used.add(here)
            if then is None or then in used:
                break
            used.add(then)
            yield here, then
            here = following.get(then)
