"""The indices of a term as edges: which tensors each of them joins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tncompile.ir.core import Index, Term

Kind = Literal["bond", "hyperedge", "open", "trace", "sum"]


@dataclass(frozen=True)
class Bond:
    """An index of a term and where it ends.

    `tensors` holds the position of a tensor once for each time the tensor has the index; `is_open` says
    whether the output has it too.
    """

    index: Index
    tensors: tuple[int, ...]
    is_open: bool

    @property
    def kind(self) -> Kind:
        """What the index does.

        ``bond``: joins two tensors. ``open``: leads from one tensor to the output. ``hyperedge``: has three
        ends or more, the output counted. ``trace``: stands twice in one tensor and nowhere else. ``sum``: has
        one end and is summed.
        """
        ends = len(self.tensors) + self.is_open
        if ends > 2:
            return "hyperedge"
        if self.is_open:
            return "open"
        if ends == 1:
            return "sum"
        return "bond" if len({*self.tensors}) == 2 else "trace"


def bonds(term: Term, output: Iterable[Index]) -> tuple[Bond, ...]:
    """Every index of a term, in order of first use."""
    open_names = {i.name for i in output}
    ends: dict[str, list[int]] = {}
    for position, tensor in enumerate(term.tensors):
        for index in tensor.indices:
            ends.setdefault(index.name, []).append(position)
    return tuple(Bond(term.indices[name], tuple(places), name in open_names) for name, places in ends.items())


def levels(term: Term) -> dict[int, int]:
    """How far each tensor is from the operands: 0 for an operand, 1 for a core that shares an index with one.

    Cores that nothing connects to an operand are at 1.
    """
    neighbours: dict[int, set[int]] = {p: set() for p in range(len(term.tensors))}
    for bond in bonds(term, ()):
        for position in bond.tensors:
            neighbours[position] |= {*bond.tensors}
    level = {p: 0 for p, t in enumerate(term.tensors) if not t.is_core}
    edge, distance = set(level), 0
    while edge:
        distance += 1
        edge = {n for p in edge for n in neighbours[p]} - level.keys()
        level |= dict.fromkeys(edge, distance)
    return {p: level.get(p, 1) for p in range(len(term.tensors))}
