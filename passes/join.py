"""Compute equal networks, and equal parts of one network, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Network, Node, Program
from tncompile.ir.edit import unique_cores
from tncompile.passes.alike import Family, joined, multiplied_out, seeds
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.cells import Levels, State
from tncompile.passes.clean import Clean
from tncompile.passes.equals import Parts, selections, structure
from tncompile.passes.explain import instead
from tncompile.passes.fold import Fold
from tncompile.passes.pieces import as_selections
from tncompile.passes.stacks import Stacks
from tncompile.passes.worth import Worth, gains, ratio


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

    margin: float = 0.15

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        worth = Worth(context)
        program = self._families(program, worth, changes)
        program = self._sites(program, worth, changes)
        return unique_cores(program), changes

    # ------------------------------------------------------------------------------ several networks

    def _families(self, program: Program, worth: Worth, changes: list[Change]) -> Program:
        """Equal networks, also of chunks and slices; those stay as they are where nothing is joined."""
        declined: dict[object, Change] = {}
        done = _tidied(as_selections(program), worth.context)
        found = False
        while (better := self._first(done, worth, declined, changes)) is not None:
            done, found = better, True
        changes += declined.values()
        return done if found else program

    def _first(
        self, program: Program, worth: Worth, declined: dict[object, Change], changes: list[Change]
    ) -> Program | None:
        """The program with the first family joined that is worth it. Of equal families one is weighed."""
        for family in seeds(program):
            shared = tuple(a.name == b.name for a, b in zip(family[0].operands, family[1].operands, strict=True))
            key = (structure(family[0]), len(family), shared)
            if key not in declined:
                change, better = self._joined(program, family, worth)
                if better is not None:
                    changes.append(change)
                    return better
                declined[key] = change
        return None

    def _joined(self, program: Program, family: Family, worth: Worth) -> tuple[Change, Program | None]:
        names = ", ".join(n.output.name for n in family[1:4]) + (", ..." if len(family) > 4 else "")
        what = f"computed at once with {names}"
        best: tuple[float, Program, str] | None = None
        why = ""
        for place in dict.fromkeys((0, max(0, len(family[0].output.axes) - 1))):
            after = joined(program, family, place)
            if after is None:
                continue
            known = {node.value.name for node in program.nodes}
            after = _tidied(after, worth.context)
            for way in (after, _tidied(multiplied_out(after, known), worth.context)):
                old, new = map(worth.nodes, _differ(program, way))
                predicted = f"predicted {instead(new, old, worth.context)}"
                why = why or predicted
                if gains(old, new, self.margin) and (best is None or ratio(old, new) < best[0]):
                    best = (ratio(old, new), way, predicted)
        if best is None:
            return Change(family[0].output.name, what, why, declined=True), None
        return Change(family[0].output.name, what, best[2]), best[1]

    # ------------------------------------------------------------------------------ one network

    def _sites(self, program: Program, worth: Worth, changes: list[Change]) -> Program:
        parts = selections(program)
        taken = {*program.values, *program.arrays}
        nodes: list[Node] = []
        for node in program.nodes:
            if isinstance(node, Network) and any(t.name in parts for t in node.operands):
                levels = self._levels(node, parts, worth, taken, changes)
                taken.update(level.value.name for level in levels)
                nodes += levels
            else:
                nodes.append(node)
        return replace(program, nodes=tuple(nodes))

    def _levels(
        self, network: Network, parts: Parts, worth: Worth, taken: set[str], changes: list[Change]
    ) -> list[Node]:
        if len(network.moving) != 1 or any(term.windows for term in network.terms):
            return [network]
        start = State(network, (), parts)
        end, before, after = Levels(worth, taken).best(start)
        if end is start or not gains(before, after, self.margin):
            return [network]
        count = sum(isinstance(node, Network) for node in end.nodes)
        what = f"its equal parts are computed at once, in {count} network{'s' * (count > 1)} before it"
        changes.append(Change(network.output.name, what, f"predicted {instead(after, before, worth.context)}"))
        return [*end.nodes, end.network]


def _tidied(program: Program, context: Context) -> Program:
    """What the passes before make of a program in which networks were joined."""
    for step in (Stacks(), Clean(), Fold(), Clean()):
        program, _ = step.run(program, context)
    return program


def _differ(before: Program, after: Program) -> tuple[list[Node], list[Node]]:
    """The nodes that only one of two programs has."""
    old = {node.value.name: node for node in before.nodes}
    new = {node.value.name: node for node in after.nodes}
    return (
        [node for name, node in old.items() if new.get(name) != node],
        [node for name, node in new.items() if old.get(name) != node],
    )
