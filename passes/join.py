"""Compute equal networks, and equal parts of one network, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Network, Node, Program
from tncompile.ir.edit import unique_cores
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.cells import Levels, State
from tncompile.passes.equals import Parts, selections
from tncompile.passes.explain import microseconds
from tncompile.passes.worth import Seconds, Worth, ratio


@dataclass(frozen=True)
class Join(Pass):
    """(docs)"""

    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        worth = Worth(context)
        program = self._sites(program, worth, changes)
        return unique_cores(program), changes

    def _sites(self, program: Program, worth: Worth, changes: list[Change]) -> Program:
        """Equal parts of one network."""
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
        if end is start or ratio(before, after) > 1 - self.margin:
            return [network]
        count = sum(isinstance(node, Network) for node in end.nodes)
        what = f"its equal parts are computed at once, in {count} network{'s' * (count > 1)} before it"
        changes.append(Change(network.output.name, what, predicted(before, after, worth.context)))
        return [*end.nodes, end.network]


def predicted(before: Seconds, after: Seconds, context: Context) -> str:
    """What a rewrite is for."""
    return f"predicted {microseconds(after[-1])} instead of {microseconds(before[-1])} at batch {context.batches[-1]}"
