"""What there is to choose from: for each site, formats and ranks times bits, with their errors, times and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.runtime.quantize import BITS, STORED, stored_bytes
from tncompile.runtime.quantized_time import seconds as timed
from tncompile.runtime.tuner import feeds_of, model_of
from tncompile.tensorizer.candidates import Candidate
from tncompile.tensorizer.options import Way, options
from tncompile.tensorizer.prepare import Prepared
from tncompile.tensorizer.search import Option, Sites
from tncompile.tensorizer.sites import Replacement, Site

TIMING = 90.0
"""Seconds to time candidates in fewer bits for; after that, ratios are those of the dense layer."""

EACH = 0.12
"""Seconds for each of them at each batch size."""

_TABLE = ("fp32", "fp16", "int8-weights", "int8", "int4-weights", "int4")
_HELD = ("fp32", "fp16", "int8-weights", "int4-weights")
_KERNEL = ("fp32", "fp16", "int8-weights", "int8-static", "int4-weights")


def fronts(
    made: Prepared,
    bits: Sequence[str],
    dense_ms: Mapping[int, float],
    progress: Callable[[str], None],
    threads: int = 0,
) -> Sites:
    """The Pareto fronts of all sites of a model whose dense file takes `dense_ms` at each batch size.

    Predicted times count in the mean of the batch sizes, each relative to the dense model's there.
    """
    if made.data is None:  # whose activations have no known range
        bits = [b for b in bits if b != "int8-static"]
    weigh = _Weighing(made, dense_ms)
    clock = _Clock(made, time.perf_counter() + TIMING, threads)
    alone: list[tuple[Option, ...]] = []
    joint: list[tuple[Option, ...]] = []
    for sites, into in ((made.sites, alone), (made.joint, joint)):
        for number, site in enumerate(sites):
            progress(f"ways to keep {site.name} ({number + 1} of {len(sites)})")
            found = _options(made, site, _possible(site, bits), weigh, clock)
            if found:
                into.append(found)
    return Sites(tuple(alone), tuple(joint), weigh.rest, made.rest_size)


def _possible(site: Site, bits: Sequence[str]) -> tuple[str, ...]:
    part = site.parts[0]
    known: Sequence[str]
    if part.array.dtype != np.float32:
        known = ()  # only float32 is rounded
    elif part.held:
        known = _HELD
    elif part.gathered:
        known = _TABLE
    else:
        known = _KERNEL if any(use.term.windows for use in part.uses) else BITS
    return tuple(b for b in BITS if b in bits and b in known) or ("fp32",)


def _options(made: Prepared, site: Site, bits: Sequence[str], weigh: _Weighing, clock: _Clock) -> tuple[Option, ...]:
    found: list[Candidate | None] = [*made.candidates[site.name]]
    if len(site.parts) == 1:
        found.append(None)  # of several weights together, dense is what each is alone
    ways = []
    for candidate in found:
        replacement = None if candidate is None else candidate.replacement
        predicted = made.predictor.seconds(site, replacement)
        ratios = clock.ratios(site, replacement, bits)
        seconds = {b: weigh(tuple(t * r for t, r in zip(predicted, ratios[b], strict=True))) for b in bits}
        sizes = {b: _bytes(site, replacement, b) for b in bits}
        error = 0.0 if candidate is None else candidate.error
        ways.append(Way(replacement, error, {b: s for b, s in seconds.items() if s < math.inf}, sizes))
    return options(site, ways, made.sensitivity[site.name], made.statistics[site.name])


def _bytes(site: Site, replacement: Replacement | None, bits: str) -> int:
    """What the file holds: in ``fp32`` numbers of the weight's own dtype, which cores have too."""
    if bits == "fp32":
        numbers = site.size if replacement is None else replacement.parameters
        return numbers * site.parts[0].array.itemsize
    if replacement is None:
        return sum(stored_bytes(part.matrix.shape, bits, 0 if part.gathered else 1) for part in site.parts)
    cores = replacement.factorized.cores
    return sum(stored_bytes(core.shape, bits) for core in cores)


class _Weighing:
    """Seconds at each batch size as one number, in which the dense model takes the mean of what it takes at each.

    Where the networks of all sites are predicted to take longer than the whole dense file was measured to, predictions
    are scaled. `rest` is what the dense file takes beside these networks.
    """

    def __init__(self, made: Prepared, dense_ms: Mapping[int, float]) -> None:
        batches = made.context.batches
        predicted = np.sum([made.predictor.seconds(site) for site in made.sites], axis=0)
        measured = np.array([dense_ms.get(b, next(iter(dense_ms.values()))) / 1e3 for b in batches])
        self._scale = np.minimum(1.0, 0.95 * measured / np.maximum(predicted, 1e-12))
        mean = float(np.exp(np.mean(np.log(measured))))
        self._weights = mean / measured / len(batches)
        self.rest = max(0.0, mean - self(tuple(predicted)))

    def __call__(self, seconds: Sequence[float]) -> float:
        return float(np.sum(np.asarray(seconds) * self._scale * self._weights))


@dataclass
class _Clock:
    """How many times as long networks take in other bits, by measurement, while there is time for it."""

    made: Prepared
    end: float
    threads: int = 0

    def ratios(self, site: Site, replacement: Replacement | None, bits: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """For each of some bits the ratio to float32 at each batch size; inf where ONNX Runtime has no such way, and
        where a network cannot be timed."""
        batches = self.made.context.batches
        computed = [b for b in bits if b not in STORED and b != "fp32"]
        found = {b: [1.0] * len(batches) for b in bits}
        if not computed or site.parts[0].gathered:
            return {b: tuple(r) for b, r in found.items()}
        if replacement is not None and time.perf_counter() > self.end:
            return self.ratios(site, None, bits)
        for k, batch in enumerate(batches):
            for b, ratio in self._measured(site, replacement, computed, batch).items():
                found[b][k] = ratio
        return {b: tuple(r) for b, r in found.items()}

    def _measured(
        self, site: Site, replacement: Replacement | None, bits: Sequence[str], batch: int
    ) -> dict[str, float]:
        networks = self.made.predictor.planned(site, replacement, batch)
        symbols = self.made.context.symbols(batch)
        before, after = 0.0, dict.fromkeys(bits, 0.0)
        for network in networks:
            model, feeds = model_of(network), feeds_of(network, symbols)
            try:
                times = timed(model, ("fp32", *bits), feeds, budget_s=EACH * (1 + len(bits)), threads=self.threads)
            except TNCompileError:
                return dict.fromkeys(bits, math.inf)
            before += times["fp32"]
            for b in bits:
                after[b] += times[b]
        if not networks:
            return dict.fromkeys(bits, 1.0)
        return {b: after[b] / before if before < math.inf else math.inf for b in bits}
