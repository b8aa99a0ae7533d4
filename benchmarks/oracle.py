"""How far the planner's plans are from the best ones: every tree, merge and layout of small networks, all timed.

    python -m benchmarks.oracle [--only TEXT] [--batch 1,32,256] [--tune SECONDS] [--threads N] [--out FILE]

For every layer of `benchmarks.zoo` and every batch size, all ways to contract it are written as ONNX: each order in
which the operand may meet groups of merged cores, each with its cheapest layouts. All are timed once, the best of
them, the planner's own plan and the tuner's in turns, each in several sessions, as two of one file differ by up to a
fifth. *Regret* is how much longer a plan takes than the best of all; *noise* is how much more one half of the sessions
of the best way takes than the other; the rank correlation (Spearman's) is between predicted and measured times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.primitives import rank_correlation
from benchmarks.zoo import Layer, layers
from tncompile.cost.devices import choose
from tncompile.cost.profile import DeviceProfile
from tncompile.ir import Network, Program, Switch, Tree
from tncompile.ir.tree import left_to_right
from tncompile.passes import Context, Order
from tncompile.passes.plans import merge_constants, scheduler
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race
from tncompile.runtime.tuner import Tuner, canonical, model_of

FOLLOWED = 3.0
"""Ways predicted to take over this many times the best prediction are not timed, but for a sample of them."""

SAMPLE = 24
LARGEST = 1 << 26
"""Elements of an intermediate above which a way is hopeless and would only need memory."""

FINALISTS = 8
SESSIONS = 4
SECONDS = 1.5
"""For the last race of a layer at a batch size."""

QUIET, RACES = 0.1, 3
"""The noise above which it is run again, and how often in all; the quietest counts."""


@dataclass(frozen=True)
class Result:
    """One layer at one batch size: microseconds of the best way, of the planner's and of the tuner's."""

    layer: str
    batch: int
    ways: int
    timed: int
    best: float
    planned: float
    tuned: float | None
    noise: float
    correlation: float

    @property
    def regret(self) -> float:
        """Of the plan chosen by prediction."""
        return self.planned / self.best - 1

    @property
    def tuned_regret(self) -> float | None:
        """Of the plan chosen by the tuner."""
        return None if self.tuned is None else self.tuned / self.best - 1


@dataclass(frozen=True)
class Way:
    """One way to compute a layer, as a scheduled network, and its predicted seconds."""

    network: Network
    seconds: float


def trees(count: int) -> Iterator[Tree]:
    """Every order in which one operand (position 0) meets groups of cores (the others) merged before."""
    for groups in _ordered_partitions(tuple(range(1, count))):
        yield left_to_right([0, *(left_to_right(group) for group in groups)])


def _ordered_partitions(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    if not items:
        yield ()
        return
    for size in range(1, len(items) + 1):
        for first in itertools.combinations(items, size):
            rest = tuple(i for i in items if i not in first)
            yield from ((first, *others) for others in _ordered_partitions(rest))


def ways(network: Network, context: Context, batch: int, layouts: int) -> list[Way]:
    """Every tree with its cheapest few layouts, by predicted time."""
    (term,) = network.terms
    found: dict[tuple[object, ...], Way] = {}
    for tree in trees(len(term.tensors)):
        merged = merge_constants(network, term, tree, shapes_only=True)
        if max(c.data.size for c in merged.cores if c.data is not None) > LARGEST:
            continue
        for schedule in scheduler(network, merged, context, batch).schedules(merged.order, layouts):
            if schedule.peak > LARGEST:
                continue
            whole = replace(network, terms=(replace(merged, steps=schedule.steps),))
            found[tree, schedule.steps] = Way(whole, schedule.seconds)
    return sorted(found.values(), key=lambda way: way.seconds)


def judge(layer: Layer, batch: int, profile: DeviceProfile, tune: float, layouts: int, threads: int) -> Result:
    """Time all ways of a layer, and the planner's and the tuner's plans among the best of them."""
    program = layer.program()
    (network,) = program.networks
    context = Context((batch,), profile=profile, outputs=frozenset({"y"}))
    everything = ways(network, context, batch, layouts)
    near = [w for w in everything if w.seconds <= FOLLOWED * everything[0].seconds]
    far = everything[len(near) :]
    chosen = [*near, *far[:: max(1, len(far) // SAMPLE)]]
    shape = (batch, int(np.prod([layer.sizes[n] for n in layer.operand])))
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    first = []
    for way in chosen:
        session = Session(model_of(way.network), threads=threads)
        first.append(_quick(session, feeds))
    plans = {"planned": _planned(program, context)}
    if tune:
        plans["tuned"] = _planned(program, replace(context, timer=Tuner(tune, threads=threads, stored=False)))
    finalists = sorted(range(len(chosen)), key=lambda k: first[k])[:FINALISTS]
    entrants = {
        repr(canonical(network)): network for network in (*(chosen[k].network for k in finalists), *plans.values())
    }
    times, noise = _raced(entrants, feeds, threads)
    for _ in range(RACES - 1):
        if noise > QUIET:
            times, noise = min((times, noise), _raced(entrants, feeds, threads), key=lambda found: found[1])
    return Result(
        layer.name,
        batch,
        len(everything),
        len(chosen),
        min(times.values()),
        times[repr(canonical(plans["planned"]))],
        times[repr(canonical(plans["tuned"]))] if tune else None,
        noise,
        rank_correlation([w.seconds for w in chosen], first) if len(chosen) > 2 else 1.0,
    )


def _raced(
    entrants: Mapping[str, Network], feeds: Mapping[str, np.ndarray], threads: int
) -> tuple[dict[str, float], float]:
    """Microseconds of each network, run in turns in several sessions each, and the noise of the fastest."""
    names = [*entrants]
    sessions = [Session(model_of(entrants[name]), threads=threads) for name in names * SESSIONS]
    calls = {str(k): partial(session.run, feeds) for k, session in enumerate(sessions)}
    raced = race(calls, rounds=40, budget_s=SECONDS)
    taken = [[raced.median(str(k)) * 1e3 for k in range(n, len(sessions), len(names))] for n in range(len(names))]
    best = min(taken, key=statistics.median)
    halves = [statistics.median(best[k::2]) for k in range(2)]
    times = {name: statistics.median(each) for name, each in zip(names, taken, strict=True)}
    return times, max(halves) / min(halves) - 1


def _planned(program: Program, context: Context) -> Network:
    after, _ = Order().run(program, context)
    (node,) = after.nodes
    assert isinstance(node, Network | Switch)
    return node.case(context.batches[0]) if isinstance(node, Switch) else node


def _quick(session: Session, feeds: dict[str, np.ndarray]) -> float:
    """Seconds of a call: the median of a few."""
    session.run(feeds)
    best: list[float] = []
    end = time.perf_counter() + 0.002
    while len(best) < 3 or (time.perf_counter() < end and len(best) < 200):
        start = time.perf_counter()
        session.run(feeds)
        best.append(time.perf_counter() - start)
        if best[-1] > 0.1:
            break
    return statistics.median(best)


def summary(results: Sequence[Result]) -> str:
    """Medians and worst cases in a few lines."""
    names, timed = {r.layer for r in results}, sum(r.timed for r in results)
    lines = [f"{len(names)} layers, {len(results)} cases, {timed} ways timed"]
    groups = {"by prediction": [r.regret for r in results]}
    groups["with --tune"] = [r.tuned_regret for r in results if r.tuned_regret is not None]
    for name, regrets in groups.items():
        if regrets:
            median, high = np.median(regrets), np.quantile(regrets, 0.9)
            lines.append(f"regret {name}: median {median:.1%}, 90 % below {high:.1%}, worst {max(regrets):.1%}")
    lines.append(
        f"noise: median {np.median([r.noise for r in results]):.1%}, worst {max(r.noise for r in results):.1%}"
    )
    correlations = [r.correlation for r in results if r.timed >= 8]
    if correlations:
        lines.append(f"rank correlation: median {np.median(correlations):.3f}, lowest {min(correlations):.3f}")
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name has this in it")
    parser.add_argument("--batch", default="1,32,256", help="batch sizes (default 1,32,256)")
    parser.add_argument("--tune", type=float, default=1.0, metavar="SECONDS", help="for each plan; 0: no tuner")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of every session (default: one a core)")
    parser.add_argument("--layouts", type=int, default=3, help="layouts of each tree (default 3)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    chosen = [layer for layer in layers() if options.only in layer.name]
    if not chosen:
        parser.error(f"no layer's name has {options.only!r} in it")
    profile = choose(threads=options.threads).profile
    results = []
    for layer in chosen:
        for batch in map(int, options.batch.split(",")):
            result = judge(layer, batch, profile, options.tune, options.layouts, options.threads)
            tuned = "" if result.tuned_regret is None else f", tuned {result.tuned_regret:+.1%}"
            print(
                f"{layer.name}, batch {batch}: best {result.best:.1f} µs of {result.timed}, "
                f"planned {result.regret:+.1%}{tuned}, noise {result.noise:.1%}, "
                f"rank correlation {result.correlation:.2f}",
                flush=True,
            )
            results.append(result)
    print(summary(results))
    if options.out:
        options.out.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
