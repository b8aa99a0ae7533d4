"""``tncompile MODEL -o OUT``: compile a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tncompile import __version__
from tncompile.commands.budget import budget_options, is_asked
from tncompile.commands.options import (
    MODEL_HELP,
    Progress,
    console,
    example_option,
    load_example,
    loading,
    loading_options,
    passes,
    planning_options,
    positive,
)
from tncompile.commands.paths import check_paths
from tncompile.runtime.files import write_file

if TYPE_CHECKING:
    from tncompile.compiler import CompiledModel

HELP = """\
Compile a PyTorch model to plain ONNX for ONNX Runtime.

other commands:
  tncompile inspect FILE     show the tensor networks of a model or of a compiled file
  tncompile verify MODEL OUT check a compiled file against the model it came from
  tncompile tune --device    measure this machine, for better plans on it
  tncompile tensorize MODEL  make a dense model smaller and faster within a budget of error
  tncompile bench MODEL      time the compiled model beside the other ways to run it
"""


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="tncompile",
        usage="tncompile MODEL -o OUT [options]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    result.add_argument("-o", "--output", metavar="OUT", required=True, help="the ONNX file to write")
    loading_options(result)
    planning_options(result)
    result.add_argument(
        "--store",
        choices=("auto", "cores", "folded"),
        default="auto",
        help="folded layers in the file: as the cores they were made of, which ONNX Runtime folds at load, or written "
        "out, and weights that are nearly all zeros without those, or written out; auto: the smaller, unless loading "
        "would take over 0.5 s longer",
    )
    result.add_argument(
        "--external-data",
        action="store_true",
        help="write the weights to OUT.data beside OUT, as is done in any case where one file cannot hold them",
    )
    result.add_argument(
        "--tune",
        nargs="?",
        const=30.0,
        type=positive,
        metavar="SECONDS",
        help="time the best plans in ONNX Runtime, for so many seconds in all (default 30), and torch's own export "
        "(or the original ONNX file) beside the result; what was timed before is remembered",
    )
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it will run (default cpu)")
    result.add_argument(
        "--whole-batch",
        dest="micro_batch",
        action="store_false",
        help="compute the images of a large batch all at once, and not a few at a time where that gains",
    )
    result.add_argument("--report", metavar="FILE", help="write every decision and its cost as JSON")
    result.add_argument("--no-check", action="store_true", help="do not compare with the model in float64")
    example_option(result)
    budget_options(result)
    result.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    result.add_argument("--version", action="version", version=f"tncompile {__version__}")
    return result


def run(options: argparse.Namespace) -> int:
    """Compile, check, write and say what was done."""
    if is_asked(options):
        from tncompile.commands.tensorize import from_compile

        return from_compile(options)
    model, output = Path(options.model), Path(options.output)
    report = None if options.report is None else Path(options.report)
    check_paths(model, _outputs(options), report)
    passes(options)  # wrong ones are told before any work
    from tncompile.frontend.load import detect

    detect(model)  # a missing file is told before torch is loaded
    with Progress(options.quiet) as progress:
        progress(f"loading {model}")
        files = _files(output, _compiled(options, progress))
        for path, compiled in files.items():
            compiled.save(path)
            compiled.stored.close()
        if report is not None:
            records = [{**compiled.report.to_dict(), "output": str(path)} for path, compiled in files.items()]
            text = json.dumps(records[0] if len(records) == 1 else records, indent=1, ensure_ascii=False)
            write_file(report, (text + "\n").encode())
    if not options.quiet:
        out = console(sys.stdout)
        for path, compiled in files.items():
            for part in compiled.report.render():
                out.print(part)
            data = f" and its weights, {path.name}.data" if compiled.stored.file.external else ""
            out.print(f"wrote {path}{data}" + (f", report in {report}" if report else ""), highlight=False)
    return 0


def _compiled(options: argparse.Namespace, progress: Progress) -> list[CompiledModel]:
    """The compiled model; for a GPU, where no plan can be chosen at run time, one for each batch size."""
    from tncompile import compiler
    from tncompile.passes import DEFAULT

    return [
        compiler.compile_file(
            options.model,
            loading=loading(options),
            batch=batch,
            sizes=dict(options.dim),
            passes=passes(options) or DEFAULT,
            profile=options.profile,
            store=options.store,
            external_data=options.external_data,
            folder=Path(options.output).parent,
            max_memory=options.max_memory,
            micro_batch=options.micro_batch,
            device=options.device,
            tune=options.tune,
            threads=options.threads or 0,
            check=not options.no_check,
            examples=[load_example(path) for path in options.example],
            progress=progress,
        )
        for batch in (options.batch if _is_one_for_each_batch(options) else [options.batch])
    ]


def _files(output: Path, models: list[CompiledModel]) -> dict[Path, CompiledModel]:
    """Where each model goes: to `output` where all are the same, else to ``OUT.b32.onnx`` for batch 32."""
    if len({model.stored.file.message for model in models}) == 1:  # it names all cores, plans and sizes
        return {output: models[0]}
    return {_at_batch(output, model.report.batches[0]): model for model in models}


def _is_one_for_each_batch(options: argparse.Namespace) -> bool:
    return options.device == "cuda" and len(options.batch) > 1


def _at_batch(output: Path, batch: int) -> Path:
    return output.with_name(f"{output.stem}.b{batch}{output.suffix}")


def _outputs(options: argparse.Namespace) -> list[Path]:
    """Every model file that may be written."""
    output = Path(options.output)
    return [output, *(_at_batch(output, batch) for batch in options.batch if _is_one_for_each_batch(options))]
