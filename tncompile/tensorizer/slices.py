"""A model cut into slices, each with one or a few replaced weights, where few values pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

from tncompile.tensorizer.flow import Flow, is_floating

MOST = 8
"""Replaced weights of a slice, above which it is cut again at places where more than the fewest values pass."""

WIDEST = 4
"""Values that may pass at a cut."""


@dataclass(frozen=True)
class Slice:
    """The varying nodes from `start` up to `end` (not included), in which replaced weights are trained together.

    `targets` are the values that are to be as the teacher's: those that pass the end, and outputs of the model.
    """

    name: str
    start: int
    end: int
    targets: tuple[int, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class _Cut:
    """Between two replaced weights: where the slice before ends, and where the one behind it begins."""

    end: int
    start: int


def slices_of(flow: Flow, changed: Iterable[str]) -> tuple[Slice, ...]:
    """The slices of a model in which weights are `changed`, in order; what lies outside of them is not trained.

    Cut where the fewest values pass that depend on weights: behind residual blocks, or behind each layer of a chain. A
    weight that several slices read can be trained in none of them: where a slice has no other, they become one.
    """
    replaced = frozenset(changed)
    places = [number for number, reads in enumerate(flow.reads) if reads & replaced]
    if not places or not flow.outputs:
        return ()
    last = _last(flow, places[-1])
    if last is None:
        return ()
    cuts = _cuts(flow, places)
    ends, starts = [c.end for c in cuts] + [last], [_first(flow, places[0])] + [c.start for c in cuts]
    bounds = _unshared(flow, [*zip(starts, ends, strict=True)], replaced)
    return tuple(_slice(flow, start, end, replaced) for start, end in bounds)


def trained(flow: Flow, part: Slice, cores: Iterable[str], others: bool, elsewhere: Iterable[str] = ()) -> list[str]:
    """The weights of a slice to train: its cores, biases and scales where `others`; none that is read `elsewhere`."""
    return trainable(flow, range(part.start, part.end), cores, others, elsewhere)


def trainable(
    flow: Flow, nodes: Iterable[int], cores: Iterable[str], others: bool, elsewhere: Iterable[str] = ()
) -> list[str]:
    """As `trained`, of any varying nodes."""
    read = frozenset[str]().union(*(flow.reads[number] for number in nodes)) & flow.parameters
    vectors = {key for key in read if max(flow.tensors[key].shape, default=1) == flow.tensors[key].numel()}
    return sorted((read & (frozenset(cores) | (vectors if others else frozenset()))) - frozenset(elsewhere))


def read_outside(flow: Flow, part: Slice) -> frozenset[str]:
    """The weights that are read before or behind a slice."""
    outside = [reads for number, reads in enumerate(flow.reads) if not part.start <= number < part.end]
    return frozenset[str]().union(*outside)


def _slice(flow: Flow, start: int, end: int, replaced: frozenset[str]) -> Slice:
    sites = sorted(frozenset[str]().union(*flow.reads[start:end]) & replaced)
    return Slice(_name(sites), start, end, _targets(flow, start, end), tuple(sites))


def _targets(flow: Flow, start: int, end: int) -> tuple[int, ...]:
    passing = [n for n in flow.live(end) if n >= start and flow.moving[n] and is_floating(flow.varying[n])]
    return tuple(sorted({*passing, *(n for n in flow.outputs if start <= n < end)}))


def _name(sites: Sequence[str]) -> str:
    """What the weights have in common: ``encoder.layer.3.attention``; else the first of them."""
    paths = zip(*(site.split(".") for site in sites), strict=False)
    common = [names[0] for names in takewhile(lambda names: len({*names}) == 1, paths)]
    return ".".join(common) or sites[0]


def _passing(flow: Flow, place: int) -> int:
    """How many values pass a place that depend on weights; too many where one is a tuple, or none is floating."""
    live = flow.live(place)
    whole = not any(isinstance(flow.varying[n].meta.get("val"), (tuple, list)) for n in live)
    moving = [n for n in live if flow.moving[n]]
    return len(moving) if whole and any(is_floating(flow.varying[n]) for n in moving) else WIDEST + 1


def _cuts(flow: Flow, places: Sequence[int], fewest: int = 1) -> list[_Cut]:
    """Cuts between replaced weights: all where `fewest` values pass; where slices then are large, more of them."""
    if len(places) < 2 or fewest > WIDEST or (fewest > 1 and len(places) <= MOST):
        return []
    found: list[_Cut] = []
    group = [places[0]]
    for before, behind in pairwise(places):
        narrow = [i for i in range(before + 1, behind + 1) if _passing(flow, i) <= fewest]
        if narrow:
            found += _cuts(flow, group, fewest + 1)
            found.append(_Cut(_end(flow, narrow), narrow[-1]))
            group = []
        group.append(behind)
    return found + _cuts(flow, group, fewest + 1)


def _end(flow: Flow, narrow: Sequence[int]) -> int:
    """The last of some places before the next matrix product or convolution: so norms and activations count."""
    for i in range(narrow[0], narrow[-1]):
        if _is_heavy(flow.varying[i]):
            return max(place for place in narrow if place <= i)
    return narrow[-1]


def _first(flow: Flow, place: int) -> int:
    """Where the first slice begins: with the norm in front of its first replaced weight, say, which may be trained."""
    light = takewhile(lambda i: not _is_heavy(flow.varying[i]), range(place - 1, len(flow.inputs) - 1, -1))
    return min([place, *light], key=lambda i: _passing(flow, i))


def _last(flow: Flow, place: int) -> int | None:
    """Where the last slice ends: with the outputs, or where the last floating values pass before them."""
    end = len(flow.varying)
    if any(flow.moving[n] for n in flow.outputs if n >= place):
        return end
    ends = [i for i in range(place + 1, end + 1) if 0 < _passing(flow, i) <= WIDEST]
    fewest = min((_passing(flow, i) for i in ends), default=0)
    return max((i for i in ends if _passing(flow, i) == fewest), default=None)


def _unshared(flow: Flow, bounds: list[tuple[int, int]], replaced: frozenset[str]) -> list[tuple[int, int]]:
    """Slices joined until each has a replaced weight that no other reads."""

    def reads(bound: tuple[int, int]) -> frozenset[str]:
        return frozenset[str]().union(*flow.reads[slice(*bound)]) & replaced

    while True:
        for number, bound in enumerate(bounds):
            own = reads(bound)
            sharing = [k for k, other in enumerate(bounds) if k != number and own & reads(other)]
            if sharing and not own - frozenset[str]().union(*(reads(bounds[k]) for k in sharing)):
                first, last = min(number, *sharing), max(number, *sharing)
                bounds = [*bounds[:first], (bounds[first][0], bounds[last][1]), *bounds[last + 1 :]]
                break
        else:
            return bounds


def _is_heavy(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return name in _HEAVY


_HEAVY = frozenset(
    {
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("lstm", "gru", "embedding"),
    }
)
