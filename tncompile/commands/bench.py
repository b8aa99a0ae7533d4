"""``tncompile bench MODEL``: the compiled model beside the other ways to run it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompile.commands.options import MODEL_HELP, count, dimension_option, loading, loading_options, names, sizes
from tncompile.runtime.files import check_not_the_model, check_writable, write_file

if TYPE_CHECKING:
    from tncompile.frontend.model import ImportedModel, LoadedModel
    from tncompile.ir import Array
    from tncompile.runtime.contest import Contest, Row, Subject
    from tncompile.runtime.rivals import Inputs

WAYS = ("exporter", "eager", "compile", "dense", "naive")
DENSE_PASSES = "clean,gathers,fold,clean,dense,clean,order"

HELP = """\
Compile a model and time it beside the other ways to run it, in turns in one process.

  exporter   torch.onnx.export, in ONNX Runtime with all its optimizations
  eager      the model in PyTorch
  compile    the model by torch.compile
  dense      every layer folded to dense, in ONNX Runtime
  naive      einsums of three or more operands in opt_einsum's order, by torch.onnx.export, in ONNX Runtime

For an ONNX model, exporter is the original file; eager, compile and naive need PyTorch.
"""


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="tncompile bench", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    loading_options(result)
    result.add_argument("--batch", type=sizes, default=(1, 32), metavar="N,N,...", help="batch sizes (default 1,32)")
    dimension_option(result)
    result.add_argument(
        "--against", type=names(WAYS, "way "), default=WAYS, metavar="WAY,...", help="default: all of the above"
    )
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    result.add_argument("--threads", type=count, metavar="N", help="threads of every way (default: torch's)")
    result.add_argument("--seconds", type=float, default=5.0, metavar="S", help="to time a batch size for (default 5)")
    result.add_argument("--limit", type=float, default=60.0, metavar="S", help="for a first call (default 60)")
    result.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    return result


def run(options: argparse.Namespace) -> int:
    """Measure and print; 0 whatever the result, TNCompileError where the model cannot be compiled."""
    if options.json is not None:
        check_writable(options.json)
        check_not_the_model(Path(options.json), Path(options.model))
    from tncompile.frontend.load import detect

    detect(Path(options.model))  # a missing file is told before torch is loaded
    from tncompile.runtime.timing import wait_politely

    wait_politely()
    from rich.console import Console

    from tncompile.commands.options import console
    from tncompile.runtime.contest import Contest
    from tncompile.runtime.device import providers, threads_of
    from tncompile.runtime.probe import Limits

    providers(options.device)
    with Console(stderr=True).status("loading") as status, tempfile.TemporaryDirectory() as folder:
        threads = threads_of(options.threads)
        subject, batches = _subject(options, threads)
        contest = Contest(
            subject,
            Path(folder),
            options.against,
            options.device,
            threads,
            Limits(first_call_s=options.limit, build_s=max(120.0, options.limit)),
            status.update,
        )
        rows = list(contest.run(batches, options.seconds))
    _print(console(sys.stdout), contest, rows)
    if options.json is not None:
        record = {"model": options.model, **record_of(contest, rows)}
        write_file(options.json, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return 0


def _subject(options: argparse.Namespace, threads: int) -> tuple[Subject, Sequence[int | None]]:
    from tncompile import compiler
    from tncompile.frontend.load import load
    from tncompile.frontend.onnx.importer import OnnxModel
    from tncompile.runtime.accuracy import scales
    from tncompile.runtime.contest import DENSE, OURS, Subject
    from tncompile.runtime.rivals import eager_module

    exported, device, typical = load(options.model, loading(options)), options.device, dict(options.dim)
    with compiler.naming(options.model):
        compiled = compiler.compile_exported(
            exported, batch=options.batch, sizes=typical, device=device, threads=threads, check=False
        )
    batches = options.batch if compiled.report.dynamic else (None,)
    if batches == (None,):
        print(f"{options.model}: its batch is fixed; measured at its own shapes", file=sys.stderr)
    module = None if isinstance(exported, OnnxModel) else eager_module(exported, options.batch[0], device)
    writers = {OURS: compiled.save, DENSE: writer(exported, options.batch, device, DENSE_PASSES, threads, typical)}
    least = scales(compiled.traced.program)
    return Subject(exported, module, _inputs_of(compiled.traced, exported, typical), writers, least), batches


def writer(
    exported: LoadedModel,
    batches: Sequence[int],
    device: str = "cpu",
    passes: str | None = None,
    threads: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Callable[[Path], None]:
    """Compiles when it is called and writes the ONNX file: with the default passes, or, written out as a model of such
    weights would be, with others."""

    def write(path: Path) -> None:
        from tncompile import compiler
        from tncompile.passes import DEFAULT, parse_passes

        chosen = DEFAULT if passes is None else parse_passes(passes)
        model = compiler.compile_exported(
            exported,
            batch=batches,
            sizes=sizes,
            device=device,
            passes=chosen,
            threads=threads,
            store="auto" if passes is None else "folded",
            micro_batch=passes is None,
            check=False,
        )
        model.save(path)

    return write


def _inputs_of(
    traced: ImportedModel, exported: LoadedModel, typical: Mapping[str, int]
) -> Callable[[int | None], Inputs]:
    """Random inputs of any batch size, nested as the model takes them; whole numbers are those of the example."""
    import numpy as np
    import torch

    from tncompile.frontend.onnx.importer import OnnxModel
    from tncompile.runtime.inputs import random_inputs
    from tncompile.runtime.rivals import Inputs

    def arrays_at(batch: int | None) -> dict[str, Array]:
        symbols = {**traced.sizes, **typical} | ({} if batch is None else {"batch": batch})
        return random_inputs(traced, symbols, np.random.default_rng(0))

    if isinstance(exported, OnnxModel):
        return lambda batch: Inputs(tuple(map(torch.from_numpy, arrays_at(batch).values())))
    spec = exported.call_spec.in_spec
    signature = [s.arg for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]

    def inputs(batch: int | None) -> Inputs:
        arrays = arrays_at(batch)
        leaves = [
            torch.from_numpy(arrays[a.name]) if a.name in arrays else getattr(a, "value", None) for a in signature
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
        return Inputs(tuple(args), kwargs)

    return inputs


def record_of(contest: Contest, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything measured, for JSON: ms and speeds by batch size, and bytes of memory at the largest."""
    from tncompile.runtime.timing import machine

    return {
        "machine": machine("torch", "onnxruntime", "onnxruntime-gpu"),
        "device": contest.device,
        "threads": contest.threads,
        "built": {way: asdict(built) for way, built in contest.built.items()},
        "memory": dict(contest.memory),
        "rows": [asdict(row) for row in rows],
    }


