"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompile import __version__
from tncompile.commands import bench, tune
from tncompile.commands.options import console as _console
from tncompile.commands.options import sizes as _sizes
from tncompile.errors import LoadError, OutputError, TNCompileError
from tncompile.runtime.files import check_writable, write_file

if TYPE_CHECKING:
    from tncompile.ir import Array, Program

COMPILE_HELP = """\
Compile a PyTorch model (a file written by torch.export.save) to plain ONNX for ONNX Runtime.

other commands:
  tncompile inspect FILE     show the tensor networks of a model or of a compiled file
  tncompile verify MODEL OUT check a compiled file against the model it came from
  tncompile tune --device    measure this machine, for better plans on it
  tncompile bench MODEL      time the compiled model beside the other ways to run it
"""

PASSES_HELP = (
    "passes to run, in order, with options in braces: clean,fold,clean,merge_cores,order{max_trials=64},layout"
)

PROFILE_HELP = "device profile to plan with (default: as `tncompile tune --device` stored it, else the shipped one)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 refused or failed a check, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int]]] = {
        "inspect": (_inspect_parser, _inspect),
        "verify": (_verify_parser, _verify),
        "tune": (tune.parser, tune.run),
        "bench": (bench.parser, bench.run),
    }
    make, run = commands.get(arguments[0] if arguments else "", (_compile_parser, _compile))
    if run is not _compile:
        arguments = arguments[1:]
    try:
        return run(make().parse_args(arguments))
    except TNCompileError as error:
        print(f"tncompile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tncompile: interrupted, nothing written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `tncompile inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# ---------------------------------------------------------------------------------- parsers


def _compile_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tncompile",
        usage="tncompile MODEL -o OUT [options]",
        description=COMPILE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a file written by torch.export.save")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the ONNX file to write")
    _planning_options(parser)
    parser.add_argument(
        "--store",
        choices=("auto", "cores", "folded"),
        default="auto",
        help="folded layers in the file: as the cores they were made of, which ONNX Runtime folds at load, or written "
        "out; auto: the smaller, unless loading would take over 0.5 s longer",
    )
    parser.add_argument("--report", metavar="FILE", help="write every decision and its cost as JSON")
    parser.add_argument("--no-check", action="store_true", help="do not compare with the model in float64")
    _example_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--version", action="version", version=f"tncompile {__version__}")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tncompile inspect",
        description="Show the tensor networks of a model, or of a file that tncompile wrote.",
    )
    parser.add_argument("file", metavar="FILE", help="a file written by torch.export.save or by tncompile")
    parser.add_argument(
        "--format",
        choices=("text", "json", "dot", "networkx", "optimized"),
        default="text",
        help="default: text; optimized: the operators of an ONNX file as written and as ONNX Runtime runs them",
    )
    parser.add_argument("--after", metavar="PASS", help="show a model as it is after this pass, not as traced")
    _planning_options(parser)
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tncompile verify",
        description="Run a compiled file in ONNX Runtime against its model in float64; exit 1 if it is wrong.",
    )
    parser.add_argument("model", metavar="MODEL", help="a file written by torch.export.save")
    parser.add_argument("output", metavar="OUT", help="the ONNX file that was made from it")
    parser.add_argument("--batch", type=_sizes, default=(1, 32), metavar="N,N,...", help="batch sizes (default 1,32)")
    _example_option(parser)
    return parser


def _planning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=_sizes, default=(1, 32), metavar="N,N,...", help="batch sizes to plan for (default 1,32)"
    )
    parser.add_argument(
        "--dim",
        type=_dimension,
        action="append",
        default=[],
        metavar="NAME=N",
        help="typical size of another dynamic dimension (default: the example's)",
    )
    parser.add_argument("--passes", metavar="LIST", help=PASSES_HELP)
    parser.add_argument("--profile", metavar="FILE|default", help=PROFILE_HELP)
    parser.add_argument(
        "--max-memory",
        type=_bytes,
        metavar="SIZE",
        help="what the operands and intermediates of a network may take at once at these batch sizes, like 500MB",
    )


