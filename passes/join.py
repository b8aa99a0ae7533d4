"""Compute equal networks, and equal parts of one network, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Network, Node, Program
from tncompile.ir.edit import unique_cores
from tncompile.passes.alike import Family, joined, seeds
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.cells import Levels, State
from tncompile.passes.clean import Clean
from tncompile.passes.equals import Parts, selections, structure
from tncompile.passes.explain import microseconds
from tncompile.passes.fold import Fold
from tncompile.passes.stacks import Stacks
from tncompile.passes.worth import Seconds, Worth, gains


@dataclass(frozen=True)
class Join(Pass):
    """Make one network of several that are equal but for their operands and the numbers in their cores.

    ```
    network q: q[b, o] = x[b, i] Wq[i, o]               network k: k[b, o] = x[b, i] Wk[i, o]
    ->
    network q.all: q.all[n, b, o] = x[b, i] Wq+Wk[n, i, o]      opaque q = aten.select.int(%q.all, 0, 0)  (and k)
    ```

    The same inside one network: of a chain over the selections from one value, all sites are contracted with their
    cores in one network, neighbours among them in the next, and so on (see `tncompile.passes.cells`).

    1. The networks have the same structure: terms, indices and sizes. Operands and cores that differ are stacked: cores
       at compile time; of selections from one value, the value itself or a slice of it is read.
    2. None of them needs another's value.
    3. What follows and is equal too is joined with them: operations on each element alone, networks, sums, stacks and
       concatenations of the parts.
    4. The program is predicted no slower at any batch size, and faster by `margin` of what the change concerns.
    """

    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        worth = Worth(context)
        program = self._families(program, worth, changes)
        program = self._sites(program, worth, changes)
        return unique_cores(program), changes

    # ------------------------------------------------------------------------------ several networks

    def _families(self, program: Program, worth: Worth, changes: list[Change]) -> Program:
        declined: set[object] = set()
        while True:
            for family in seeds(program):
                shared = tuple(a.name == b.name for a, b in zip(family[0].operands, family[1].operands, strict=True))
                key = (structure(family[0]), len(family), shared)
                if key in declined:
                    continue
                better = self._joined(program, family, worth, changes)
                if better is not None:
                    program = better
                    break
                declined.add(key)
            else:
                return program

    def _joined(self, program: Program, family: Family, worth: Worth, changes: list[Change]) -> Program | None:
        names = ", ".join(n.output.name for n in family[1:4]) + (", ..." if len(family) > 4 else "")
        what = f"computed at once with {names}"
        best: tuple[float, Program, str] | None = None
        why = ""
        for place in dict.fromkeys((0, max(0, len(family[0].output.axes) - 1))):
            after = joined(program, family, place)
            if after is None:
                return None
            for step in (Stacks(), Clean(), Fold(), Clean()):
                after, _ = step.run(after, worth.context)
            old, new = _differ(program, after)
            prices = worth.nodes(old), worth.nodes(new)
            why = why or predicted(*prices, worth.context)
            if gains(*prices, self.margin) and (best is None or sum(prices[1]) < best[0]):
                best = (sum(prices[1]), after, predicted(*prices, worth.context))
        if best is None:
            changes.append(Change(family[0].output.name, what, why, declined=True))
            return None
        changes.append(Change(family[0].output.name, what, best[2]))
        return best[1]

    # ------------------------------------------------------------------------------ one network

    def _sites(self, program: Program, worth: Worth, changes: list[Change]) -> Program:
        parts = selections(program)
        nodes: list[Node] = []
        for node in program.nodes:
            if isinstance(node, Network) and any(t.name in parts for t in node.operands):
                nodes += self._levels(node, parts, worth, program, changes)
            else:
                nodes.append(node)
        return replace(program, nodes=tuple(nodes))

    def _levels(
        self, network: Network, parts: Parts, worth: Worth, program: Program, changes: list[Change]
    ) -> list[Node]:
        if sum(not term.is_constant for term in network.terms) != 1:
            return [network]
        start = State(network, (), parts)
        end, before, after = Levels(worth, program.values).best(start)
        if end is start or not gains(before, after, self.margin):
            return [network]
        count = sum(isinstance(node, Network) for node in end.nodes)
        what = f"its equal parts are computed at once, in {count} network{'s' * (count > 1)} before it"
        changes.append(Change(network.output.name, what, predicted(before, after, worth.context)))
        return [*end.nodes, end.network]


def _differ(before: Program, after: Program) -> tuple[list[Node], list[Node]]:
    """The nodes that only one of two programs has."""
    old = {id(node) for node in before.nodes}
    new = {id(node) for node in after.nodes}
    return [n for n in before.nodes if id(n) not in new], [n for n in after.nodes if id(n) not in old]


def predicted(before: Seconds, after: Seconds, context: Context) -> str:
    """What a rewrite is for."""
    return f"predicted {microseconds(after[-1])} instead of {microseconds(before[-1])} at batch {context.batches[-1]}"
