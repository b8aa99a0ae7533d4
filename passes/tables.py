"""Choose which cores are merged into the tables that a model gathers rows from."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.ir import Network, Node, Program, Term
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.explain import instead
from tncompile.passes.positions import Writer
from tncompile.passes.rows import Groups, Rows, readers_of, rows_of


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
       (128 KB of float32, which caches hold). One table of all is what the model would have without tensors: it may
       have `whole` numbers (32 MB of float32) where several tables were gathered from, and fit the context's memory;
       where it was one, `full` times as many as it had.
    4. The term is predicted faster by `margin`, and at no batch size slower.
    5. The context is not compact.

    Gathers that nothing reads any more are left to `clean`.
    """

    growth: float = 4.0
    small: int = 1 << 15
    full: float = 1.0
    whole: int = 1 << 23
    margin: float = 0.05
    trials: int = 48

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        if context.compact:
            return program, changes
        known = {node.value.name: node for node in program.nodes}
        writer = Writer(program)
        readers = readers_of(program)

        def merged(network: Network) -> Iterator[Node]:
            terms = []
            for term in network.terms:
                rows = rows_of(network, term, program, known, readers)
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
        self, rows: Rows, context: Context, writer: Writer, changes: list[Change]
    ) -> tuple[Sequence[Node], Term]:
        start: Groups = frozenset()
        before, best = rows.seconds(start, context), start
        if before is None:
            return (), rows.term
        scores = {start: 1.0}
        todo: list[tuple[float, int, Groups]] = [(1.0, 0, start)]
        number = itertools.count(1)
        while todo and len(scores) <= self.trials:
            cheapest = heapq.heappop(todo)[-1]
            whole = [rows.whole] if cheapest == start and rows.whole is not None else []
            for ways in (*whole, *rows.pairs(cheapest)):
                if ways in scores or len(scores) > self.trials or not self._fits(rows, ways, context):
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

    def _fits(self, rows: Rows, ways: Groups, context: Context) -> bool:
        before, after = rows.elements(frozenset()), rows.elements(ways)
        if ways != rows.whole:
            return after <= max(self.growth * before, self.small)
        if len(rows.tables) == 1 or after <= self.full * before:
            return after <= self.full * before
        most = math.inf if context.max_memory is None else context.max_memory
        return after <= self.whole and after * np.dtype(rows.network.dtype).itemsize <= most
