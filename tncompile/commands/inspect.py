"""``tncompile inspect FILE``: the tensor networks of a model or of a compiled file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tncompile.commands.options import MODEL_HELP, loading, loading_options, passes, planning_options
from tncompile.errors import LoadError, TNCompileError

if TYPE_CHECKING:
    from tncompile.ir import Program


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="tncompile inspect",
        description="Show the tensor networks of a model, or of a file that tncompile wrote.",
    )
    result.add_argument("file", metavar="FILE", help=f"{MODEL_HELP}; or what tncompile wrote")
    result.add_argument(
        "--format",
        choices=("text", "json", "dot", "networkx", "optimized"),
        default="text",
        help="default: text; optimized: the operators of an ONNX file as written and as ONNX Runtime runs them",
    )
    result.add_argument("--after", metavar="PASS", help="show a model as it is after this pass, not as traced")
    loading_options(result)
    planning_options(result)
    return result


def run(options: argparse.Namespace) -> int:
    """Print the view that was asked for."""
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


def _program(options: argparse.Namespace) -> Program:
    from tncompile.frontend.load import detect

    path = Path(options.file)
    if detect(path) == "ONNX":
        from tncompile.inspect.compiled import program_of

        program = program_of(path)
        if program is not None and options.after:
            raise TNCompileError("--after goes with a model; a compiled file shows its last stage only")
        if program is not None:
            return program
    from tncompile import compiler
    from tncompile.cost.devices import choose
    from tncompile.passes import DEFAULT, Limit

    stages = passes(options) or DEFAULT
    if options.max_memory is not None and not any(isinstance(p, Limit) for p in stages):
        stages = (*stages, Limit())
    names = [p.name() for p in stages]
    if options.after is not None and options.after not in names:
        raise TNCompileError(f"--after {options.after}: no such pass is run; the passes are {', '.join(names)}")
    traced = compiler.import_file(path, loading(options))
    if options.after is None:
        return traced.program
    last = len(names) - names[::-1].index(options.after)
    profile = choose(options.profile).profile
    context = compiler.planning_context(traced, options.batch, dict(options.dim), profile, options.max_memory)
    programs, _ = compiler.run_passes(traced, context, stages[:last], scheduled=False)
    return programs[options.after]
