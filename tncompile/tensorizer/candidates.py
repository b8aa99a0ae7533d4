"""What may take the place of a weight: formats and sizes, none of them worse than another in all that counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tncompile.decomp import Factorized, Split
from tncompile.tensorizer.cost import Cost, Predictor
from tncompile.tensorizer.families import Family, Matrix, Moments, families
from tncompile.tensorizer.sites import Replacement, Site

SHARES = tuple(0.75 * 2 ** (-k / 2) for k in range(11))
"""Sizes as shares of the dense weight: from 0.75 down to 0.023, each 0.71 of the one before."""


@dataclass(frozen=True)
class Candidate:
    """A replacement with what it costs.

    `error` is relative, in the norm of the layer's output where moments of its input were given, else of the weight.
    `seconds` are predicted at each batch size, for the networks that use the weight; none without a predictor. `bytes`
    are those of all that these networks hold (see `Cost`), without a predictor those of the cores.
    """

    replacement: Replacement
    error: float
    seconds: tuple[float, ...]
    bytes: int

    def beats(self, other: Candidate) -> bool:
        """Whether it is no worse in anything, and not the same in all."""
        mine, theirs = ((c.error, c.bytes, *c.seconds) for c in (self, other))
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def candidates(
    site: Site,
    moments: Moments | None = None,
    predictor: Predictor | None = None,
    shares: Sequence[float] = SHARES,
    kinds: Collection[str] | None = None,
) -> list[Candidate]:
    """The replacements of a site that no other beats in error, time and bytes, by decreasing size.

    Truncations are made in the metric of the layer's inputs, from second `moments` (see `Moments`), exactly for the SVD
    and as nearly as its modes allow for others. `kinds` are the formats to try, as they call themselves; all where
    None. Without a `predictor`, time does not count. TNCompileError for moments that do not fit, and for a weight that
    is not finite.
    """
    matrix = Matrix(site, moments)
    sizes = sorted({int(share * site.size) for share in shares if 0 < share < 1}, reverse=True)
    found: list[Candidate] = []
    for family in families(matrix):
        if kinds is not None and family.label.rstrip(" 0123456789") not in kinds:
            continue
        made = ((factorized, _error(matrix, family, factorized)) for factorized in family.ladder(sizes))
        found += _priced(site, made, predictor)
    return _kept(found)


def of_ladder(site: Site, made: Iterable[tuple[Factorized, float]], predictor: Predictor | None) -> list[Candidate]:
    """The candidates of some factorizations with their errors that no other beats, by decreasing size."""
    return _kept(_priced(site, made, predictor))


def _kept(found: Sequence[Candidate]) -> list[Candidate]:
    different = {(c.error, c.bytes, c.seconds): c for c in reversed(found)}
    kept = [c for c in different.values() if not any(other.beats(c) for other in found)]
    return sorted(kept, key=lambda c: (-c.bytes, c.error))


def _priced(site: Site, made: Iterable[tuple[Factorized, float]], predictor: Predictor | None) -> list[Candidate]:
    found = []
    for factorized, error in made:
        if factorized.parameters >= site.size or error >= 1:  # nothing at all would be nearer
            continue
        replacement = Replacement(site, factorized)
        size = replacement.parameters * site.parts[0].array.itemsize
        cost = Cost((), size) if predictor is None else predictor.cost(site, replacement)
        found.append(Candidate(replacement, error, cost.seconds, cost.bytes))
    return found


def _error(matrix: Matrix, family: Family, factorized: Factorized) -> float:
    """The bound where it is the error in the norm that counts, else the error as computed."""
    known = family.label == "SVD" or (matrix.moments is None and isinstance(factorized, Split))
    return factorized.bound if known and factorized.bound is not None else matrix.error(factorized)
