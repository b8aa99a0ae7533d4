"""Merge adjacent cores where the result is no larger than what it replaces."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tncompile.ir import Network, Program, Tensor, Term
from tncompile.ir.edit import map_terms, merge_tensors
from tncompile.passes.base import Change, Context, Pass


@dataclass(frozen=True)
class MergeCores(Pass):
    """Contract adjacent cores at compile time where that needs no search.

    ```
    y[b, o] = x[b, i] A[i, r] s[r] B[r, t] C[t, o]      r=64, t=4
    ->
    y[b, o] = x[b, i] A*s*B[i, t] C[t, o]
    ```

    1. Both tensors are cores of one term, and share an index, or one of them is a number.
    2. The result has at most as many elements as the two together.
    3. No index that the two share and keep alive is also on an operand, unless one core's indices are all on the
       other (a scale): else a batch mode of later matmuls would appear where there was none.
    4. Not both have an operand of their own, as the sites of a matrix product state do: merged, each operand would
       meet the modes of the other's core too.

    Pairs that save most go first. Larger merges are left to `order`, which weighs them against run time.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        return map_terms(program, lambda network, term: self._merge(network, term, changes)), changes

    def _merge(self, network: Network, term: Term, changes: list[Change]) -> Term:
        pairs = _Pairs(network, term)
        while (best := pairs.best()) is not None:
            gain, (a, b) = best
            positions = (pairs.position(a), pairs.position(b))
            merged = merge_tensors(term, positions, network.output.indices, network.dtype)
            core = merged.tensors[positions[0]]
            if core.data is None or not np.isfinite(core.data).all():
                pairs.verdicts[a, b] = f"the product does not fit into {network.dtype}"
                continue
            first, second = (term.tensors[p].name for p in positions)
            why = f"{gain} elements fewer" if gain else "no more elements than before"
            changes.append(Change(network.output.name, f"{first} and {second} are one core", why))
            term = merged
            pairs.replace(a, b, core)
        for (a, b), verdict in sorted(pairs.verdicts.items()):
            first, second = pairs.tensors[a].name, pairs.tensors[b].name
            what = f"{first} and {second} are not merged"
            changes.append(Change(network.output.name, what, str(verdict), declined=True))
        return term


class _Pairs:
    """The adjacent cores of a term: for each pair what its merge saves, or why it must not or need not be done.

    Tensors are known by their first positions. A merge changes the verdicts of the new core's pairs, and of those
    that become the last to hold an index: only these are weighed again.
    """

    def __init__(self, network: Network, term: Term) -> None:
        self.tensors = dict(enumerate(term.tensors))
        self.names = {p: {i.name for i in t.indices} for p, t in self.tensors.items()}
        self.holders: dict[str, set[int]] = {}
        for p, names in self.names.items():
            for name in names:
                self.holders.setdefault(name, set()).add(p)
        self.output = {i.name for i in network.output.indices} | term.slid
        self.sizes = {name: index.size for name, index in term.indices.items()}
        self.operands = [{i.name for i in t.indices} for t in term.operands]
        self.modes = {name for names in self.operands for name in names}
        self.verdicts: dict[tuple[int, int], int | str] = {}
        self._ranked: list[tuple[int, tuple[int, int]]] = []
        cores = [p for p, t in self.tensors.items() if t.is_core]
        for pair in combinations(cores, 2):
            self._weigh(pair)

    def position(self, tag: int) -> int:
        """Where a tensor stands in the term now."""
        return sum(1 for other in self.tensors if other < tag)

    def best(self) -> tuple[int, tuple[int, int]] | None:
        """The pair that saves most, of equal ones the first; None where no merge pays."""
        while self._ranked:
            loss, pair = self._ranked[0]
            if self.verdicts.get(pair) == -loss:
                return -loss, pair
            heapq.heappop(self._ranked)  # merged since, or weighed again
        return None

    def replace(self, a: int, b: int, core: Tensor) -> None:
        """Put the merged core in the place of the first of its two."""
        shared = self.names[a] & self.names[b]
        for p in self.tensors:
            for merged in (a, b):
                self.verdicts.pop((min(p, merged), max(p, merged)), None)
        for name in self.names[b]:
            self.holders[name].discard(b)
        self.tensors[a], self.names[a] = core, {i.name for i in core.indices}
        del self.tensors[b], self.names[b]
        for name in shared - self.names[a]:
            self.holders[name].discard(a)
        for name in self.names[a]:
            self.holders[name].add(a)
        again = {frozenset((a, p)) for p, t in self.tensors.items() if t.is_core and p != a}
        again |= {frozenset(self.holders[name]) for name in shared if len(self.holders[name]) == 2}
        for first, second in (sorted(pair) for pair in again):
            if self.tensors[first].is_core and self.tensors[second].is_core:
                self._weigh((first, second))

    def _weigh(self, pair: tuple[int, int]) -> None:
        a, b = (self.names[p] for p in pair)
        if a and b and not a & b:
            return
        union = a | b
        kept = {n for n in union if n in self.output or self.holders[n] - {*pair}}
        modes = a & b & kept & self.modes
        if modes and not (a <= b or b <= a):
            reason = f"both have the mode {', '.join(sorted(modes))} of an operand; left to order"
            self.verdicts[pair] = reason
            return
        met, other = ({k for k, names in enumerate(self.operands) if names & side} for side in (a, b))
        if met - other and other - met:
            self.verdicts[pair] = "each meets an operand of its own; left to order"
            return
        size = self._elements(kept)
        both = sum(math.prod(int(i.size) for i in self.tensors[p].indices) for p in pair)
        if size > both:
            self.verdicts[pair] = f"{size} elements instead of {both}; left to order"
            return
        self.verdicts[pair] = both - size
        heapq.heappush(self._ranked, (size - both, pair))

    def _elements(self, names: set[str]) -> int:
        return math.prod(int(self.sizes[name]) for name in names)
