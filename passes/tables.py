"""Choose which cores are merged into the tables that a model gathers rows from."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term
from tncompile.ir.edit import fresh, merge_groups
from tncompile.ir.tree import left_to_right
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.explain import instead
from tncompile.passes.plans import Limits, fastest
from tncompile.passes.positions import EMBEDDING, Position, Writer, read

Groups = frozenset[tuple[int, ...]]
"""A way to merge: the positions in each group of tensors that become one."""

_DIVISION = 4e-9
"""Seconds for one integer division by a constant; a remainder takes as long."""
_FEW = Limits(max_trials=2, trees=1)


@dataclass(frozen=True)
class Tables(Pass):
    """Merge tables that rows are gathered from with each other and with cores, where that is predicted faster.

    ```
    opaque a: float32[batch, e1*r] = aten.embedding.default(%A, %p)      opaque b = ...(%B, %q)
    network y: y[batch, (e1 e2)] = a[batch, (e1 r)] b[batch, (r e2)]
    ->
    opaque ab: float32[batch, e1*e2] = aten.embedding.default(%A*B, %ids)
    network y: y[batch, (e1 e2)] = ab[batch, (e1 e2)]
    ```

    1. Each table is a weight, its rows are read by one term alone, and tables merged with each other are gathered
       from at ids of one shape; a core that meets an axis of the ids is merged with none.
    2. A way to merge is searched for from the cheapest so far, at most `trials` ways; of two the faster over all batch
       sizes, by gathers, arithmetic on ids, and the best order of what is left.
    3. All tensors of the term together get at most `growth` times as many numbers as they had, or at most `small`
       (128 KB of float32, which caches hold); where one table is left, as that is the full one, `full` times.
    4. The term is predicted faster by `margin`, and at no batch size slower.
    5. The context is not compact.

    Gathers that nothing reads any more are left to `clean`.
    """

    growth: float = 4.0
    small: int = 1 << 15
    full: float = 1.0
    margin: float = 0.05
    trials: int = 48

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        if context.compact:
            return program, changes
        known = {node.value.name: node for node in program.nodes}
        writer = Writer(program)
        readers = _readers(program)

        def merged(network: Network) -> Iterator[Node]:
            terms = []
            for term in network.terms:
                rows = _rows(network, term, program, known, readers)
                if rows is not None:
                    added, term = self._merge(rows, context, writer, changes)
                    yield from added
                terms.append(term)
            yield replace(network, terms=tuple(terms))

        nodes = [new for node in program.nodes for new in (merged(node) if isinstance(node, Network) else (node,))]
        if len(nodes) == len(program.nodes):
            return program, changes
        return writer.program(program, nodes), changes

    def _merge(
        self, rows: _Rows, context: Context, writer: Writer, changes: list[Change]
    ) -> tuple[Sequence[Node], Term]:
        start: Groups = frozenset()
        before, best = rows.seconds(start, context), start
        if before is None:
            return (), rows.term
        scores = {start: 1.0}
        todo: list[tuple[float, int, Groups]] = [(1.0, 0, start)]
        number = itertools.count(1)
        while todo and len(scores) <= self.trials:
            for ways in rows.pairs(heapq.heappop(todo)[-1]):
                if ways in scores or len(scores) > self.trials or not self._fits(rows, ways):
                    continue
                after = rows.seconds(ways, context)
                ratios = [math.inf] if after is None else [a / b for a, b in zip(after, before, strict=True)]
                scores[ways] = (
                    math.exp(sum(map(math.log, ratios)) / len(ratios)) if max(ratios) < math.inf else math.inf
                )
                heapq.heappush(todo, (scores[ways], next(number), ways))
                if scores[ways] < min(scores[best], 1 - self.margin) and max(ratios) <= 1:
                    best = ways
        what, details = rows.describe(best, len(scores)), {"tried": len(scores), "numbers": rows.elements(best)}
        if best == start:
            if len(scores) > 1:
                changes.append(Change(rows.network.output.name, what, "none is predicted faster", declined=True))
            return (), rows.term
        result = rows.applied(best, writer)
        if result is None:
            return (), rows.term
        after = rows.seconds(best, context) or before
        numbers = f"{rows.elements(best):,} numbers instead of {rows.elements(start):,}"
        why = f"predicted {instead(after, before, context)}, {numbers}"
        changes.append(Change(rows.network.output.name, what, why, details=details))
        return result

    def _fits(self, rows: _Rows, ways: Groups) -> bool:
        before = rows.elements(frozenset())
        if any(len(group) == len(rows.tensors) for group in ways):
            return rows.elements(ways) <= self.full * before
        return rows.elements(ways) <= max(self.growth * before, self.small)


@dataclass(frozen=True)
class _Table:
    """An operand of a term as the table that its rows are gathered from: `mode` is the index of the rows."""

    node: Opaque
    mode: Index
    position: Position


@dataclass(frozen=True)
class _Rows:
    """A term some operands of which are gathered rows. In `tensors` those are tables, cores like others."""

    network: Network
    term: Term
    tensors: tuple[Tensor, ...]
    tables: Mapping[int, _Table]

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
            names = [{i.name for p in part for i in self.tensors[p].indices} for part in (a, b)]
            mergeable = all(self.tensors[p].is_core for p in both) and not any(n & {*self.places} for n in names)
            alike = len({self.shape(p) for p in tables}) == 1
            if not (tables and mergeable and alike):
                continue
            merged = (ways - {a, b}) | {tuple(sorted(both))}
            if names[0] & names[1]:
                found.append(merged)
            elif all({*part} & {*self.tables} for part in (a, b)):
                apart.append(merged)
        return found + apart

    @cached_property
    def _kept(self) -> tuple[Index, ...]:
        """The indices that no merge may sum."""
        return (*self.network.output.indices, *(t.mode for t in self.tables.values()))

    def merged(self, ways: Groups, shapes_only: bool) -> tuple[Term, dict[int, tuple[int, ...]]]:
        """The tables and cores after a merge, and which tables went into each tensor that is a table then."""
        groups = [(group, left_to_right(range(len(group)))) for group in sorted(ways)]
        term = merge_groups(Term(self.tensors), groups, self._kept, self.network.dtype, shapes_only)
        gone = {p for group in ways for p in group[1:]}
        left = [p for p in range(len(self.tensors)) if p not in gone]
        of = {group[0]: group for group in ways}
        tables = {new: tuple(q for q in of.get(old, (old,)) if q in self.tables) for new, old in enumerate(left)}
        return term, {new: found for new, found in tables.items() if found}

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
                total[k] += context.profile.permute_time(count * width, width, itemsize, single=True)
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


def _readers(program: Program) -> Counter[int]:
    """How often each array is read, by its `id`: as a core, or by an opaque node."""
    cores = (core.data for network in program.networks for core in network.cores)
    weights = (program.weights.get(n) for node in program.nodes if isinstance(node, Opaque) for n in node.inputs)
    return Counter(id(array) for array in (*cores, *weights))


def _rows(
    network: Network, term: Term, program: Program, nodes: Mapping[str, Node], readers: Mapping[int, int]
) -> _Rows | None:
    """A term as one of tables and cores; None where it reads no rows."""
    if term.windows:
        return None
    tensors, tables = list(term.tensors), dict[int, _Table]()
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
        tables[position] = _Table(node, mode, read(ids.name, nodes))
    return _Rows(network, term, tuple(tensors), tables) if tables else None
