"""``tncompile verify MODEL OUT``: a compiled file against the model that it came from."""

from __future__ import annotations

import argparse
from pathlib import Path

from tncompile.commands.options import MODEL_HELP, example_option, load_example, loading, loading_options, sizes
from tncompile.errors import LoadError

_LARGEST = 4096  # batch that a file may ask to be run at


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="tncompile verify",
        description="Run a compiled file in ONNX Runtime against its model in float64; exit 1 if it is wrong.",
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    result.add_argument("output", metavar="OUT", help="the ONNX file that was made from it")
    result.add_argument("--batch", type=sizes, default=(1, 32), metavar="N,N,...", help="batch sizes (default 1,32)")
    loading_options(result)
    example_option(result)
    return result


def run(options: argparse.Namespace) -> int:
    """Check and print; 1 where the file is wrong."""
    from tncompile.frontend.load import detect

    if detect(Path(options.output)) != "ONNX":
        raise LoadError(f"{options.output}: not an ONNX file; give the model first, then the compiled file")
    from tncompile import compiler
    from tncompile.inspect.compiled import batches_of
    from tncompile.runtime.stored import session_of

    traced = compiler.import_file(options.model, loading(options))
    session = session_of(Path(options.output))
    examples = [load_example(path) for path in options.example]
    with compiler.naming(options.model):
        also = () if examples else [size for size in batches_of(options.output) if size <= _LARGEST]
        result = compiler.check_session(session, traced, options.batch, examples, also)
    print(f"{'passed' if result.passed else 'FAILED'}: {options.output} against {options.model} in float64")
    for output in result.outputs:
        print(f"  {output}")
    if result.note:
        print(f"  {result.note}")
    print(f"  run at {'; '.join(result.runs)}")
    return 0 if result.passed else 1
