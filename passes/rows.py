"""Terms that read gathered rows, as terms of the tables and cores that these rows are made of."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tncompile.cost.search import optimal
from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Tree
from tncompile.ir.edit import fresh, in_order, merge_groups, merged_axes
from tncompile.passes.base import Context
from tncompile.passes.plans import Limits, fastest
from tncompile.passes.positions import EMBEDDING, Position, Writer, read

Groups = frozenset[tuple[int, ...]]
"""A way to merge: the positions in each group of tensors that become one."""

_DIVISION = 4e-9
"""Seconds for one integer division by a constant; a remainder takes as long."""
_FEW = Limits(max_trials=2, trees=1)


def gather_seconds(context: Context, rows: int, width: int, itemsize: int) -> float:
    """Predicted seconds for gathering rows of a table."""
    return context.profile.permute_time(rows * width, width, itemsize, single=True)


@dataclass(frozen=True)
class Table:
    """An operand of a term as the table that its rows are gathered from: `mode` is the index of the rows."""

    node: Opaque
    mode: Index
    position: Position


@dataclass(frozen=True)
class Rows:
    """A term some operands of which are gathered rows. In `tensors` those are tables, cores like others."""

    network: Network
    term: Term
    tensors: tuple[Tensor, ...]
    tables: Mapping[int, Table]

    @cached_property
    def places(self) -> dict[str, int]:
        """Names of the axes of each table's ids, and of one table that has them."""
        return {i.name: p for p in self.tables for axis in self.term.tensors[p].axes[:-1] for i in axis}

    def shape(self, position: int) -> tuple[tuple[Index, ...], ...]:
        """The axes of a table's ids."""
        return self.term.tensors[position].axes[:-1]

    def pairs(self, ways: Groups) -> list[Groups]:
        """The ways that merge one more pair: a table and a tensor that it shares an index with. Then two tables that
        share none, but are gathered from at ids of one shape."""
        inside = {p for group in ways for p in group}
        parts = [*ways, *((p,) for p in range(len(self.tensors)) if p not in inside)]
        found: list[Groups] = []
        apart: list[Groups] = []
        for a, b in itertools.combinations(sorted(parts), 2):
            both = (*a, *b)
            tables = [p for p in both if p in self.tables]
            if not tables or not self._mergeable(both):
                continue
            merged = (ways - {a, b}) | {tuple(sorted(both))}
            names = [{i.name for p in part for i in self.tensors[p].indices} for part in (a, b)]
            if names[0] & names[1]:
                found.append(merged)
            elif all({*part} & {*self.tables} for part in (a, b)):
                apart.append(merged)
        return found + apart

    @cached_property
    def whole(self) -> Groups | None:
        """The way that merges everything into one table; None where some of it cannot be."""
        everything = tuple(range(len(self.tensors)))
        return frozenset({everything}) if len(everything) > 1 and self._mergeable(everything) else None

    def _mergeable(self, group: Sequence[int]) -> bool:
        """Whether tensors may be one table: they are constant, no axis of the ids is theirs, and their rows are
        gathered at ids of one shape."""
        tensors = [self.tensors[p] for p in group]
        names = {i.name for tensor in tensors for i in tensor.indices}
        alike = len({self.shape(p) for p in group if p in self.tables}) <= 1
        return alike and all(tensor.is_core for tensor in tensors) and not names & {*self.places}

    @cached_property
    def _kept(self) -> tuple[Index, ...]:
        """The indices that no merge may sum."""
        return (*self.network.output.indices, *(t.mode for t in self.tables.values()))

    def merged(self, ways: Groups, shapes_only: bool) -> tuple[Term, dict[int, tuple[int, ...]]]:
        """The tables and cores after a merge, and which tables went into each tensor that is a table then."""
        groups = [(group, self._order(group)) for group in sorted(ways)]
        term = merge_groups(Term(self.tensors), groups, self._kept, self.network.dtype, shapes_only)
        if len(term.tensors) == 1:  # then its rows are the result, and need not be permuted
            term = replace(term, tensors=(in_order(term.tensors[0], self.network.output.indices),))
        gone = {p for group in ways for p in group[1:]}
        left = [p for p in range(len(self.tensors)) if p not in gone]
        of = {group[0]: group for group in ways}
        tables = {new: tuple(q for q in of.get(old, (old,)) if q in self.tables) for new, old in enumerate(left)}
        return term, {new: found for new, found in tables.items() if found}

    def _order(self, group: Sequence[int]) -> Tree:
        """The order in which to merge tensors."""
        names = [tuple(i.name for i in self.tensors[p].indices) for p in group]
        axes = merged_axes(Term(self.tensors), group, self._kept)
        sizes = {i.name: int(i.size) for p in group for i in self.tensors[p].indices}
        return optimal(names, tuple(i.name for i in axes), sizes)

    def modes(self, tables: Sequence[int]) -> list[tuple[str, tuple[Position, int]]]:
        """The modes of the rows of a merged table, in an order in which neighbours are one, with their positions."""
        found = [(self.tables[p].mode, self.tables[p].position) for p in tables]
        found.sort(key=lambda item: (item[1].ids, -item[1].stride))
        return [(mode.name, (position, int(mode.size))) for mode, position in found]

    def elements(self, ways: Groups) -> int:
        """Numbers in all cores and tables after a merge."""
        term, _ = self.merged(ways, shapes_only=True)
        return sum(math.prod(int(i.size) for i in t.indices) for t in term.cores)

    def rowed(self, term: Term, tables: Mapping[int, tuple[int, ...]], names: Mapping[int, str]) -> Term:
        """The term with rows, called `names`, in the place of its tables."""
        tensors = list(term.tensors)
        for new, members in tables.items():
            gathered = {self.tables[p].mode.name for p in members}
            rest = tuple(i for i in tensors[new].indices if i.name not in gathered)
            tensors[new] = Tensor(names[new], (*self.shape(members[0]), rest))
        return Term(tuple(tensors))

    def seconds(self, ways: Groups, context: Context) -> list[float] | None:
        """Predicted seconds at each batch size; None where a size is not known."""
        merged, tables = self.merged(ways, shapes_only=True)
        term = self.rowed(merged, tables, {new: f"rows {new}" for new in tables})
        network = replace(self.network, terms=(term,))
        total = [0.0] * len(context.batches)
        if len(term.tensors) > 1:
            total = [*fastest(network, term, context, _FEW)]
        itemsize = np.dtype(self.network.dtype).itemsize
        for k, batch in enumerate(context.batches):
            sizes = context.index_sizes(self.network, batch)
            divisions: set[Position] = set()
            count = 1
            for new, members in tables.items():
                count = math.prod(sizes[i.name] for axis in self.shape(members[0]) for i in axis)
                width = math.prod(int(i.size) for i in term.tensors[new].axes[-1])
                total[k] += gather_seconds(context, count, width, itemsize)
                divisions |= {*_positions(self.modes(members))}
            steps = sum((p.stride > 1) * 2 + (p.modulus is not None) for p in divisions)
            total[k] += steps * (context.profile.copy_time(count, 8) + count * _DIVISION)
        return total

    def describe(self, ways: Groups, tried: int) -> str:
        names = [[self.tensors[p].name for p in group] for group in sorted(ways)]
        groups = "; ".join(" and ".join(group) for group in names)
        return f"{groups} are one table" if groups else f"nothing is merged into its tables, of {tried} ways tried"

    def applied(self, ways: Groups, writer: Writer) -> tuple[list[Node], Term] | None:
        """The nodes that gather from merged tables, and the term that reads them; None where a number overflows."""
        merged, tables = self.merged(ways, shapes_only=False)
        if not all(np.isfinite(c.data).all() for c in merged.cores if c.data is not None):
            return None
        nodes: list[Node] = []
        names: dict[int, str] = {}
        for new, members in tables.items():
            first = self.tables[members[0]].node
            if len(members) == 1 and merged.tensors[new] is self.tensors[members[0]]:
                names[new] = first.output.name
                continue
            modes = self.modes(members)
            weight, _ = writer.table(merged.tensors[new], [name for name, _ in modes])
            added, ids = writer.position([part for _, part in modes], first)
            rows, value = writer.rows(weight, ids, first.output.name, first.name, first.source)
            nodes += [*added, rows]
            names[new] = value.name
        return nodes, self.rowed(merged, tables, names)


