"""How well a device profile predicts what it was not measured at.

    python -m benchmarks.primitives [--profile FILE|default] [--seconds N] [--list]

Random sizes between the profile's grid points, and somewhat beyond, are timed by the stopwatch that measures
profiles. Prints the median and worst relative error and the rank correlation of each table.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator

import numpy as np

from tncompile.cost.devices import choose
from tncompile.cost.profile import DeviceProfile
from tncompile.runtime.measure import GRIDS, Stopwatch
from tncompile.runtime.primitives import PRIMITIVES, Primitive, core_left

Item = tuple[str, Primitive, float, tuple[int, ...]]


def held_out(profile: DeviceProfile, count: int = 25, seed: int = 1) -> Iterator[Item]:
    """Table, primitive, predicted seconds and sizes of `count` random points a table, none on its grid."""
    draw = random.Random(seed)
    for name, grid in GRIDS.items():
        found = 0
        while found < count:
            exponents = [draw.uniform(math.log(axis[0]), math.log(axis[-1])) for axis in grid.axes]
            point = tuple(round(math.exp(e)) for e in exponents)
            if name in ("moved", "shuffled"):  # a number of blocks that is a product of like factors
                side = round(point[0] ** (1 / 3)) + 1
                point = (side * (side + 1) * (side + 2), point[1])
            primitive = PRIMITIVES[name](*point)
            if primitive.work > 2 * grid.work or point in grid.points():
                continue
            found += 1
            yield name, primitive, predicted(profile, name, point), point
            if name == "batched":
                yield "core left", core_left(*point), predicted(profile, name, point), point


def predicted(profile: DeviceProfile, name: str, sizes: tuple[int, ...]) -> float:
    """Seconds of a float32 primitive, by the method of the profile that a search asks."""
    match name:
        case "matmul":
            return profile.matmul_time(1, *sizes, 4)
        case "batched":
            return profile.matmul_time(*sizes, 4, constant=False)
        case "conv":
            return profile.conv_time(*sizes, 4)
        case "swap":
            outer, a, b = sizes
            return profile.permute_time(outer * a * b, 1, 4, single=True, swap=(a, b))
        case "moved" | "shuffled":
            blocks, block = sizes
            return profile.permute_time(blocks * block, block, 4, single=name == "moved")
        case "multiply":
            return profile.multiply_time(*sizes, 4)
        case "reduce":
            return profile.reduce_time(*sizes, 4)
        case "reduce_last":
            return profile.reduce_time(sizes[0], sizes[1], 1, 4)
        case "copy":
            return profile.copy_time(sizes[0], 4)
        case _:
            return profile.stream_time(sizes[0] // 4, 4)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    first, second = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="FILE", help="a profile, or `default`")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure (default 30)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of a session (default: one a core)")
    parser.add_argument("--list", action="store_true", help="print every primitive")
    options = parser.parse_args()
    choice = choose(options.profile, threads=options.threads)
    print(f"profile: {choice.origin} ({choice.profile.device})")
    items = list(held_out(choice.profile))
    _, times = Stopwatch([p for _, p, _, _ in items], threads=options.threads).run(options.seconds)
    if options.list:
        for (name, _, guess, sizes), measured in zip(items, times, strict=True):
            print(f"{name:11s} {'x'.join(map(str, sizes)):20s} {measured * 1e6:10.2f} µs {guess * 1e6:10.2f} µs")
    print(f"{'table':11s} {'points':>6s} {'median error':>13s} {'worst':>7s} {'rank correlation':>17s}")
    rows = [(name, guess, measured) for (name, _, guess, _), measured in zip(items, times, strict=True)]
    for name in [*dict.fromkeys(r[0] for r in rows), "all"]:
        chosen = [r for r in rows if name in (r[0], "all")]
        errors = [abs(guess / measured - 1) for _, guess, measured in chosen]
        rank = rank_correlation([r[1] for r in chosen], [r[2] for r in chosen])
        print(f"{name:11s} {len(errors):6d} {np.median(errors):13.1%} {max(errors):7.0%} {rank:17.3f}")


if __name__ == "__main__":
    main()
