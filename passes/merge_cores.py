"""Merge adjacent cores where the result is no larger than what it replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from tncompile.ir import Network, Node, Program, Term
from tncompile.ir.edit import merge_tensors, merged_axes, unique_cores
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

    Pairs that save most go first. Larger merges are left to `order`, which weighs them against run time.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        for node in program.nodes:
            if isinstance(node, Network):
                node = replace(node, terms=tuple(self._merge(node, term, changes) for term in node.terms))
            nodes.append(node)
        return unique_cores(replace(program, nodes=tuple(nodes))), changes

    def _merge(self, network: Network, term: Term, changes: list[Change]) -> Term:
        overflowing: set[tuple[int, int]] = set()
        while True:
            verdicts = {pair: self._weigh(network, term, pair) for pair in self._pairs(term)}
            found = [(v, pair) for pair, v in verdicts.items() if isinstance(v, int) and pair not in overflowing]
            if not found:
                for pair, verdict in verdicts.items():
                    reason = verdict if isinstance(verdict, str) else f"the product does not fit into {network.dtype}"
                    what = f"{term.tensors[pair[0]].name} and {term.tensors[pair[1]].name} are not merged"
                    changes.append(Change(network.output.name, what, reason, declined=True))
                return term
            gain, pair = max(found, key=lambda item: (item[0], [-p for p in item[1]]))
            merged = merge_tensors(term, pair, network.output.indices, network.dtype)
            if not all(np.isfinite(c.data).all() for c in merged.cores if c.data is not None):
                overflowing.add(pair)
                continue
            a, b = (term.tensors[p].name for p in pair)
            term, overflowing = merged, set()
            why = f"{gain} elements fewer" if gain else "no more elements than before"
            changes.append(Change(network.output.name, f"{a} and {b} are one core", why))

    @staticmethod
    def _pairs(term: Term) -> list[tuple[int, int]]:
        cores = [p for p, t in enumerate(term.tensors) if t.is_core]
        names = {p: {i.name for i in term.tensors[p].indices} for p in cores}
        return [(a, b) for a, b in combinations(cores, 2) if names[a] & names[b] or not names[a] or not names[b]]

    def _weigh(self, network: Network, term: Term, pair: tuple[int, int]) -> int | str:
        """The elements that a merge saves, or why it must not or need not be done."""
        a, b = ({i.name for i in term.tensors[p].indices} for p in pair)
        kept = merged_axes(term, pair, network.output.indices)
        modes = a & b & {i.name for i in kept} & {i.name for t in term.operands for i in t.indices}
        if modes and not (a <= b or b <= a):
            return f"both have the mode {', '.join(sorted(modes))} of an operand; left to order"
        size, both = math.prod(int(i.size) for i in kept), sum(_elements(term, p) for p in pair)
        return both - size if size <= both else f"{size} elements instead of {both}; left to order"


def _elements(term: Term, position: int) -> int:
    return math.prod(int(i.size) for i in term.tensors[position].indices)
