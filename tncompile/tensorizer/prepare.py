"""What a search begins with: the sites of a model, what their inputs are like, and how much each of them matters."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tncompile.compiler import DEFAULT_BATCH, Progress, planning_context
from tncompile.cost.devices import choose as choose_profile
from tncompile.cost.profile import DeviceProfile
from tncompile.errors import TNCompileError
from tncompile.frontend.importer import import_exported
from tncompile.frontend.model import ImportedModel, LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array, Program
from tncompile.passes import Context
from tncompile.runtime.inputs import random_inputs
from tncompile.runtime.quantize import simulated
from tncompile.tensorizer.budget import FORMATS
from tncompile.tensorizer.candidates import Candidate, candidates
from tncompile.tensorizer.cost import Predictor
from tncompile.tensorizer.data import Calibration, collect, load
from tncompile.tensorizer.evaluation import Evaluation
from tncompile.tensorizer.inputs import Reading, readings
from tncompile.tensorizer.moments import Moments, moments
from tncompile.tensorizer.options import Statistics
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sensitivity import sensitivities
from tncompile.tensorizer.shared import shared_candidates, shared_sites
from tncompile.tensorizer.sites import MIN_SIZE, Site, composed, joint_sites, separate, sites_of

SENSITIVITY, SAMPLES = 90.0, 128
"""Seconds for measuring how much each weight matters, and samples to do that on."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to be searched.

    `sensitivity` has for each site the relative error of the model's outputs over that of the site's output; without
    calibration data (`data` is None) the share of the site's weights in all weights, so that errors are those of the
    weights. `additivity` is the error of all sites together over the root of the sum of squares. `feeds` are inputs
    for timing, by batch size.
    """

    traced: ImportedModel
    context: Context
    program: Program
    sites: tuple[Site, ...]
    joint: tuple[Site, ...]
    predictor: Predictor = field(repr=False)
    runner: Runner
    data: Calibration | None
    held: Calibration | None
    candidates: Mapping[str, Sequence[Candidate]] = field(repr=False)
    statistics: Mapping[str, Sequence[Statistics]] = field(repr=False)
    sensitivity: Mapping[str, float]
    additivity: float
    feeds: Mapping[int, Mapping[str, Array]] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> list[dict[str, Array]]:
        """Calibration data to choose and to train on."""
        return [] if self.data is None else [*self.data]

    @property
    def rest_size(self) -> int:
        """Bytes of all weights that are no sites."""
        mine = {part.name for site in self.sites for part in site.parts}
        return sum(array.nbytes for name, array in self.program.arrays.items() if name not in mine)

    @property
    def inputs(self) -> list[str]:
        """The names of the model's inputs."""
        return [value.name for value in self.traced.program.inputs]

    @property
    def described(self) -> str:
        """The data that errors are measured on."""
        if self.data is None or self.held is None:
            return "without calibration data: errors are those of the weights"
        return f"calibrated on {self.data.samples} samples; errors are on {self.held.samples} others, chosen by too"


