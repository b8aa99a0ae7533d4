"""A training step of tensorly-torch's layers, by its own two implementations and by `tncompile.to_torch`.

    python -m benchmarks.training --write docs/training.md

Forward, backward (the input needs a gradient, as inside a network) and a step of SGD, on one thread. All ways take
turns in one process. Memory is what PyTorch allocates at once during a step, from torch.profiler.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

import tncompile
from benchmarks.report import between
from tncompile.cost.devices import processor
from tncompile.training import Memory

SIZES = {
    "256 → 256": ((4, 8, 8), (4, 8, 8)),
    "768 → 3072": ((8, 8, 12), (12, 16, 16)),
    "2048 → 2048": ((8, 16, 16), (8, 16, 16)),
}
RANKS: Mapping[str, int | tuple[int, ...]] = {"blocktt": 16, "cp": 64, "tucker": (4,) * 6}
BATCHES = (32, 256)
WAYS = ("factorized", "reconstructed", "to_torch")
SLOW = 0.5  # seconds of a step from which on three rounds are enough
START, END = "<!-- training -->", "<!-- end of training -->"


@dataclass(frozen=True)
class Result:
    """One layer at one batch size: seconds and bytes of a step, by way, and the median ratio to the fastest other."""

    size: str
    form: str
    batch: int
    seconds: Mapping[str, float]
    peak: Mapping[str, int]
    ratio: float


def layer(form: str, size: str, implementation: str) -> torch.nn.Module:
    """A layer of tensorly-torch; the same numbers for each implementation."""
    import tltorch

    torch.manual_seed(0)
    inputs, outputs = SIZES[size]
    found = tltorch.FactorizedLinear(
        inputs, outputs, factorization=form, rank=RANKS[form], implementation=implementation
    )
    assert isinstance(found, torch.nn.Module)
    return found


def step_of(module: torch.nn.Module, batch: int, size: str) -> Callable[[], None]:
    """One training step."""
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = map(math.prod, SIZES[size])
    x = torch.randn(batch, inputs, generator=generator).requires_grad_()
    grad = torch.randn(batch, outputs, generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), 1e-6)

    def step() -> None:
        module(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that is allocated at once in a step, beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(form: str, size: str, rounds: int, memory: Memory = "auto") -> list[Result]:
    """One layer at all batch sizes."""
    modules = {way: layer(form, size, way) for way in WAYS[:2]}
    example = torch.randn(2, math.prod(SIZES[size][0])).requires_grad_()
    modules["to_torch"] = tncompile.to_torch(modules["factorized"], (example,), batch=BATCHES, memory=memory)
    results = []
    for batch in BATCHES:
        steps = {way: step_of(module, batch, size) for way, module in modules.items()}
        taken: dict[str, list[float]] = {way: [] for way in steps}
        first = [_timed(step) for step in steps.values()]
        for _ in range(3 if max(first) > SLOW else rounds):
            for way, step in steps.items():
                taken[way].append(_timed(step))
        seconds = {way: statistics.median(times) for way, times in taken.items()}
        fastest = min(WAYS[:2], key=seconds.__getitem__)
        ratio = statistics.median(a / b for a, b in zip(taken["to_torch"], taken[fastest], strict=True))
        results.append(Result(size, form, batch, seconds, {w: peak_bytes(s) for w, s in steps.items()}, ratio))
    return results


def _timed(step: Callable[[], None]) -> float:
    """Seconds of a step that follows one of its own, as in training: in memory that it has left, not another way."""
    step()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    head = ["layer", "form", "batch", *(f"{way}, ms" for way in WAYS), "time ÷ faster", *(f"{w}, MB" for w in WAYS)]
    lines = [f"| {' | '.join([*head, 'memory ÷ smaller'])} |", f"|---|---|{'--:|' * (len(head) - 1)}"]
    for r in results:
        cells = [r.size, r.form, str(r.batch), *(_number(r.seconds[w] * 1e3) for w in WAYS), f"{r.ratio:.2f}"]
        smaller = min(r.peak[w] for w in WAYS[:2])
        cells += [*(_number(r.peak[w] / 1e6) for w in WAYS), f"{r.peak['to_torch'] / smaller:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure, print, and with --write put the table into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--forms", nargs="+", choices=RANKS, default=[*RANKS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", choices=get_args(Memory), default="auto", help="as `to_torch` takes it")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"a file that has {START} and {END}")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for size in args.sizes:
        for form in args.forms:
            results += measure(form, size, args.rounds, args.memory)
            print(table(results[-len(BATCHES) :]), flush=True)
    conditions = (
        f"{processor()}; Python {platform.python_version()}, torch {torch.__version__}; one thread, medians; "
        f'`memory="{args.memory}"`.'
    )
    text = f"{table(results)}\n\nConditions: {conditions}"
    if args.write:
        page = args.write.read_text("utf-8")
        args.write.write_text(between(page, text, START, END), "utf-8")


if __name__ == "__main__":
    main()
