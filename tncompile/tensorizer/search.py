"""The global choice: one way for each site, by a Lagrangian over their Pareto fronts.

Errors of sites are taken to add up as squares, weighed by how much each site's error changes the model's outputs:
``error^2 = sum (sensitivity_i * error_i)^2``; times and sizes add up. For a price `p` of squared error every site takes
the way that minimizes ``cost + p * error^2`` on its own, which is the lower convex hull of all choices (Everett 1963,
"Generalized Lagrange multiplier method"); what is left of the budget is then spent greedily.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tncompile.tensorizer.budget import Prefer
from tncompile.tensorizer.sites import Replacement, Site

_ROUNDS = 60
"""Bisections of the price; each halves its logarithm's range."""


@dataclass(frozen=True)
class Option:
    """One way to keep the weights of a site.

    `error` is the relative error of the model's outputs that it is expected to make alone, `seconds` the time of the
    site's networks (the mean over the batch sizes), `size` the bytes of its weights. `replacement` is None where the
    weight stays dense; `bits` as in `tncompile.runtime.quantize`.
    """

    site: Site = field(repr=False)
    replacement: Replacement | None = field(repr=False)
    bits: str
    error: float
    seconds: float
    size: int

    @property
    def label(self) -> str:
        """What it is, in a few words: ``SVD r1=32, int8``."""
        if self.replacement is None:
            return f"dense, {self.bits}"
        made = self.replacement.factorized
        return f"{made.KIND} {' '.join(f'{bond}={size}' for bond, size in made.ranks.items())}, {self.bits}"


@dataclass(frozen=True)
class Plan:
    """An option for every site; `error`, `seconds` and `size` are what that is expected to give for all of them."""

    options: tuple[Option, ...]

    @property
    def error(self) -> float:
        """The expected relative error of the outputs."""
        return math.sqrt(math.fsum(o.error**2 for o in self.options))

    @property
    def seconds(self) -> float:
        """The predicted time of all networks of the sites."""
        return math.fsum(o.seconds for o in self.options)

    @property
    def size(self) -> int:
        """The bytes of all weights of the sites."""
        return sum(o.size for o in self.options)


@dataclass(frozen=True)
class Sites:
    """What there is to choose from: for each site its front, and for each group of sites that of the site that takes
    the place of all of them. `rest_seconds` and `rest_size` are those of everything else in the model."""

    alone: tuple[tuple[Option, ...], ...]
    joint: tuple[tuple[Option, ...], ...] = ()
    rest_seconds: float = 0.0
    rest_size: float = 0.0

    def cheapest(self, value: Callable[[Option], float]) -> Plan:
        """For each site the option of the least value, together where that is less than all of them apart."""
        best = {options[0].site.name: min(options, key=value) for options in self.alone}
        for options in self.joint:
            together = min(options, key=value)
            members = [part.name for part in options[0].site.parts]
            if all(name in best for name in members) and value(together) < sum(value(best[name]) for name in members):
                for name in members:
                    del best[name]
                best[together.site.name] = together
        return Plan(tuple(best.values()))


def front(options: Iterable[Option]) -> tuple[Option, ...]:
    """The options that no other is at least as good as in error, time and size; by increasing error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.error, o.seconds, o.size)):
        if not any(o.seconds <= option.seconds and o.size <= option.size for o in kept):
            kept.append(option)
    return tuple(kept)


def choose(
    sites: Sites,
    prefer: Prefer,
    *,
    max_error: float | None = None,
    max_seconds: float | None = None,
    max_size: float | None = None,
) -> Plan | None:
    """The plan that minimizes time, size or both within an error; or, without one, the error within time and size.

    Limits are on the whole model: the rest of it counts. None where no plan is within them.
    """
    if max_error is not None:
        found = [
            plan
            for share in _shares(prefer, max_seconds, max_size)
            if (plan := _within(sites, share, max_error)) is not None and _fits(plan, sites, max_seconds, max_size)
        ]
        return min(found, key=lambda p: _value(p, sites, prefer)) if found else None
    found = []
    for share in _shares("both", max_seconds, max_size):
        plan = _least_error(sites, share, lambda p: _fits(p, sites, max_seconds, max_size))
        if plan is not None:
            found.append(plan)
    return min(found, key=lambda p: p.error) if found else None


def _shares(prefer: Prefer, max_seconds: float | None, max_size: float | None) -> Sequence[float]:
    """How much of the cost is time, the rest being size; several are tried where both matter."""
    if max_seconds is None and max_size is None:
        return {"speed": (0.98,), "size": (0.02,), "both": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)}[prefer]
    return (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


def _value(plan: Plan, sites: Sites, prefer: Prefer) -> float:
    seconds, size = plan.seconds + sites.rest_seconds, plan.size + sites.rest_size
    if prefer == "speed":
        return math.log(seconds) + 0.02 * math.log(size)
    if prefer == "size":
        return math.log(size) + 0.02 * math.log(seconds)
    return math.log(seconds) + math.log(size)


def _fits(plan: Plan, sites: Sites, max_seconds: float | None, max_size: float | None) -> bool:
    return (max_seconds is None or plan.seconds + sites.rest_seconds <= max_seconds) and (
        max_size is None or plan.size + sites.rest_size <= max_size
    )


def _cost(sites: Sites, share: float) -> Callable[[Option], float]:
    """A cost to add up: shares of the time and of the size of the least erroneous plan."""
    exact = sites.cheapest(lambda o: o.error)
    seconds = (exact.seconds + sites.rest_seconds) or 1.0
    size = (exact.size + sites.rest_size) or 1.0
    return lambda o: share * o.seconds / seconds + (1 - share) * o.size / size


def _priced(sites: Sites, cost: Callable[[Option], float], price: float) -> Plan:
    return sites.cheapest(lambda o: cost(o) + price * o.error**2)


def _within(sites: Sites, share: float, max_error: float) -> Plan | None:
    """The cheapest plan on the hull whose error is within a limit, improved greedily."""
    cost = _cost(sites, share)
    exact = sites.cheapest(lambda o: o.error)
    if exact.error > max_error:
        return None
    low, high, best = -20.0, 40.0, exact
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        plan = _priced(sites, cost, math.exp(middle))
        if plan.error <= max_error:
            best, high = plan, middle
        else:
            low = middle
    return _greedy(sites, best, cost, max_error)


def _least_error(sites: Sites, share: float, fits: Callable[[Plan], bool]) -> Plan | None:
    """The plan of least error on the hull that fits."""
    cost = _cost(sites, share)
    exact = sites.cheapest(lambda o: o.error)
    if fits(exact):
        return exact
    low, high, best = -20.0, 40.0, None
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        plan = _priced(sites, cost, math.exp(middle))
        if fits(plan):
            best, low = plan, middle
        else:
            high = middle
    return best


def _greedy(sites: Sites, plan: Plan, cost: Callable[[Option], float], max_error: float) -> Plan:
    """Single changes that save most for the error they add, as long as there are such within the limit."""
    fronts = {options[0].site.name: options for options in (*sites.alone, *sites.joint)}
    while True:
        squared, best, saved = plan.error**2, None, 0.0
        for k, now in enumerate(plan.options):
            for option in fronts[now.site.name]:
                gain = cost(now) - cost(option)
                if gain > saved and squared - now.error**2 + option.error**2 <= max_error**2:
                    best, saved = (k, option), gain
        if best is None:
            return plan
        plan = Plan(tuple(best[1] if k == best[0] else o for k, o in enumerate(plan.options)))
