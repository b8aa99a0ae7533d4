"""Train a tensorized network on real digits, compile, deploy and time it beside the alternatives.

    python examples/demo.py            the network, end to end (`make demo`)
    python examples/demo.py --layers   each of its layers on its own (`make layers`)

Everything is written to build/demo/.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not an installed package

import digits  # noqa: E402

from benchmarks import rivals, timing  # noqa: E402
from benchmarks.rivals import Array, Model, Probe  # noqa: E402

OUT = ROOT / "build" / "demo"
BATCHES = (1, 32, 256)

TNCOMPILE = "tncompile"
EAGER = "eager PyTorch"
EXPORTER = "torch.onnx.export + ORT"
DENSE = "dense layers + ORT"
WAYS = (TNCOMPILE, EAGER, EXPORTER, DENSE)
#: The dense file in a second session: what tells the two apart is noise.
CONTROL = "control"


@dataclass(frozen=True)
class Row:
    """One model at one batch size: ms a call, or a note where there is no time."""

    batch: int
    ms: dict[str, float]
    notes: dict[str, str]
    #: the best of the others, and tncompile's time divided by its time
    fastest: str
    ratio: float
    #: how far from 1 the same ratio is for two sessions of one file
    noise: float

    def cell(self, way: str) -> str:
        """The time of a way, for a table."""
        if way not in self.ms:
            return self.notes[way]
        ms = self.ms[way]
        return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"


@dataclass(frozen=True)
class Contest:
    """The same function four ways: a module, and three ONNX files."""

    module: nn.Module
    compiled: Path
    exported: Path
    dense: Path
    limit_s: float

    def run(self, inputs: Array) -> list[Row]:
        """Time every way at every batch size, on the first rows of ``inputs``."""
        models: dict[str, Model] = {
            TNCOMPILE: rivals.deployed(self.compiled),
            EAGER: rivals.eager(self.module),
            DENSE: rivals.deployed(self.dense),
            CONTROL: rivals.deployed(self.dense),
        }
        rows = []
        first = Probe(0.0)
        for batch in BATCHES:
            x = inputs[:batch]
            # What does not finish at one batch size does not at a larger one.
            if first.ms is not None:
                first = rivals.probe(self.exported, x, limit_s=self.limit_s)
            if first.repeatable:
                models[EXPORTER] = models.get(EXPORTER) or rivals.deployed(self.exported)
            else:
                models.pop(EXPORTER, None)
            rows.append(self._row(models, x, first))
        return rows

    def _row(self, models: dict[str, Model], x: Array, first: Probe) -> Row:
        calls = {way: functools.partial(model, x) for way, model in models.items()}
        race = timing.race(calls)
        ms = {way: race.median(way) for way in models if way != CONTROL}
        if EXPORTER not in ms and first.ms is not None:
            ms[EXPORTER] = first.ms
        notes = {} if EXPORTER in ms else {EXPORTER: first.note}
        fastest = race.without(TNCOMPILE, CONTROL).fastest()
        noise = abs(race.ratio(CONTROL, DENSE) - 1)
        return Row(len(x), ms, notes, fastest, race.ratio(TNCOMPILE, fastest), noise)


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
    program = rivals.trace(net, data.test_x[:2])
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
    before, after = rivals.eager(net)(x), rivals.deployed(compiled)(x)
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
        contest = _contest(net, program, compiled, OUT / "network", limit_s)
        rows = contest.run(x)
    table = Table(title="Milliseconds a call, median", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(f"batch {row.batch}", justify="right")
    for way in WAYS:
        cells = [row.cell(way) for row in rows]
        table.add_row(way, *cells, style="bold" if way == TNCOMPILE else "")
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
    columns = ["layer", "parameters", "dense", "batch", *WAYS, "fastest other", "tncompile ÷ it"]
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
            program = rivals.trace(module, example)
            contest = _contest(module, program, compiled, OUT / name, limit_s)
            rows = contest.run(x)
        small, large = digits.parameters(module), digits.parameters(digits.dense(module))
        measured += rows
        for row in rows:
            head = (layer.title, f"{small:,}", f"{large:,}") if row is rows[0] else ("", "", "")
            cells = [*head, str(row.batch), *map(row.cell, WAYS), row.fastest, f"{row.ratio:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
            times = ", ".join(f"{way} {row.cell(way)}" for way in WAYS)
            console.print(
                f"{layer.title}, batch {row.batch}: {times}; {row.ratio:.2f} of {row.fastest}"
            )
            results.append(
                {"layer": name, "parameters": small, "dense_parameters": large, **asdict(row)}
            )

    worst = max(row.ratio for row in measured)
    conditions = _conditions(measured, limit_s)
    header = (
        f"`python examples/demo.py --layers`: milliseconds a call, median. {conditions} The last "
        "column is the median over the rounds of tncompile's time divided by that of the fastest "
        f"other way; the worst is {worst:.2f}."
    )
    (OUT / "layers.md").write_text("\n".join([header, "", *lines]) + "\n")
    (OUT / "layers.json").write_text(
        json.dumps({"conditions": conditions, "rows": results}, indent=1) + "\n"
    )
    console.print(f"Worst ratio: {worst:.2f}. The table is in {OUT / 'layers.md'}.")


def _contest(
    module: nn.Module,
    program: torch.export.ExportedProgram,
    compiled: Path,
    stem: Path,
    limit_s: float,
) -> Contest:
    """Export the other ways and check that every one computes the same function."""
    exported, dense = stem.with_suffix(".exporter.onnx"), stem.with_suffix(".dense.onnx")
    rivals.exporter(program, exported)
    (example,) = program.example_inputs[0]
    rivals.exporter(rivals.trace(digits.dense(module), example), dense)
    expected = rivals.eager(module)(example.numpy())
    for path in (compiled, dense):
        np.testing.assert_allclose(
            rivals.deployed(path)(example.numpy()), expected, atol=1e-3 * np.abs(expected).max()
        )
    return Contest(module, compiled, exported, dense, limit_s)


def _conditions(rows: list[Row], limit_s: float) -> str:
    noise = [row.noise for row in rows]
    packages = timing.machine("torch", "onnxruntime", "onnxruntime-gpu")
    return (
        f"{packages}; {torch.get_num_threads()} threads for each way. All take turns in one "
        f"process, {timing.MIN_ROUNDS} to {timing.ROUNDS} rounds. A first call that needs more than "
        f"{limit_s:.0f} s or 8 GB is given up, and one of more than {rivals.SLOW_MS / 1e3} s is not repeated. "
        f"Two sessions of one dense file differed by {np.median(noise):.1%}, at worst "
        f"{max(noise):.1%}: that much is noise."
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
