"""``tncompile tune --device``: measure this machine once, so that plans fit it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tncompile.commands.options import count
from tncompile.errors import OutputError
from tncompile.runtime.files import check_writable, write_file

if TYPE_CHECKING:
    from rich.console import Console

    from tncompile.cost.profile import DeviceProfile

DESCRIPTION = """\
Measure how fast ONNX Runtime runs matmuls, transposes and the like on this machine, in about a minute, and store
it for this user: later compiles plan with it. Other work on the machine at the same time makes it less exact.
"""


def parser() -> argparse.ArgumentParser:
    """The options of `tune`."""
    result = argparse.ArgumentParser(
        prog="tncompile tune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--device", nargs="?", const="cpu", choices=("cpu", "cuda"), required=True, help="what to measure (default cpu)"
    )
    result.add_argument(
        "--threads", type=count, default=0, metavar="N", help="that models will run in (default: one a core)"
    )
    result.add_argument("--output", metavar="FILE", help="write the profile there, not to the user's own place")
    return result


def run(options: argparse.Namespace) -> int:
    """Measure, store and say what was found."""
    from tncompile.cost import devices

    if options.output is None:
        path = devices.output_path(options.device, options.threads)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{path.parent}: cannot be made ({error.strerror}); choose another place with --output"
            ) from error
    else:
        path = Path(options.output)
    check_writable(path)
    profile = _measure(options.device, options.threads)
    write_file(path, profile.to_json().encode())
    from rich.console import Console

    show(profile, Console())
    print(f"stored in {path}" + ("" if options.output is None else f"; plan with it by --profile {path}"))
    return 0


def _measure(device: str, threads: int) -> DeviceProfile:
    from rich.console import Console
    from rich.progress import Progress

    from tncompile.runtime.measure import measure

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"measuring {device}", total=1.0)
        return measure(device, threads, progress=lambda share: bar.update(task, completed=share))


def show(profile: DeviceProfile, console: Console) -> None:
    """Print the rates in a few lines."""
    from rich import box
    from rich.table import Table

    gflops = Table(
        "m × k × n",
        "by a core",
        "batched ×16",
        "",
        "moved",
        "GB/s",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    moves = [
        ("copy of 64 KB", 2, profile.copy_time(1 << 14, 4), 1 << 16),
        ("copy of 16 MB", 2, profile.copy_time(1 << 22, 4), 1 << 24),
        ("core of 256 KB read", 1, profile.stream_time(1 << 16, 4), 1 << 18),
        ("core of 64 MB read", 1, profile.stream_time(1 << 24, 4), 1 << 26),
        ("one axis moved, blocks of 64", 2, profile.permute_time(1 << 16, 64, 4, single=True), 1 << 18),
        ("256 of 64×64 transposed", 2, profile.permute_time(1 << 20, 1, 4, single=True, swap=(64, 64)), 1 << 22),
        ("axes reversed", 2, profile.permute_time(1 << 16, 1, 4), 1 << 18),
    ]
    shapes = [
        (1, 256, 256),
        (1, 1024, 1024),
        (32, 512, 512),
        (256, 64, 64),
        (4096, 16, 16),
        (256, 512, 512),
        (16, 16, 16),
    ]
    for (m, k, n), (label, times, seconds, size) in zip(shapes, moves, strict=True):
        flops = 2e-9 * m * k * n
        gflops.add_row(
            f"{m} × {k} × {n}",
            f"{flops / profile.matmul_time(1, m, k, n, 4):.3g} GFLOP/s",
            f"{16 * flops / profile.matmul_time(16, m, k, n, 4):.3g} GFLOP/s",
            "",
            label,
            f"{times * size / seconds / 1e9:.3g}",
        )
    console.print(f"{profile.device}: at best {profile.flops / 1e9:.3g} GFLOP/s, a step {profile.node * 1e6:.2f} µs")
    console.print(gflops)
