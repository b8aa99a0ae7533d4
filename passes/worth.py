"""What nodes are predicted to take as `order` will compute them: by this, passes before it weigh a rewrite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tncompile.ir import Network, Node, Opaque, Program, Term, dims
from tncompile.passes.base import Context
from tncompile.passes.plans import estimate, key_of
from tncompile.passes.pointwise import POINTWISE

Seconds = tuple[float, ...]
"""Predicted, at each batch size of the context."""

MOVES = frozenset(
    f"aten.{name}" for name in ("select.int", "slice.Tensor", "stack.default", "cat.default", "index_select.default")
)
NOISE = 0.03
"""Two predictions are as good as equal up to this."""


@dataclass(frozen=True)
class Worth:
    """Prices nodes at the batch sizes of a context; what was priced once is remembered."""

    context: Context
    _known: dict[object, Seconds] = field(default_factory=dict)

    @property
    def nothing(self) -> Seconds:
        """No time at all."""
        return (0.0,) * len(self.context.batches)

    def nodes(self, nodes: Iterable[Node]) -> Seconds:
        """The sum over some nodes; an opaque node that neither moves nor maps elements is not counted."""
        return total(self.nothing, *(self.node(node) for node in nodes))

    def program(self, program: Program) -> Seconds:
        """The sum over the nodes of a program."""
        return self.nodes(program.nodes)

    def node(self, node: Node) -> Seconds:
        """One node's seconds."""
        if isinstance(node, Opaque):
            counts = node.target in MOVES or node.target in POINTWISE
            return self.move(node.output.shape or (), node.output.dtype) if counts else self.nothing
        network = node if isinstance(node, Network) else node.cases[0]
        moving = network.moving
        seconds = total(self.nothing, *(self._term(network, term) for term in moving))
        return total(seconds, *(self._sum(network) for _ in moving[1:]))

    def move(self, shape: Sequence[dims.Dim], dtype: str) -> Seconds:
        """A node that reads and writes each element of a value once."""
        profile = self.context.profile
        itemsize = np.dtype(dtype).itemsize
        return tuple(profile.node + profile.copy_time(size, itemsize) for size in self._sizes(shape))

    def _sum(self, network: Network) -> Seconds:
        itemsize = np.dtype(network.dtype).itemsize
        profile = self.context.profile
        return tuple(profile.multiply_time(1, size, itemsize) for size in self._sizes(network.output.shape))

    def _sizes(self, shape: Sequence[dims.Dim]) -> list[int]:
        return [
            int(np.prod([self.context.size(d, batch) for d in shape], dtype=np.int64)) for batch in self.context.batches
        ]

    def _term(self, network: Network, term: Term) -> Seconds:
        key = key_of(network, term, self.context)
        if key not in self._known:
            # the tables are of steps that follow each other; what is read from elsewhere has a node or two of its own
            reads = self.context.profile.node * len(term.operands)
            self._known[key] = tuple(reads + seconds for seconds in estimate(network, term, self.context))
        return self._known[key]


def total(*parts: Seconds) -> Seconds:
    """The sum, batch size by batch size."""
    return tuple(map(sum, zip(*parts, strict=True)))


def gains(before: Seconds, after: Seconds, margin: float) -> bool:
    """Whether all batch sizes together gain by at least `margin`, and none loses more than predictions can tell."""
    if any(b > (1 + NOISE) * a for a, b in zip(before, after, strict=True)) or not any(before):
        return False
    return ratio(before, after) <= 1 - margin


def ratio(before: Seconds, after: Seconds) -> float:
    """How long it takes afterwards for each second before, averaged over the batch sizes."""
    return float(np.mean([b / a for a, b in zip(before, after, strict=True) if a > 0]))
