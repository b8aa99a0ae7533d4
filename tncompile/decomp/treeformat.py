"""What the formats share whose bonds form a tree."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp import blocks, tree
from tncompile.decomp.base import Axes, Factorized, Labels, as_modes, group_names, mode_names, normal_axes
from tncompile.decomp.metric import Metric, apply
from tncompile.decomp.ranks import EXACT, Ranks, clamp
from tncompile.errors import TNCompileError
from tncompile.ir import Array

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHED = "the bound is of the error in the metric of the inputs"
"""The note of what was made with a metric."""


@dataclass(frozen=True, eq=False)
class TreeFactorized(Factorized):
    """A format whose bonds form a tree, so that singular values rule each of them (see `tncompile.decomp.tree`)."""

    ROOT: ClassVar[int] = -1
    """The core that truncation leaves for last, and that is the center where none is named."""

    @classmethod
    @abstractmethod
    def layout(cls, axes: Axes) -> Labels:
        """The names of the axes of each core, for given modes. Raises TNCompileError where the format needs others."""

    @classmethod
    def default_axes(cls, shape: Sequence[int]) -> Axes:
        """The modes of a dense tensor where none are named: one for each axis."""
        return tuple((size,) for size in shape)

    @property
    def labels(self) -> Labels:
        """The names of the axes of each core."""
        return type(self).layout(self.axes)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        axes: Sequence[Sequence[int]] | None = None,
        ranks: Ranks = EXACT,
        *,
        metric: Metric | None = None,
        memory: int = blocks.MEMORY,
    ) -> Self:
        """Truncated singular value decompositions of a dense tensor, from the leaves to the root.

        `axes` are its modes, where not given those of `default_axes`. With a `metric` of the input, errors are
        measured in it. An array or `numpy.memmap` that takes over `memory` bytes as float64 is read in blocks. Raises
        NoGainError where the result is no smaller than the tensor, and TNCompileError for what cannot be factorized.
        """
        axes = normal_axes(axes or cls.default_axes(np.shape(dense)))
        return cls(**fit(cls.KIND, dense, axes, cls.layout(axes), cls.ROOT, ranks, metric, memory))

    def tree(self, center: int | None = None) -> tree.Tree:
        """The tree of the cores with a given root."""
        center = self.ROOT if center is None else center
        if not -len(self.cores) <= center < len(self.cores):
            raise TNCompileError(f"a {self.KIND} of {len(self.cores)} cores has no core {center}")
        return tree.Tree(self.labels, tuple(self.modes.items()), center % len(self.cores))

    def canonical(self, center: int | None = None) -> Self:
        """The same tensor; every core but that at `center` is an isometry towards it."""
        return replace(self, cores=tree.canonical(self.cores, self.tree(center)))

    def spectra(self) -> dict[str, Array]:
        """The singular values of the tensor across each bond, without those that are rounding."""
        return tree.sweep(self.cores, self.tree())[1]

    def truncated(self, ranks: Ranks) -> Self:
        """The same tensor with smaller bonds, from the cores alone; `bound` is the sum of the errors so far.

        An error is relative to the tensor as it is. Made with a metric, the result has no bound: the two norms do not
        add.
        """
        network = self.tree()
        exact, spectra = tree.sweep(self.cores, network)
        wanted, notes = clamp(ranks.choose(spectra, network.parameters, exact.norm), network.limits)
        result, _ = tree.sweep(exact.cores, network, wanted)
        known = self.bound is not None and WEIGHED not in self.notes
        bound = self.bound + result.bound if known and self.bound is not None else None
        return replace(self, cores=result.cores, bound=bound, notes=self.notes + notes)


def fit(
    kind: str,
    dense: Any,
    axes: Axes,
    labels: Labels,
    root: int,
    ranks: Ranks,
    metric: Metric | None = None,
    memory: int = blocks.MEMORY,
) -> dict[str, Any]:
    """Cores, axes, bound and notes of the network with these labels that is nearest to a dense tensor."""
    tensor = as_modes(dense, axes)
    names = mode_names(axes)
    network = tree.Tree(labels, tuple(zip(names, tensor.shape, strict=True)), root % len(labels))
    if metric is not None:
        if blocks.too_large(tensor, memory):
            raise TNCompileError(
                "a tensor larger than memory cannot be weighed by a metric: leave it out or allow more"
            )
        owners = _owners(kind, axes, labels, metric)
        tensor = metric.weigh(tensor)
    result = tree.decompose(tensor, network, ranks, memory)
    cores = list(result.cores)
    if metric is not None:
        for (core, axis), inverse in zip(owners, metric.inverses, strict=True):
            cores[core] = apply(inverse, cores[core], axis)
    ranks.require_gain(kind, sum(c.size for c in cores), math.prod(tensor.shape))
    notes = result.notes if metric is None else (*result.notes, WEIGHED)
    return {"cores": tuple(cores), "axes": axes, "bound": result.bound, "notes": notes}


def _owners(kind: str, axes: Axes, labels: Labels, metric: Metric) -> list[tuple[int, int]]:
    """For each mode of the input the one core, and its axis, on which the metric is undone."""
    if len(axes) != 2 or metric.modes != axes[0]:
        raise TNCompileError(f"a metric of modes {metric.modes} does not fit the input modes {axes[0]} of a {kind}")
    owners = []
    for name in group_names(axes, 0):
        (first, *others) = [k for k, on in enumerate(labels) if name in on]
        if others:
            raise TNCompileError(f"in a {kind} several cores have the input mode {name}: a metric cannot be undone")
        owners.append((first, labels[first].index(name)))
    return owners
