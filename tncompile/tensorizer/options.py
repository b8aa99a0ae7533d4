"""The ways to keep each site: formats and ranks times bits, with the error, time and bytes expected of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tncompile.ir import Array
from tncompile.runtime.quantize import simulated
from tncompile.tensorizer.moments import Moments, local_error
from tncompile.tensorizer.search import Option, front
from tncompile.tensorizer.sites import Replacement, Site

UNKNOWN_ACTIVATIONS = 0.01
"""The relative error that activations of eight bits are taken to make where there is no data: normal numbers of a range
of six standard deviations on 255 steps."""

ROUNDED_ACTIVATIONS = ("int8", "int8-static")


@dataclass(frozen=True)
class Statistics:
    """What a site's inputs are like: their second moments (None where there is no data), and the step between two
    neighbours of 8 bits over the range that they take."""

    moments: Moments | None = None
    step: float | None = None


class Rounding:
    """The relative errors of a site's output that rounding makes, beside that of the format: where its parts are apart,
    that of the part most in error. `statistics` are those of each part's input."""

    def __init__(self, site: Site, replacement: Replacement | None, statistics: Sequence[Statistics]) -> None:
        self.site, self.replacement, self.statistics = site, replacement, statistics
        self._weights: dict[str, list[float]] = {}

    def error(self, bits: str) -> float:
        """That of some bits.

        Weights are rounded as they will be. Activations of eight bits are off by up to half a step, evenly, so that
        each input of a dot product adds ``step^2 / 12`` times its weight squared; every core has such inputs.
        """
        if bits == "fp32":
            return 0.0
        weights = self._of_weights(bits)
        if bits not in ROUNDED_ACTIVATIONS:
            return max(weights)
        cores = 1 if self.replacement is None else len(self.replacement.factorized.cores)
        inputs = (_of_activations(*piece) for piece in zip(self._exact, self._read, strict=True))
        return max(math.hypot(w, math.sqrt(cores) * a) for w, a in zip(weights, inputs, strict=True))

    @property
    def _read(self) -> Sequence[Statistics]:
        """Those of each input."""
        return self.statistics if self.site.apart else self.statistics[:1]

    @cached_property
    def _exact(self) -> list[Array]:
        return self._pieces(_dense(self.site, self.replacement))

    def _pieces(self, matrix: Array) -> list[Array]:
        """The matrix of each input."""
        return self.site.split(matrix) if self.site.apart else [matrix]

    def _of_weights(self, bits: str) -> list[float]:
        number = bits.partition("-")[0]  # whether activations are rounded too makes no difference to weights
        if number not in self._weights:
            other = self._pieces(_rounded(self.site, self.replacement, bits))
            pieces = zip(self._exact, other, self._read, strict=True)
            self._weights[number] = [local_error(a, b, read.moments) for a, b, read in pieces]
        return self._weights[number]


def _of_activations(exact: Array, read: Statistics) -> float:
    """The relative error that activations of eight bits make in the outputs of a matrix."""
    if read.moments is None or read.step is None:
        return UNKNOWN_ACTIVATIONS
    norm = read.moments.norm(exact)
    return read.step * float(np.linalg.norm(exact)) / math.sqrt(12) / norm if norm else 0.0


def _dense(site: Site, replacement: Replacement | None) -> Array:
    return np.asarray(site.matrix, np.float64) if replacement is None else replacement.factorized.dense()


def _rounded(site: Site, replacement: Replacement | None, bits: str) -> Array:
    """The matrix once its weight, or each of its cores, is rounded. Channels are outputs, for a table its rows."""
    if replacement is None:
        axis = 0 if site.parts[0].gathered else 1
        return np.asarray(simulated(site.matrix, bits, axis), np.float64)
    made = replacement.factorized
    cores = tuple(
        np.asarray(simulated(c, bits, _channels(made.labels[k])), np.float64) for k, c in enumerate(made.cores)
    )
    return replace(made, cores=cores).dense()


def _channels(labels: Sequence[str]) -> int:
    """The axis of a core that the outputs of its contraction lie along: its last bond or mode of the output."""
    return max(k for k, label in enumerate(labels) if k == len(labels) - 1 or label.startswith("o"))


def rounded(option: Option) -> dict[str, Array]:
    """The numbers of a site's weights as an option keeps them, by name, each in the shape of the weight."""
    site, replacement = option.site, option.replacement
    matrix = _dense(site, replacement) if option.bits == "fp32" else _rounded(site, replacement, option.bits)
    return site.restored(matrix)


@dataclass(frozen=True)
class Way:
    """A replacement (None: dense) with the relative error of the site's output, and for each of the bits that it can be
    kept in the seconds and bytes."""

    replacement: Replacement | None
    error: float
    seconds: Mapping[str, float]
    sizes: Mapping[str, int]


def options(
    site: Site, ways: Iterable[Way], sensitivity: float, statistics: Sequence[Statistics]
) -> tuple[Option, ...]:
    """The Pareto front of a site's ways; `sensitivity` is the relative error of the model's outputs over that of the
    site's."""
    found = []
    for way in ways:
        rounding = Rounding(site, way.replacement, statistics)
        for bits, seconds in way.seconds.items():
            local = math.hypot(way.error, rounding.error(bits))
            found.append(Option(site, way.replacement, bits, sensitivity * local, seconds, way.sizes[bits]))
    return front(found)
