"""A weight of a model as cores and the einsum that rebuilds it: what the graph gets in the weight's place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from tncompile.frontend.model import LoadedModel
    from tncompile.frontend.onnx.importer import OnnxModel

Model = TypeVar("Model", bound="LoadedModel")

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, eq=False)
class Core:
    """A new parameter of the model, and the names of the modes and bonds that are its axes."""

    name: str
    array: Array = field(repr=False)
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """An einsum of one or two tensors: of cores, which are numbered first, and of results of earlier steps."""

    equation: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """``weight = einsum(cores -> modes).reshape(sizes).transpose(order)``.

    `weight` is the name that the program imported from the model gives the weight. Cores of one name in several weights
    are one parameter. TNCompileError where the modes are not as many numbers as the weight.
    """

    weight: str
    cores: tuple[Core, ...]
    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        found: dict[str, int] = {}
        for core in self.cores:
            for label, size in zip(core.labels, core.array.shape, strict=True):
                if found.setdefault(label, size) != size:
                    raise TNCompileError(f"cores of {self.weight} disagree: {label} is {found[label]} and {size}")
        if {*self.modes} - {*found} or math.prod(found[m] for m in self.modes) != math.prod(self.sizes):
            raise TNCompileError(f"the cores of {self.weight} have not the modes of a weight of shape {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.sizes[axis] for axis in self.order)

    @cached_property
    def rebuilding(self) -> Rebuilding:
        """How a graph computes the weight."""
        mode_sizes = {n: s for core in self.cores for n, s in zip(core.labels, core.array.shape, strict=True)}
        groups = _grouped([(mode, mode_sizes[mode]) for mode in self.modes], self.sizes)
        if groups is None:  # the modes do not nest with the weight's axes: they are put in order after a view
            steps = _steps(self.cores, self.modes)
            moved = self.order != tuple(sorted(self.order))
            return Rebuilding(steps, self.sizes, self.order if moved else None)
        modes = tuple(mode for axis in self.order for mode in groups[axis])
        regrouped = tuple(mode_sizes[mode] for mode in modes) != self.shape
        return Rebuilding(_steps(self.cores, modes), self.shape if regrouped else None, None)


@dataclass(frozen=True)
class Rebuilding:
    """Einsums, then a view as `shape`, then a permutation; None where there is nothing to do."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...] | None
    order: tuple[int, ...] | None


def substitute(model: Model, factors: Iterable[Factors]) -> Model:
    """The model with cores in the place of weights, which einsums rebuild where they were read.

    Nothing else changes: nodes keep their names, other weights are shared with the model that came in. No dense weight
    is left behind, nor what it was computed from where nothing else reads that. TNCompileError where the model has no
    such weight, or writes to it.
    """
    import torch

    chosen = tuple(factors)
    _check(chosen)
    if isinstance(model, torch.export.ExportedProgram):
        from tncompile.frontend.substituted import substitute_exported

        return cast("Model", substitute_exported(model, chosen))
    from tncompile.frontend.onnx.substituted import substitute_onnx

    return cast("Model", substitute_onnx(cast("OnnxModel", model), chosen))


def _check(factors: Sequence[Factors]) -> None:
    """TNCompileError where one name stands for two weights, or for two cores."""
    weights, cores = set[str](), dict[str, Array]()
    for one in factors:
        if one.weight in weights:
            raise TNCompileError(f"{one.weight} is replaced twice")
        weights.add(one.weight)
        for core in one.cores:
            if cores.setdefault(core.name, core.array) is not core.array:
                raise TNCompileError(f"two cores would be called {core.name}")


def _grouped(modes: Sequence[tuple[str, int]], sizes: Sequence[int]) -> list[list[str]] | None:
    """The modes of each axis, in row-major order; None where an axis ends within a mode."""
    groups: list[list[str]] = []
    left = list(modes)
    for size in sizes:
        group, have = list[str](), 1
        while have < size:
            name, count = left.pop(0)
            group.append(name)
            have *= count
        if have != size:
            return None
        groups.append(group)
    if groups:
        groups[-1] += [name for name, _ in left]  # of size 1
    return groups


def _steps(cores: Sequence[Core], modes: Sequence[str]) -> tuple[Step, ...]:
    """Pairwise einsums along the cheapest order, which is never through more than it must be."""
    labels = [core.labels for core in cores]
    if len(cores) == 1:
        return (_step([labels[0]], modes, (0,)),)
    numbers = list(range(len(cores)))
    steps = []
    for a, b in _path(cores, modes):
        pair = (numbers[a], numbers[b])
        numbers = [n for k, n in enumerate(numbers) if k not in (a, b)]
        needed = {*modes}.union(*(labels[n] for n in numbers))
        both = dict.fromkeys((*labels[pair[0]], *labels[pair[1]]))
        result = tuple(n for n in both if n in needed) if numbers else tuple(modes)
        steps.append(_step([labels[n] for n in pair], result, pair))
        numbers.append(len(labels))
        labels.append(result)
    return tuple(steps)


def _path(cores: Sequence[Core], modes: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of positions among what is left, results going last, as numpy and opt_einsum write them."""
    number: dict[str, int] = {}
    args: list[Any] = []
    for core in cores:
        args += [
            np.broadcast_to(np.float32(0), core.array.shape),
            [number.setdefault(n, len(number)) for n in core.labels],
        ]
    kind = "optimal" if len(cores) <= 6 else "greedy"
    path = np.einsum_path(*args, [number[m] for m in modes], optimize=kind)[0][1:]
    if all(len(pair) == 2 for pair in path):
        return [(min(pair), max(pair)) for pair in path]
    return [(0, 1), *((0, left - 1) for left in range(len(cores) - 1, 1, -1))]  # nothing is summed: any order does


def _step(labels: Sequence[Sequence[str]], result: Sequence[str], inputs: tuple[int, ...]) -> Step:
    names = dict.fromkeys(name for part in labels for name in part)
    if len(names) > len(LETTERS):
        raise TNCompileError(f"{len(names)} modes and bonds meet in one step, more than an einsum can name")
    letter = dict(zip(names, LETTERS, strict=False))
    left, right = (["".join(letter[n] for n in part) for part in parts] for parts in (labels, [result]))
    return Step(f"{','.join(left)}->{right[0]}", inputs)
