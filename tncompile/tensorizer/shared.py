"""Layers at different depths whose weights share the left factor of an SVD (basis sharing, arXiv:2410.03765)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tncompile.decomp import Factorized, Metric
from tncompile.ir import Array
from tncompile.tensorizer.candidates import SHARES, Candidate, of_ladder
from tncompile.tensorizer.cost import Predictor
from tncompile.tensorizer.ladders import Weighing, cut_ladder
from tncompile.tensorizer.moments import Moments, local_error
from tncompile.tensorizer.sites import Part, Site

_DEPTH = re.compile(r"(?<=\.)\d+(?=\.)")


def shared_sites(sites: Sequence[Site], joint: Sequence[Site] = ()) -> tuple[Site, ...]:
    """Sites of two weights each at neighbouring depths: of one shape, and of one name but for the first number in its
    path, as ``layers.0.up.weight`` and ``layers.1.up.weight``. Weights of one `joint` site are none."""
    together = [{part.name for part in site.parts} for site in joint]
    rows: dict[object, dict[int, Part]] = {}
    for site in sites:
        (part,) = site.parts
        depth = _DEPTH.search(part.name)
        if depth is not None and part.uses and not part.uses[0].term.windows:
            name = f"{part.name[: depth.start()]}#{part.name[depth.end() :]}"
            key = (name, part.array.shape, part.ins, part.outs, part.array.dtype)
            rows.setdefault(key, {})[int(depth[0])] = part
    pairs = []
    for row in rows.values():
        depths = sorted(row)
        pairs += [(row[a], row[b]) for a, b in zip(depths[::2], depths[1::2], strict=False)]
    return tuple(
        Site(pair, apart=True) for pair in pairs if not any({part.name for part in pair} <= group for group in together)
    )


def shared_candidates(
    site: Site, moments: Sequence[Moments | None], predictor: Predictor, shares: Sequence[float] = SHARES
) -> list[Candidate]:
    """SVDs of the weights of a site `apart` side by side, that no other beats; `moments` are those of each one's input.

    Truncated in the mean of the metrics of the inputs, each to the same power, with each weight scaled such that its
    outputs there are of norm 1. The error is that of the part whose outputs are most in error.
    """
    parts = [np.asarray(part.matrix, np.float64) for part in site.parts]
    metric = _mean(moments)
    weighing = Weighing() if metric is None else Weighing(metric)
    scales = [1.0 / (float(np.linalg.norm(weighing.weigh(part))) or 1.0) for part in parts]
    columns = np.repeat(scales, [part.shape[1] for part in parts])
    scaled = np.concatenate(parts, axis=1) * columns
    axes = ((scaled.shape[0],), (scaled.shape[1],))
    sizes = sorted({int(share * site.size) for share in shares}, reverse=True)

    def ladder() -> Iterator[tuple[Factorized, float]]:
        for made in cut_ladder(scaled, axes, (0,), weighing, sizes):
            factorized = replace(made, cores=(made.cores[0], made.cores[1] / columns), bound=None)
            yield factorized, _worst(parts, site.split(factorized.dense()), moments)

    return of_ladder(site, ladder(), predictor)


def _worst(parts: Sequence[Array], others: Sequence[Array], moments: Sequence[Moments | None]) -> float:
    """The largest of the relative errors of the outputs of some matrices, with others in their place."""
    return max(local_error(a, b, m) for a, b, m in zip(parts, others, moments, strict=True))


def _mean(moments: Sequence[Moments | None]) -> Metric | None:
    """The metric of several inputs together; None where one is not known, or no matrix."""
    known = [m for m in moments if m is not None and m.exact]
    if len(known) < len(moments):
        return None
    powers = [float(np.trace(m.factors[0])) or 1.0 for m in known]
    rows = min(m.rows for m in known)
    mean = sum(m.factors[0] / power for m, power in zip(known, powers, strict=True))
    return replace(known[0], factors=(np.asarray(mean),), rows=rows).metric()