def _positions(modes: Sequence[tuple[str, tuple[Position, int]]]) -> list[Position]:
    """The positions that have to be computed: neighbours are one."""
    found: list[tuple[Position, int]] = []
    for _, (position, size) in modes:
        both = found[-1][0].before(position, size) if found else None
        if both is None:
            found.append((position, size))
        else:
            found[-1] = (both, found[-1][1] * size)
    return [position for position, _ in found]


def readers_of(program: Program) -> Counter[int]:
    """How often each array is read, by its `id`: as a core, or by an opaque node."""
    cores = (core.data for network in program.networks for core in network.cores)
    weights = (program.weights.get(n) for node in program.nodes if isinstance(node, Opaque) for n in node.inputs)
    return Counter(id(array) for array in (*cores, *weights))


def rows_of(
    network: Network, term: Term, program: Program, nodes: Mapping[str, Node], readers: Mapping[int, int]
) -> Rows | None:
    """A term as one of tables and cores; None where it reads no rows."""
    if term.windows:
        return None
    tensors, tables = list(term.tensors), dict[int, Table]()
    taken = {*network.indices}
    for position, tensor in enumerate(term.tensors):
        node = nodes.get(tensor.name)
        if tensor.is_core or not isinstance(node, Opaque) or node.target != EMBEDDING:
            continue
        weight, ids = node.args[0], node.args[1]
        array = program.weights.get(weight.name) if isinstance(weight, Ref) else None
        names = [i.name for i in tensor.indices]
        # an index in several axes of the rows is a diagonal, and rows that others read too are gathered anyway
        if array is None or array.ndim != 2 or program.uses[tensor.name] > 1 or len({*names}) < len(names):
            continue
        if readers[id(array)] > 1:
            continue  # it stays in the file for others
        assert isinstance(weight, Ref)
        assert isinstance(ids, Ref)
        rest = tensor.axes[-1]
        if any(not isinstance(i.size, int) for i in rest):
            continue
        mode = Index(fresh("rows", taken), array.shape[0])
        taken.add(mode.name)
        tensors[position] = Tensor(weight.name, ((mode,), rest), array, origins=program.sources(weight.name))
        tables[position] = Table(node, mode, read(ids.name, nodes))
    return Rows(network, term, tuple(tensors), tables) if tables else None
