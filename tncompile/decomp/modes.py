"""Modes of an axis: one size written as a product of several that differ as little as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from tncompile.errors import TNCompileError


def balanced(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size` whose sum is least, in increasing order: ``balanced(768, 3) == (8, 8, 12)``.

    The product is always `size`: nothing is padded, so a prime gives ones. Among factorizations of one sum it is the
    one whose largest factor is smallest. Raises TNCompileError where either number is below 1.
    """
    if size < 1 or count < 1:
        raise TNCompileError(f"cannot split a size of {size} into {count} modes")
    return _balanced(size, count, 1)[2]


@lru_cache(maxsize=4096)
def _balanced(size: int, count: int, least: int) -> tuple[int, int, tuple[int, ...]]:
    """Sum, largest factor and factors of the best way with no factor below `least`; an endless sum if there is none."""
    best: tuple[int, int, tuple[int, ...]] = (2**62, 2**62, ())
    if count == 1:
        return (size, size, (size,)) if size >= least else best
    for factor in range(least, math.isqrt(size) + 1 if size > 1 else 2):
        if size % factor or factor**count > size:
            continue
        total, largest, factors = _balanced(size // factor, count - 1, factor)
        best = min(best, (factor + total, max(factor, largest), (factor, *factors)))
    return best


def useful_count(size: int, smallest: int = 4) -> int:
    """The most modes that a size splits into with none below `smallest`; 1 where there is no such way."""
    counts = range(1, max(1, size.bit_length()) + 1)
    return max((c for c in counts if min(balanced(size, c)) >= smallest), default=1)


def paired(rows: Sequence[int], columns: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Modes of two axes side by side, one pair for each site of a matrix product operator.

    Where one axis has fewer modes, ones are spread evenly between its own: rows (4, 4) beside columns (2, 3, 2, 3)
    are ((4, 2), (1, 3), (4, 2), (1, 3)).
    """
    sites = max(len(rows), len(columns))
    return tuple(zip(_spread(rows, sites), _spread(columns, sites), strict=True))


def places(count: int, sites: int) -> tuple[int, ...]:
    """The site of each of `count` modes when they are spread evenly over so many sites."""
    return tuple(k * sites // count for k in range(count))


def _spread(modes: Sequence[int], sites: int) -> tuple[int, ...]:
    spread = [1] * sites
    for place, mode in zip(places(len(modes), sites), modes, strict=True):
        spread[place] = mode
    return tuple(spread)
