"""Train a tensorized network on real digits, compile, deploy and time it beside the alternatives.

    python examples/demo.py            the network, end to end (`make demo`)
    python examples/demo.py --layers   each of its layers on its own (`make layers`)

Everything is written to build/demo/.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import digits
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tncompile.frontend.trace import trace
from tncompile.ir import Array
from tncompile.runtime import timing
from tncompile.runtime.contest import DENSE, EAGER, EXPORTER, OURS, Contest, Row, Subject
from tncompile.runtime.device import threads_of
from tncompile.runtime.files import write_file
from tncompile.runtime.probe import Limits
from tncompile.runtime.rivals import Inputs, export_plain
from tncompile.runtime.session import Session

ROOT = Path(__file__).resolve().parents[1]

OUT = ROOT / "build" / "demo"
BATCHES = (1, 32, 256)

WAYS = (OURS, EAGER, EXPORTER, DENSE)
TITLES = {OURS: "tncompile", EAGER: "eager PyTorch", EXPORTER: "torch.onnx.export + ORT", DENSE: "dense layers + ORT"}


def demo(console: Console, limit_s: float) -> None:
    """The network, end to end."""
    torch.manual_seed(0)
    data = digits.Digits.load()
    net = digits.network()

    started = time.perf_counter()
    with console.status("training") as status, _one_thread():
        for epoch, loss in enumerate(digits.train(net, data), 1):
            status.update(f"training: epoch {epoch}, loss {loss:.3f}")
    small, large = digits.parameters(net), digits.parameters(digits.dense(net))
    console.print(
        f"Trained on {len(data.train_x)} digits in {time.perf_counter() - started:.0f} s: "
        f"{small:,} parameters, where dense layers would have {large:,}."
    )

    model, compiled, report = OUT / "model.pt", OUT / "model.onnx", OUT / "report.json"
    program = trace(net, (data.test_x[:2],), None, ({0: torch.export.Dim("batch")},))
    archive = io.BytesIO()
    torch.export.save(program, archive)
    model.write_bytes(archive.getvalue())

    batches = ",".join(map(str, BATCHES))
    arguments = ["-m", "tncompile", str(model.relative_to(ROOT)), "-o"]
    arguments += [str(compiled.relative_to(ROOT)), "--batch", batches]
    arguments += ["--report", str(report.relative_to(ROOT))]
    console.print(f"\n[bold]$ python {shlex.join(arguments)}[/bold]")
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    console.print(f"Compiled in {time.perf_counter() - started:.0f} s, start of Python included.\n")

    x = data.test_x.numpy()
    with torch.no_grad():
        before = net(data.test_x).numpy()
    session = Session(compiled)
    (after,) = session.run(session.feeds({"input": x})).values()
    labels = data.test_y.numpy()
    console.print(
        f"Accuracy on {len(x)} held-out digits: {_accuracy(before, labels)} in PyTorch, "
        f"{_accuracy(after, labels)} compiled, in plain ONNX Runtime."
    )
    console.print(
        f"Largest difference of an output: {np.abs(after - before).max():.1e}, "
        f"of outputs up to {np.abs(before).max():.0f}.\n"
    )

    with console.status("timing"):
        rows = _rows(net, program, compiled, x, OUT / "network", limit_s)
    table = Table(title="Milliseconds a call, median", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(f"batch {row.batch}", justify="right")
    for way in WAYS:
        cells = [_cell(row, way) for row in rows]
        table.add_row(TITLES[way], *cells, style="bold" if way == OURS else "")
    console.print(table)
    console.print(_conditions(rows, limit_s), style="dim")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The steps of this training are so small that threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _accuracy(outputs: Array, labels: np.ndarray) -> str:
    return f"{(outputs.argmax(1) == labels).mean():.1%}"


def layers(console: Console, names: list[str], limit_s: float) -> None:
    """Layers of the network on their own, freshly made."""
    import tncompile

    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    measured: list[Row] = []
    results: list[dict[str, Any]] = []
    columns = ["layer", "parameters", "dense", "batch", *TITLES.values(), "fastest other", "tncompile ÷ it"]
    lines = [f"| {' | '.join(columns)} |", "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|"]
    for name in names:
        layer = digits.LAYERS[name]
        with console.status(layer.title):
            module = layer.make().eval()
            inputs, _ = digits.features(module)
            x = generator.standard_normal((max(BATCHES), inputs), dtype=np.float32)
            example = torch.from_numpy(x[:2])

            compiled = OUT / f"{name}.onnx"
            shapes = ({0: torch.export.Dim("batch")},)
            result = tncompile.compile(module, (example,), dynamic_shapes=shapes, batch=BATCHES)
            result.save(compiled)
            program = trace(module, (example,), None, shapes)
            rows = _rows(module, program, compiled, x, OUT / name, limit_s)
        small, large = digits.parameters(module), digits.parameters(digits.dense(module))
        measured += rows
        for row in rows:
            head = (layer.title, f"{small:,}", f"{large:,}") if row is rows[0] else ("", "", "")
            cells = [_cell(row, way) for way in WAYS]
            other, ratio = TITLES[row.fastest], 1 / _known(row.speed)
            lines.append(f"| {' | '.join([*head, str(row.batch), *cells, other, f'{ratio:.2f}'])} |")
            times = ", ".join(f"{TITLES[way]} {cell}" for way, cell in zip(WAYS, cells, strict=True))
            console.print(f"{layer.title}, batch {row.batch}: {times}; {ratio:.2f} of {other}")
            results.append({"layer": name, "parameters": small, "dense_parameters": large, **asdict(row)})

    worst = max(1 / _known(row.speed) for row in measured)
    conditions = _conditions(measured, limit_s)
    header = (
        f"`python examples/demo.py --layers`: milliseconds a call, median. {conditions} The last "
        "column is the median over the rounds of tncompile's time divided by that of the fastest "
        f"other way; the worst is {worst:.2f}."
    )
    (OUT / "layers.md").write_text("\n".join([header, "", *lines]) + "\n")
    (OUT / "layers.json").write_text(json.dumps({"conditions": conditions, "rows": results}, indent=1) + "\n")
    console.print(f"Worst ratio: {worst:.2f}. The table is in {OUT / 'layers.md'}.")


def _rows(
    module: nn.Module,
    program: torch.export.ExportedProgram,
    compiled: Path,
    x: Array,
    stem: Path,
    limit_s: float,
) -> list[Row]:
    """The same function four ways, each checked, on the first rows of ``x``; their files go to a folder ``stem``."""
    shapes = ({0: torch.export.Dim("batch")},)
    example = torch.from_numpy(x[:2])

    def dense(path: Path) -> None:
        export_plain(trace(digits.dense(module).eval(), (example,), None, shapes), path)

    def inputs(batch: int | None) -> Inputs:
        return Inputs((torch.from_numpy(x[:batch]),))

    stem.mkdir(exist_ok=True)
    writers = {OURS: lambda path: write_file(path, compiled.read_bytes()), DENSE: dense}
    subject = Subject(program, module.eval(), inputs, writers)
    limits = Limits(first_call_s=limit_s)
    contest = Contest(subject, stem, (EAGER, EXPORTER, DENSE), threads=threads_of(), limits=limits)
    rows = list(contest.run(BATCHES, seconds=10.0))
    for row in rows:
        wrong = [f"{way} {note}" for way, note in row.notes.items() if way != EXPORTER]
        assert not wrong, f"batch {row.batch}: {', '.join(wrong)}"
    return rows


def _cell(row: Row, way: str) -> str:
    """The time of a way, for a table, or why there is none."""
    if way not in row.ms:
        return row.notes[way]
    return f"{row.ms[way]:.3g}" if row.ms[way] < 100 else f"{row.ms[way]:,.0f}"


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _conditions(rows: list[Row], limit_s: float) -> str:
    noise = [_known(row.noise) for row in rows]
    packages = timing.machine("torch", "onnxruntime", "onnxruntime-gpu")
    return (
        f"{packages}; {torch.get_num_threads()} threads for each way. All take turns in one "
        f"process, {timing.MIN_ROUNDS} to {timing.ROUNDS} rounds; a way over {timing.HOPELESS:.0f} times slower than "
        f"the fastest takes part in {timing.FEW_ROUNDS}, or in none if a call takes {timing.SLOW_MS / 1e3} s. "
        f"A first call that needs more than {limit_s:.0f} s or 8 GB is given up. "
        f"Two sessions of tncompile's file differed by {np.median(noise):.1%}, at worst "
        f"{max(noise):.1%}: that much is noise."
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_argument("--layers", nargs="*", metavar="LAYER", choices=digits.LAYERS)
    names.help = f"measure layers on their own: all, or some of {', '.join(digits.LAYERS)}"
    parser.add_argument("--limit", type=float, default=60, help="seconds for a first call (60)")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True)
    if options.layers is None:
        demo(console, options.limit)
    else:
        layers(console, options.layers or list(digits.LAYERS), options.limit)


if __name__ == "__main__":
    main()
