"""How a network is computed by PyTorch: permutations and products, with the sizes read off the tensors at run time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tncompile.cost.layouts import Layout
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.slices import best_cut
from tncompile.cost.training import is_recomputed
from tncompile.emit.module.steps import Step, Turn, steps_of
from tncompile.errors import UnsupportedError
from tncompile.ir import Index, Network, Tensor, Term
from tncompile.passes.training import training_cost


@dataclass(frozen=True)
class Prepared:
    """A tensor brought to one axis for each index, each index once: ``x[b, (i j)]`` to ``x[b, i, j]``.

    `labels` are its indices as they lie; `diagonals` then lists pairs of axes of which the diagonal is taken and put
    last, `sums` the axes that nothing else has.
    """

    labels: Layout
    split: bool
    diagonals: tuple[tuple[int, int], ...]
    sums: tuple[int, ...]


@dataclass(frozen=True)
class TermPlan:
    """One term: which of the network's tensors it takes, the products, and whether their results are computed again
    in the backward pass, not kept until then.

    The prepared tensors lie as `layouts` say, and what the last product leaves is turned into the order `result`, that
    of the output, which may have indices that the term lacks: `missing` are their axes.
    """

    tensors: tuple[int, ...]
    prepared: tuple[Prepared, ...]
    layouts: tuple[Layout, ...]
    steps: tuple[Step, ...]
    again: bool
    turn: Turn
    result: Layout
    missing: tuple[int, ...]


@dataclass(frozen=True)
class NetworkPlan:
    """One case of a network: its terms, and the axes of what it computes as groups of indices."""

    terms: tuple[TermPlan, ...]
    output: tuple[Layout, ...]


@dataclass(frozen=True)
class Found:
    """How a run-time size is found: that of an axis of a tensor, divided by the sizes of other indices."""

    index: str
    tensor: int
    axis: int
    others: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network's indices: known ones, and how to find the rest, in order.

    `given` are those that no tensor shows: the caller gives them.
    """

    static: tuple[tuple[str, int], ...]
    found: tuple[Found, ...]
    given: tuple[Index, ...]


def sizes_of(network: Network) -> Sizes:
    """How to find the sizes of a network's indices at run time."""
    indices = network.indices
    static = {name: i.size for name, i in indices.items() if isinstance(i.size, int)}
    known = {*static}
    found: list[Found] = []
    given: list[Index] = []

    def look() -> bool:
        """Find one more size."""
        for number, tensor in enumerate(network.tensors):
            for axis, group in enumerate(tensor.axes):
                rest = [i.name for i in group if i.name not in known]
                if len(rest) == 1:
                    others = tuple(i.name for i in group if i.name != rest[0])
                    found.append(Found(rest[0], number, axis, others))
                    known.add(rest[0])
                    return True
        return False

    while len(known) < len(indices):
        if look():
            continue
        index = next(i for name, i in indices.items() if name not in known)
        given.append(index)
        known.add(index.name)
    return Sizes(tuple(static.items()), tuple(found), tuple(given))


def plan_of(
    network: Network, sizes: Mapping[str, int], trained: Collection[str], profile: DeviceProfile, share: float
) -> NetworkPlan:
    """The plan of a network in the order that its terms have.

    `sizes` of the indices are those to plan for; `share` is as in `is_recomputed`.
    """
    terms = []
    start = 0
    for term in network.terms:
        positions = tuple(range(start, start + len(term.tensors)))
        terms.append(_term(network, term, positions, sizes, trained, profile, share))
        start += len(term.tensors)
    return NetworkPlan(tuple(terms), tuple(tuple(i.name for i in axis) for axis in network.output.axes))


def _term(
    network: Network,
    term: Term,
    positions: tuple[int, ...],
    sizes: Mapping[str, int],
    trained: Collection[str],
    profile: DeviceProfile,
    share: float,
) -> TermPlan:
    if term.windows or term.slices:
        raise UnsupportedError("convolutions are no networks in training", network.source)
    output = [i.name for i in network.output.indices]
    prepared = tuple(_prepared(term, p, output) for p in range(len(term.tensors)))
    cost = training_cost(network, term, sizes, trained, profile)
    lies = [_layout(p) for p in prepared]
    cost.layouts = lies
    arranged = cost.arrange(term.order)
    cut = best_cut(cost, arranged, share)
    steps, last = steps_of(arranged.pairs, lies, cut, cost.size)
    result = tuple(name for name in output if name in last)
    return TermPlan(
        positions,
        prepared,
        tuple(lies),
        tuple(steps),
        cut is None and is_recomputed(cost, arranged, share),
        tuple(last.index(name) for name in result),
        result,
        tuple(axis for axis, name in enumerate(output) if name not in last),
    )


def _prepared(term: Term, position: int, output: Sequence[str]) -> Prepared:
    tensor = term.tensors[position]
    labels = [i.name for i in tensor.indices]
    lies = list(labels)
    diagonals = []
    for name in dict.fromkeys(labels):
        while lies.count(name) > 1:
            first = lies.index(name)
            second = lies.index(name, first + 1)
            diagonals.append((first, second))
            lies = [n for k, n in enumerate(lies) if k not in (first, second)] + [name]
    elsewhere = {i.name for p, t in enumerate(term.tensors) if p != position for i in t.indices} | {*output}
    sums = tuple(k for k, name in enumerate(lies) if name not in elsewhere)
    return Prepared(tuple(labels), _is_split(tensor), tuple(diagonals), sums)


def _is_split(tensor: Tensor) -> bool:
    return any(len(axis) != 1 for axis in tensor.axes)


def _layout(prepared: Prepared) -> Layout:
    """How the indices of a prepared tensor lie."""
    lies = list(prepared.labels)
    for first, second in prepared.diagonals:
        name = lies[first]
        lies = [n for k, n in enumerate(lies) if k not in (first, second)] + [name]
    return tuple(name for k, name in enumerate(lies) if k not in prepared.sums)
