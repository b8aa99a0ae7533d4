"""The global choice against all choices there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tncompile.tensorizer.search import Option, Plan, Sites, choose, front
from tncompile.tensorizer.sites import Part, Site

NUMBERS = st.floats(0.01, 1.0)


def site(name: str) -> Site:
    return Site((Part(name, np.zeros((4, 4)), (1,), (0,)),))


def options(name: str, numbers: list[tuple[float, float, float]]) -> tuple[Option, ...]:
    dense = Option(site(name), None, "fp32", 0.0, 1.0, 1000)
    return front([dense, *(Option(site(name), None, "int8", e, s, int(1000 * b)) for e, s, b in numbers)])


FRONTS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4), min_size=1, max_size=4)


@st.composite
def problems(draw: st.DrawFn) -> Sites:
    fronts = draw(FRONTS)
    return Sites(tuple(options(f"w{k}", numbers) for k, numbers in enumerate(fronts)), rest_seconds=0.5, rest_size=300)


def everything(sites: Sites) -> list[Plan]:
    return [Plan(chosen) for chosen in itertools.product(*sites.alone)]


@given(problems())
def test_front_keeps_what_nothing_is_better_than(sites: Sites) -> None:
    for kept in sites.alone:
        for a, b in itertools.permutations(kept, 2):
            assert not (a.error <= b.error and a.seconds <= b.seconds and a.size <= b.size)


@given(problems(), st.floats(0.05, 1.0))
def test_within_an_error_no_single_change_is_better(sites: Sites, limit: float) -> None:
    plan = choose(sites, "size", max_error=limit)
    assert plan is not None and plan.error <= limit * (1 + 1e-9)
    best = min(p.size for p in everything(sites) if p.error <= limit)
    # the hull misses at most what lies between two of its corners, which is one site's change
    assert plan.size - best <= max(max(o.size for o in f) - min(o.size for o in f) for f in sites.alone) + 30


@given(problems())
def test_a_loose_limit_takes_the_smallest_and_a_tight_one_nothing(sites: Sites) -> None:
    loose, tight = choose(sites, "size", max_error=100.0), choose(sites, "size", max_error=1e-9)
    assert loose is not None and tight is not None
    seconds, size = len(sites.alone) + 0.5, 1000 * len(sites.alone) + 300  # of everything dense
    best = min(0.02 * p.seconds / seconds + 0.98 * p.size / size for p in everything(sites))
    assert 0.02 * loose.seconds / seconds + 0.98 * loose.size / size == pytest.approx(best, rel=1e-6)
    assert all(option.error == 0 for option in tight.options)


@given(problems(), st.floats(0.3, 1.0))
def test_without_an_error_the_least_that_fits(sites: Sites, share: float) -> None:
    limit = share * (1000 * len(sites.alone) + 300)
    plan = choose(sites, "both", max_size=limit)
    fitting = [p for p in everything(sites) if p.size + 300 <= limit]
    if plan is None:
        assert not fitting
    else:
        assert plan.size + 300 <= limit
        assert plan.error >= min(p.error for p in fitting) - 1e-12


def test_sites_together_where_that_is_less() -> None:
    q, k = options("q", [(0.1, 0.5, 0.5)]), options("k", [(0.1, 0.5, 0.5)])
    both = Site((q[0].site.parts[0], k[0].site.parts[0]))
    shared = (Option(both, None, "fp32", 0.1, 0.6, 600),)
    plan = choose(Sites((q, k), (shared,)), "size", max_error=0.5)
    assert plan is not None and [o.site.name for o in plan.options] == ["q+k"]
    dear = (Option(both, None, "fp32", 0.1, 0.6, 1600),)
    plan = choose(Sites((q, k), (dear,)), "size", max_error=0.5)
    assert plan is not None and [o.site.name for o in plan.options] == ["q", "k"]


def test_speed_and_size_pull_apart() -> None:
    numbers = [(0.1, 0.1, 0.9), (0.1, 0.9, 0.1)]
    sites = Sites((options("w", numbers),))
    fast, small = choose(sites, "speed", max_error=0.2), choose(sites, "size", max_error=0.2)
    assert fast is not None and small is not None
    assert fast.seconds == pytest.approx(0.1)
    assert small.size == 100


def test_nothing_that_fits_is_none() -> None:
    sites = Sites((options("w", [(0.1, 0.5, 0.5)]),), rest_size=5000)
    assert choose(sites, "both", max_error=1.0, max_size=100) is None
    assert choose(sites, "both", max_size=100) is None
    assert choose(sites, "both", max_error=1.0, max_seconds=math.inf) is not None