def _example_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="FILE.npz",
        help="inputs to check on, by name, instead of random ones; may be given several times",
    )


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip())
    if found is None or (size := float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ")) < 1:
        raise ValueError(text)
    return int(size)


_bytes.__name__ = "SIZE"


def _dimension(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or int(size) < 1:
        raise ValueError(text)
    return name, int(size)


_dimension.__name__ = "NAME=N"


# ---------------------------------------------------------------------------------- commands


def _compile(options: argparse.Namespace) -> int:
    model, output = Path(options.model), Path(options.output)
    report = None if options.report is None else Path(options.report)
    _check_paths(model, output, report)
    passes = _passes(options)
    from tncompile.frontend.load import detect

    detect(model)  # a missing file is told before torch is loaded
    with _Progress(options.quiet) as progress:
        progress(f"loading {model}")
        from tncompile import compiler
        from tncompile.passes import DEFAULT

        compiled = compiler.compile_file(
            model,
            batch=options.batch,
            sizes=dict(options.dim),
            passes=passes or DEFAULT,
            profile=options.profile,
            store=options.store,
            max_memory=options.max_memory,
            check=not options.no_check,
            examples=[_load_example(path) for path in options.example],
            progress=progress,
        )
        write_file(output, compiled.onnx)
        if report is not None:
            text = json.dumps({**compiled.report.to_dict(), "output": str(output)}, indent=1, ensure_ascii=False)
            write_file(report, (text + "\n").encode())
    if not options.quiet:
        console = _console(sys.stdout)
        for part in compiled.report.render():
            console.print(part)
        console.print(f"wrote {output}" + (f", report in {report}" if report else ""), highlight=False)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.format == "optimized":
        return _optimized(options)
    program = _program(options)
    from tncompile import inspect

    if options.format == "text":
        print(inspect.to_text(program), end="")
    elif options.format == "json":
        print(json.dumps(inspect.to_json(program), indent=1, ensure_ascii=False))
    elif options.format == "dot":
        print(inspect.to_dot(program), end="")
    else:
        print(inspect.networkx_json(program))
    return 0


def _optimized(options: argparse.Namespace) -> int:
    from tncompile.frontend.load import detect

    if detect(Path(options.file)) != "ONNX":
        raise LoadError(f"{options.file}: not an ONNX file; compile the model first, then give the compiled file")
    from tncompile.runtime.optimized import optimized

    print(optimized(options.file), end="")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from tncompile.frontend.load import detect

    if detect(Path(options.output)) != "ONNX":
        raise LoadError(f"{options.output}: not an ONNX file; give the model first, then the compiled file")
    from tncompile import compiler
    from tncompile.runtime.session import Session

    traced = compiler.import_file(options.model)
    session = Session(options.output)
    result = compiler.check_session(session, traced, options.batch, [_load_example(path) for path in options.example])
    print(f"{'passed' if result.passed else 'FAILED'}: {options.output} against {options.model} in float64")
    for output in result.outputs:
        print(f"  {output}")
    print(f"  run at {'; '.join(result.runs)}")
    return 0 if result.passed else 1


def _program(options: argparse.Namespace) -> Program:
    from tncompile.frontend.load import detect

    path = Path(options.file)
    if detect(path) == "ONNX":
        if options.after:
            raise TNCompileError("--after goes with a model; a compiled file shows its last stage only")
        from tncompile.inspect.compiled import program_of

        return program_of(path)
    from tncompile import compiler
    from tncompile.cost.devices import choose
    from tncompile.passes import DEFAULT, Limit

    passes = _passes(options) or DEFAULT
    if options.max_memory is not None and not any(isinstance(p, Limit) for p in passes):
        passes = (*passes, Limit())
    names = [p.name() for p in passes]
    if options.after is not None and options.after not in names:
        raise TNCompileError(f"--after {options.after}: no such pass is run; the passes are {', '.join(names)}")
    traced = compiler.import_file(path)
    if options.after is None:
        return traced.program
    last = len(names) - names[::-1].index(options.after)
    profile = choose(options.profile).profile
    context = compiler.planning_context(traced, options.batch, dict(options.dim), profile, options.max_memory)
    stages, _ = compiler.run_passes(traced, context, passes[:last], scheduled=False)
    return stages[options.after]


def _passes(options: argparse.Namespace) -> Any:
    if options.passes is None:
        return None
    from tncompile.passes.pipeline import parse_passes

    return parse_passes(options.passes)


def _check_paths(model: Path, output: Path, report: Path | None) -> None:
    """Say what is wrong with the paths before any work is done."""
    for path in (output, report):
        if path is not None:
            check_writable(path)
            if path.exists() and model.exists() and path.samefile(model):
                raise OutputError(f"{path}: is the model itself; write to another file")
    if report is not None and report.absolute() == output.absolute():
        raise OutputError(f"{report}: the report would overwrite the output; give it another name")


def _load_example(path: str) -> dict[str, Array]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file") from error
    except Exception as error:  # whatever a damaged archive makes numpy raise
        raise LoadError(f"{path}: not a readable .npz file of arrays ({error})") from error


class _Progress:
    """What is going on, on stderr: a spinner on a terminal, a line each elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.status: Any = None

    def __enter__(self) -> _Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status("starting")
            self.status.start()
        return self

    def __call__(self, message: str) -> None:
        if self.status is not None:
            self.status.update(message)
        elif not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()
