"""How much an error in one layer's output changes the outputs of the model: measured, weight by weight.

For small errors the model is linear in them, so ``output error = factor * local error``, where the local error is that
of the layer's output in the metric of its inputs: ``|x W - x V| / |x W|``. Errors of several layers are taken to be
independent: their squares add. `Sensitivities.additivity` says how far that is from true.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tncompile.ir import Array, Network, Program
from tncompile.tensorizer.evaluation import Evaluation
from tncompile.tensorizer.moments import Moments, local_error
from tncompile.tensorizer.sites import Site
from tncompile.tensorizer.upstream import Upstream

STRENGTHS = (0.05, 0.2)
"""Local errors of the noise that is tried where no perturbations are given."""

Perturbations = Mapping[str, Sequence[Mapping[str, Array]]]
"""For sites, by name, what their weights could become, by name: the smallest error first."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one site: the output error for each unit of its local error.

    `points` are the pairs (local, output) that were measured. Where time was short there are none, and the factor is
    that of the site `like`, or the median of all where that is empty.
    """

    factor: float
    points: tuple[tuple[float, float], ...] = ()
    like: str = ""


@dataclass(frozen=True)
class Sensitivities:
    """Those of all sites, by name. `additivity` is the output error of all perturbations at once, over the root of the
    sum of the squares of each alone: 1 where they are independent."""

    sites: Mapping[str, Sensitivity]
    additivity: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def predicted(self, local: Mapping[str, float]) -> float:
        """The output error for local errors of several sites."""
        return self.additivity * math.sqrt(sum((self.sites[name].factor * e) ** 2 for name, e in local.items()))


def site_error(site: Site, weights: Mapping[str, Array], moments: Mapping[str, Moments]) -> float:
    """The relative error in the outputs of a site with other weights; in its matrix, where the moments of its input
    are not known."""
    parts = [(part.matrix, np.asarray(part_matrix(site, weights, k))) for k, part in enumerate(site.parts)]
    exact, other = (np.concatenate(side, axis=1).astype(np.float64) for side in zip(*parts, strict=True))
    return local_error(exact, other, moments.get(site.parts[0].name))


def part_matrix(site: Site, weights: Mapping[str, Array], k: int) -> Array:
    """The matrix [in, out] of one part of a site with other weights; its own where they have none for it."""
    part = site.parts[k]
    axes = (*part.ins, *part.outs)
    array = weights.get(part.name, part.array)
    return np.asarray(array).transpose(axes).reshape(part.size(part.ins), part.size(part.outs))


def noise(site: Site, moments: Mapping[str, Moments], strength: float, seed: int = 0) -> dict[str, Array]:
    """The weights of a site with white noise that makes a local error of `strength`."""
    generator = np.random.default_rng(seed)
    drawn = {part.name: part.array + generator.standard_normal(part.array.shape) for part in site.parts}
    scale = strength / max(site_error(site, drawn, moments), 1e-30)
    return {
        part.name: (part.array + scale * (drawn[part.name] - part.array)).astype(part.array.dtype)
        for part in site.parts
    }


def sensitivities(
    sites: Sequence[Site],
    evaluation: Evaluation,
    moments: Mapping[str, Moments],
    perturbations: Perturbations | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Sensitivities:
    """Measure each site, in the order of the model, one pass over the calibration data for each perturbation.

    Where all passes would take more than `seconds`, they are over fewer data: a site that is not measured is judged
    worse than one that is measured on little. What is left after twice that all the same is estimated from measured
    sites of the same shape, or else from the median of all; one is measured in any case. Notes say both.
    """
    start, measured = clock(), dict[str, Sensitivity]()
    tried: dict[str, Array] = {}
    alone: list[float] = []
    order = _in_order(sites, evaluation.runner.model.program)
    perturbed = {site.name: (perturbations or {}).get(site.name, ()) for site in order}
    notes: tuple[str, ...] = ()
    if seconds is not None:
        passes = 1 + sum(len(given) or len(STRENGTHS) for given in perturbed.values())  # and all at once
        evaluation, whole = evaluation.within(seconds, passes, clock), evaluation
        if len(evaluation.calibration) < len(whole.calibration):
            samples = evaluation.calibration.samples
            notes = (f"how much each weight matters was measured on {samples} samples: there was no time for more",)
    state = Upstream(evaluation.runner, evaluation.calibration)

    def output_error(weights: Mapping[str, Array]) -> float:
        return evaluation.of_each(ran.outputs for ran in state.runs(weights, outputs=True))

    for number, site in enumerate(order):
        if seconds is not None and measured and clock() - start > 2 * seconds:
            break
        state.advance({part.name for later in order[number:] for part in later.parts})
        given = perturbed[site.name] or [noise(site, moments, strength) for strength in STRENGTHS]
        points = [(site_error(site, one, moments), output_error(one)) for one in given]
        measured[site.name] = Sensitivity(_factor(points), tuple(points))
        if not any(name in tried for name in given[0]):  # a site of several weights may stand beside those alone
            tried |= given[0]
            alone.append(points[0][1])
        progress(len(measured), len(sites))
    found = dict(measured)
    for site in order[len(measured) :]:
        found[site.name] = _estimate(site, sites, measured)
    if len(measured) < len(sites):
        guessed = len(sites) - len(measured)
        notes += (f"the sensitivity of {guessed} of {len(sites)} weights is estimated from like ones",)
    expected = math.sqrt(sum(e**2 for e in alone))
    together = evaluation.of_weights(tried) if len(alone) > 1 and expected > 0 else expected
    return Sensitivities(found, together / expected if expected > 0 else 1.0, notes)


def _in_order(sites: Sequence[Site], program: Program) -> list[Site]:
    """Sites by the first node that reads a weight of theirs."""
    first: dict[str, int] = {}
    for number, node in enumerate(program.nodes):
        for name in (core.name for core in node.cores) if isinstance(node, Network) else node.inputs:
            first.setdefault(name, number)
    return sorted(sites, key=lambda site: min(first.get(part.name, -1) for part in site.parts))


def _factor(points: Sequence[tuple[float, float]]) -> float:
    """The factor that fits best in the mean of logarithms, so that no strength outweighs another."""
    ratios = [output / local for local, output in points if local > 0]
    good = [ratio for ratio in ratios if 0 < ratio < math.inf]
    return math.exp(sum(map(math.log, good)) / len(good)) if good else max(ratios, default=0.0)


def _estimate(site: Site, sites: Sequence[Site], measured: Mapping[str, Sensitivity]) -> Sensitivity:
    """From the nearest site, in the order of the model, that has the same shape."""
    place = {other.name: k for k, other in enumerate(sites)}
    like = [o for o in sites if o.name in measured and (o.in_sizes, o.out_sizes) == (site.in_sizes, site.out_sizes)]
    if like:
        nearest = min(like, key=lambda other: abs(place[other.name] - place[site.name]))
        return Sensitivity(measured[nearest.name].factor, like=nearest.name)
    return Sensitivity(float(np.median([s.factor for s in measured.values()])))