def prepare(
    loaded: LoadedModel, calibration: Any, formats: Sequence[str], compiling: Mapping[str, Any], progress: Progress
) -> Prepared:
    """Find the sites, take the statistics of their inputs, factorize them, and measure how much each matters.

    TNCompileError where there is nothing to tensorize, or the calibration data do not fit.
    """
    traced = loaded if isinstance(loaded, OnnxModel) else import_exported(loaded)
    context = _context(traced, compiling)
    program = composed(traced, context)
    sites = sites_of(program)
    if not sites:
        raise TNCompileError(f"there are no weights of {MIN_SIZE:,} numbers or more in networks or tables to tensorize")
    joint = joint_sites(sites) if "svd" in formats else ()
    joint += shared_sites(sites, joint) if "svd" in formats else ()
    runner = Runner(traced)
    whole = _data(calibration, traced)
    data, held = (None, None) if whole is None else whole.split()
    known: dict[str, Moments] = {}
    if data is not None:
        progress(f"statistics of the inputs of {len(sites)} weights, {data.samples} samples")
        known = moments(sites, runner, data)
    predictor = Predictor(program, context)
    ways: dict[str, list[Candidate]] = {}
    kinds = {kind for name in formats for kind in FORMATS[name]}
    for number, site in enumerate((*sites, *joint)):
        progress(f"factorizing {site.name} ({number + 1} of {len(sites) + len(joint)})")
        inputs = [known.get(part.name) for part in site.parts]
        if site.apart:
            ways[site.name] = shared_candidates(site, inputs, predictor)
        else:
            ways[site.name] = candidates(site, None if inputs[0] is None else inputs[0].arrays, predictor, kinds=kinds)
    notes = () if whole is None else (*whole.notes, *(held.notes if held is not None else ()))
    steps = {} if data is None else _steps(traced, sites, runner, data)
    found, additivity = _shares(sites), 1.0
    if data is not None:
        evaluation = Evaluation(runner, data.take(SAMPLES))

        def measured(done: int, total: int) -> None:
            progress(f"how much each weight matters ({done} of {total})")

        tried = {site.name: _perturbed(site, ways[site.name]) for site in sites}
        result = sensitivities(sites, evaluation, known, tried, SENSITIVITY, measured)
        found = {name: one.factor for name, one in result.sites.items()}
        additivity, notes = max(1.0, result.additivity), (*notes, *result.notes)
    for site in joint:  # their error is that of all parts together
        found[site.name] = math.sqrt(sum(found[part.name] ** 2 for part in site.parts))
    statistics = {
        site.name: tuple(Statistics(known.get(part.name), steps.get(part.name)) for part in site.parts)
        for site in (*sites, *joint)
    }
    feeds = _feeds(traced, context, whole)
    return Prepared(
        traced=traced,
        context=context,
        program=program,
        sites=sites,
        joint=joint,
        predictor=predictor,
        runner=runner,
        data=data,
        held=held,
        candidates=ways,
        statistics=statistics,
        sensitivity=found,
        additivity=additivity,
        feeds=feeds,
        notes=notes,
    )


def _context(traced: ImportedModel, compiling: Mapping[str, Any]) -> Context:
    threads = compiling.get("threads", 0)
    profile = compiling.get("profile")
    chosen = profile if isinstance(profile, DeviceProfile) else choose_profile(profile, threads=threads).profile
    batch = compiling.get("batch", DEFAULT_BATCH)
    batches = [batch] if isinstance(batch, int) else batch
    context = planning_context(traced, batches, compiling.get("sizes") or {}, chosen, compiling.get("max_memory"))
    return replace(context, compact=bool(compiling.get("compact")))


def _data(calibration: Any, traced: ImportedModel) -> Calibration | None:
    if calibration is None:
        return None
    if isinstance(calibration, (str, os.PathLike)):
        return load(Path(calibration), traced)
    return collect(calibration, traced)


def _perturbed(site: Site, ways: Sequence[Candidate]) -> list[dict[str, Array]]:
    """What a site may become, to be tried: a truncation in the middle, and eight bits."""
    middle = [ways[len(ways) // 2].replacement.dense()] if ways else []
    axis = 0 if site.parts[0].gathered else 1
    return [*middle, site.restored(simulated(site.matrix, "int8-weights", axis))]


def _shares(sites: Sequence[Site]) -> dict[str, float]:
    """The share of each site's weights in the norm of all of them."""
    norms = {site.name: float(np.linalg.norm(site.matrix)) for site in sites}
    whole = math.sqrt(sum(norm**2 for norm in norms.values())) or 1.0
    return {name: norm / whole for name, norm in norms.items()}


def _steps(traced: ImportedModel, sites: Sequence[Site], runner: Runner, data: Calibration) -> dict[str, float]:
    """For each weight the step of eight bits over the range of its input, on a few runs."""
    parts = [part for site in sites for part in site.parts]
    uses = {
        name: found[0] for name, found in readings(separate(traced), parts).items() if isinstance(found[0], Reading)
    }
    names = sorted({value for use in uses.values() for value in use.values})
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feeds in data.take(SAMPLES // 4):
        for name, array in runner.run(feeds, None, names, outputs=False).values.items():
            if array.size:
                low[name], high[name] = min(low[name], float(array.min())), max(high[name], float(array.max()))
    return {
        weight: (high[use.values[0]] - low[use.values[0]]) / 255 for weight, use in uses.items() if len(use.values) == 1
    }


def _feeds(traced: ImportedModel, context: Context, data: Calibration | None) -> dict[int, Mapping[str, Array]]:
    """Inputs at each batch size, random ones; where the batch is fixed, a run of the data if there are any."""
    generator = np.random.default_rng(0)
    if "batch" not in traced.sizes:
        return {0: next(iter(data)) if data is not None else random_inputs(traced, traced.sizes, generator)}
    found: dict[int, Mapping[str, Array]] = {}
    for batch in context.batches:
        found[batch] = random_inputs(traced, {**context.sizes, "batch": batch}, generator)
    return found
