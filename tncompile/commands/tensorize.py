"""``tncompile tensorize MODEL -o OUT``: make a dense model smaller and faster within a budget."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tncompile.commands.budget import BITS, budget_of, budget_options, has_budget
from tncompile.commands.options import (
    MODEL_HELP,
    Progress,
    console,
    load_example,
    loading,
    loading_options,
    passes,
    planning_options,
)
from tncompile.commands.paths import check_paths
from tncompile.errors import OutputError, TNCompileError
from tncompile.runtime.files import check_not_the_model, check_writable, write_file
from tncompile.tensorizer.budget import FORMATS, Budget, kind_of

HELP = """\
Replace dense weights by tensor formats of lower rank and fewer bits, whatever mix of them is best on this machine
within the budget that you name: --max-error, --metric with --max-drop, --max-size or --min-speedup.

  tncompile tensorize model.pt2 -o small.onnx --calibrate inputs.npz --max-error 0.01
  tncompile tensorize model.pt2 -o small.onnx --calibrate inputs.npz --metric my.task:accuracy --max-drop 0.01
  tncompile tensorize model.pt2 -o small.pt2  --calibrate inputs.npz --max-size 30% --heal 120

Every way is measured, the dense model and plain quantization among them: where one of these is best, that is what is
written, and said. OUT is an ONNX file, or (.pt2) the model with its cores as parameters, in float32, to train further.
"""


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="tncompile tensorize", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    result.add_argument("-o", "--output", metavar="OUT", required=True, help="the .onnx or .pt2 file to write")
    loading_options(result)
    planning_options(result)
    budget_options(result)
    result.add_argument("--report", metavar="FILE", help="write every way and what it costs as JSON")
    result.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return result


def run(options: argparse.Namespace) -> int:
    """Search, measure, write and say what was done."""
    if not has_budget(options):
        parser().error("name a budget: --max-error, --metric with --max-drop, --max-size or --min-speedup")
    budget = budget_of(options)  # a wrong one is told before any work
    passes(options)
    return tensorized(options, budget, {})


def tensorized(options: argparse.Namespace, budget: Budget, compiling: dict[str, Any]) -> int:
    """As `run`; `compiling` are further options of `compile_exported`."""
    model, output = Path(options.model), Path(options.output)
    report = None if options.report is None else Path(options.report)
    kind = kind_of(output)
    check_paths(model, [output], report)
    checkpoint = None if options.checkpoint is None else Path(options.checkpoint)
    if checkpoint is not None:
        check_writable(checkpoint)
        check_not_the_model(checkpoint, model)
    _check(options, kind)
    from tncompile.passes import DEFAULT
    from tncompile.runtime.timing import wait_politely

    wait_politely()
    from tncompile.tensorizer.run import Healing
    from tncompile.tensorizer.tensorize import tensorize_file

    with Progress(options.quiet) as progress:
        progress(f"loading {model}")
        made = tensorize_file(
            model,
            options.calibrate,
            budget,
            loading(options),
            formats=options.formats or tuple(FORMATS),
            bits=("fp32",) if kind == "pt" else options.bits or BITS,
            healing=Healing(options.heal, options.end_to_end, checkpoint),
            threads=options.threads or 0,
            batch=options.batch,
            sizes=dict(options.dim),
            passes=passes(options) or DEFAULT,
            profile=options.profile,
            max_memory=options.max_memory,
            progress=progress,
            **compiling,
        )
        made.save(output)
        if report is not None:
            text = json.dumps({**made.report.to_dict(), "output": str(output)}, indent=1, ensure_ascii=False)
            write_file(report, (text + "\n").encode())
        made.discard()
    if not options.quiet:
        out = console(sys.stdout)
        for part in made.report.render():
            out.print(part)
        out.print(f"wrote {output}" + (f", report in {report}" if report else ""), highlight=False)
    return 0


def _check(options: argparse.Namespace, kind: str) -> None:
    """TNCompileError, before torch is loaded, for a missing file and for options that do not go together."""
    from tncompile.frontend.load import detect

    is_onnx = detect(Path(options.model)) == "ONNX"
    if is_onnx and kind == "pt":
        raise OutputError(f"{options.output}: the model came in as ONNX, and so it can only be written as .onnx")
    if kind == "pt" and {*(options.bits or ())} - {"fp32"}:
        raise TNCompileError(f"{options.output} keeps float32, to train further; leave --bits out, or write .onnx")
    if options.calibrate is not None and not Path(options.calibrate).exists():
        raise TNCompileError(f"--calibrate {options.calibrate}: no such file or folder")
    if options.heal is None:
        for name, value in (("--end-to-end", options.end_to_end), ("--checkpoint", options.checkpoint)):
            if value:
                raise TNCompileError(f"{name} is about healing: say for how many seconds with --heal")
    elif options.calibrate is None:
        raise TNCompileError("--heal trains on calibration data: name them with --calibrate")
    elif is_onnx:
        raise TNCompileError(f"{options.model}: an ONNX model cannot be trained; leave --heal out")


def from_compile(options: argparse.Namespace) -> int:
    """``tncompile MODEL -o OUT`` with options of a budget. TNCompileError for those that do not go with it."""
    for name, value in (("--external-data", options.external_data), ("--no-check", options.no_check)):
        if value:
            raise TNCompileError(f"{name} does not go with a budget: quantizing and measuring need the whole file")
    for name, given in (("--tune", options.tune is not None), ("--store", options.store != "auto")):
        if given:
            raise TNCompileError(f"{name} does not go with a budget: the search measures and decides that by itself")
    if options.device != "cpu":
        raise TNCompileError("tensorizing is for the CPU yet: leave --device out")
    budget = budget_of(options)
    examples = [load_example(path) for path in options.example]
    return tensorized(options, budget, {"examples": examples})
