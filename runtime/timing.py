"""Fair timing of several ways to do the same thing.

Everything that is compared runs in one process and takes turns: one *round* gives each entrant a block of calls, in a
new order every time, so that a machine that slows down for a second slows all of them. What is reported are medians
over the rounds, and ratios as the median of the ratios within a round.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from tncompile.cost.devices import processor

#: Thread pools of PyTorch and ONNX Runtime keep spinning for a moment after a call; a pause this long lets them fall
#: asleep, so that an entrant does not pay for the one before it.
PAUSE_S = 0.003

#: The rounds of a race, and of one that runs out of time.
ROUNDS, MIN_ROUNDS = 150, 5

#: An entrant this many times slower than the fastest is out of the running: it takes part in the first few rounds only,
#: and not even in those where one call takes longer than `SLOW_MS`.
HOPELESS, FEW_ROUNDS, SLOW_MS = 4.0, 3, 500.0


def wait_politely() -> None:
    """Make PyTorch's threads sleep soon when there is nothing to do; of no effect once torch is imported.

    By default they spin for milliseconds at every barrier. Where anything else wants the cores, threads of ONNX Runtime
    among it, a call of half a millisecond was then seen to take over a hundred.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


@dataclass(frozen=True)
class Race:
    """Milliseconds a call, by entrant: one sample a round, NaN where it sat out."""

    samples: Mapping[str, NDArray[np.float64]]

    def median(self, name: str) -> float:
        """The median time of a call, in ms."""
        return float(np.nanmedian(self.samples[name]))

    def rounds(self, name: str) -> int:
        """How many rounds an entrant took part in."""
        return int(np.isfinite(self.samples[name]).sum())

    def fastest(self) -> str:
        """The entrant with the lowest median."""
        return min(self.samples, key=self.median)

    def ratio(self, name: str, other: str) -> float:
        """How long ``name`` takes against ``other`` in the same round: the median of the ratios."""
        return float(np.nanmedian(self.samples[name] / self.samples[other]))

    def without(self, *names: str) -> Race:
        """The race of all the others."""
        return Race({key: value for key, value in self.samples.items() if key not in names})


def race(
    entrants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    block_ms: float = 2.0,
    budget_s: float = 10.0,
    seed: int = 0,
) -> Race:
    """Time the entrants against each other for ``rounds`` rounds, or until ``budget_s`` is spent.

    A block is as many calls as take ``block_ms``, at least one, after one call that is not timed and brings the
    entrant's weights back into the caches. Many short blocks are worth more than few long ones: what else the machine
    does then spoils whole rounds, which the medians pass over. `MIN_ROUNDS` may overrun the budget, up to three times.
    """
    firsts = {name: _first_ms(call) for name, call in entrants.items()}
    limit = HOPELESS * min(firsts.values(), default=0.0)
    last = {name: _last_round(ms, ms <= limit, rounds) for name, ms in firsts.items()}
    calls = {name: _calls_for(call, block_ms) if last[name] else 0 for name, call in entrants.items()}
    samples = {name: [] if last[name] else [ms] for name, ms in firsts.items()}
    order = list(entrants)
    shuffle = random.Random(seed).shuffle
    end = time.perf_counter() + budget_s
    with no_garbage_collection():
        for turn in range(rounds):
            late = time.perf_counter() - end
            if (turn >= MIN_ROUNDS and late > 0) or (turn >= 2 and late > 2 * budget_s):
                break
            shuffle(order)
            for name in order:
                if turn >= last[name]:
                    continue
                begin = time.perf_counter()
                time.sleep(PAUSE_S)
                if firsts[name] < 10 * block_ms:  # caches mean nothing to a longer call
                    entrants[name]()
                samples[name].append(_time_ms(entrants[name], calls[name]))
                if last[name] < rounds:  # the budget is for those that are in the running
                    end += time.perf_counter() - begin
    longest = max(map(len, samples.values()), default=0)
    return Race({name: np.array([*times, *[np.nan] * (longest - len(times))]) for name, times in samples.items()})


def _last_round(first_ms: float, contender: bool, rounds: int) -> int:
    """How many rounds an entrant takes part in."""
    if contender:
        return rounds
    return 0 if first_ms > SLOW_MS else FEW_ROUNDS


def _first_ms(call: Callable[[], object]) -> float:
    """The time of a call, the better of two where that is not long to wait for."""
    first = _time_ms(call, 1)
    return first if first > SLOW_MS else min(first, _time_ms(call, 1))


def _calls_for(call: Callable[[], object], block_ms: float) -> int:
    """How many calls fill a block; the best of three, as one may be held up by something else."""
    if _time_ms(call, 1) > block_ms:
        return 1
    calls = 1
    while (block := min(_time_ms(call, calls) for _ in range(3)) * calls) < block_ms:
        calls = max(calls + 1, min(10 * calls, round(calls * block_ms / max(block, 1e-3))))
    return calls


def _time_ms(call: Callable[[], object], calls: int) -> float:
    """The mean time of one call out of ``calls`` in a row, in ms."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / calls / 1e6


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Garbage is collected before, and not again until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def machine(*packages: str) -> str:
    """One line on what the numbers were taken on: processor, cores, Python and ``packages``."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{processor()}, {os.cpu_count()} cores; {', '.join(versions)}"