def _print(console: Any, contest: Contest, rows: Sequence[Row]) -> None:
    from rich.table import Table

    from tncompile.runtime.contest import OURS

    table = Table(title="ms a call, median (times tncompile's)")
    table.title_justify = "left"
    table.add_column("")
    for row in rows:
        table.add_column(f"batch {row.batch}" if row.batch else "as traced", justify="right")
    for way in (OURS, *contest.against):
        table.add_row(
            contest.names.get(way, way), *(cell(row, way) for row in rows), style="bold" if way == OURS else ""
        )
    console.print(table)
    for way, note in _notes(contest, rows).items():
        console.print(f"{contest.names.get(way, way)}: {note}", highlight=False, markup=False)
    for row in rows:
        if row.speed is not None and row.noise is not None:
            where = f"at batch {row.batch}" if row.batch else "as traced"
            console.print(
                f"{where}: {row.speed:.2f} times the speed of {contest.names[row.fastest]}; two sessions of the "
                f"compiled file differ by {row.noise:.0%} ({row.rounds} rounds)",
                highlight=False,
            )


def _notes(contest: Contest, rows: Sequence[Row]) -> Mapping[str, str]:
    notes = {way: built.note for way, built in contest.built.items() if built.note}
    for row in rows:
        for way, note in row.notes.items():
            notes.setdefault(way, note)
    return notes


def cell(row: Row, way: str) -> str:
    """A way's time and ratio, for a table."""
    if way not in row.ms:
        note = row.notes.get(way, "–")
        return note if note.startswith(">") else note.partition(":")[0]
    ms, ratio = row.ms[way], row.ratio(way)
    time = f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"
    return time if ratio is None or way not in WAYS else f"{time} ({ratio:.2f}×)"
