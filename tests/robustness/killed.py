"""Ends the command line at every moment at which it touches a file of its output folder, and looks what is there.

    python -m tests.robustness.killed "over two files"

Prints how many moments there were; an AssertionError tells of a file that is half written, or left over.
"""

from __future__ import annotations

import gc
import io
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tncompile.cli import main

Files = Mapping[str, bytes]
OUT, DATA = "out.onnx", "out.onnx.data"
_TOUCHES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


def model(scale: float) -> bytes:
    """A layer that is a network and nothing else, so that it is compiled in no time; other weights each."""
    weight = numpy_helper.from_array(np.full((128, 64), scale, np.float32), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", s]) for n, s in (("x", 128), ("y", 64)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def compile_in(folder: Path, options: list[str]) -> int:
    """Compile ``model.onnx`` beside the folder into it."""
    return main([str(folder.parent / "model.onnx"), "-o", str(folder / OUT), "-q", "--batch", "2", *options])


def files_in(folder: Path) -> dict[str, bytes]:
    """What is in a folder; what is not a plain file under its name alone."""
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir()}


def ended_at(moment: int, number: int, folder: Path, options: list[str]) -> tuple[int, str]:
    """Exit code (negative: the signal) and stderr of a compile that gets a signal at its n-th touch of the folder."""
    errors = folder.parent / "stderr"
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def touched(event: str, arguments: tuple[object, ...]) -> None:
            inside = any(isinstance(a, (str, os.PathLike)) and str(folder) in str(a) for a in arguments)
            if event in _TOUCHES and inside and next(count) == moment:
                os.kill(os.getpid(), number)

        sys.addaudithook(touched)
        printed = io.StringIO()
        with redirect_stderr(printed):
            code = compile_in(folder, options)
        gc.collect()  # as at the end of a process: what still lives is tidied up
        errors.write_text(printed.getvalue())
        os._exit(code if next(count) > moment else 77)  # 77: there was no such moment
    errors.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, errors.read_text() if errors.exists() else ""


def moments(number: signal.Signals, old: list[str] | None, options: list[str], folder: Path) -> Iterator[str]:
    """What was there after each moment: ``old``, ``new`` or ``none``. Before, there is what `old` options compiled."""
    source = folder.parent / "model.onnx"
    before: Files = {}
    if old is not None:
        source.write_bytes(model(1.0))
        assert compile_in(folder, old) == 0
        before = files_in(folder)
    source.write_bytes(model(2.0))
    whole = folder.parent / "whole"
    whole.mkdir()
    assert compile_in(whole, options) == 0
    after = files_in(whole)
    for moment in itertools.count(1):
        for path in folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        code, said = ended_at(moment, number, folder, options)
        if code == 77:
            return
        found = files_in(folder)
        assert "Traceback" not in said, said
        if number is signal.SIGKILL:
            assert code == -number
        else:
            assert code == 128 + number and said.startswith("tncompile: ") and said.count("\n") == 1, (code, said)
            assert found in (before, after, {**before, OUT: after[OUT]}), f"at {moment}: {[*found]}"
        yield _state(found, before, after, moment)
        if number is signal.SIGKILL:
            assert compile_in(folder, options) == 0
            left = files_in(folder).keys() - after.keys()
            # of a model in one file in the place of one in two, the second may be left: who knows whose it is
            assert left <= ({DATA} if DATA in before else set()), f"left over after {moment}: {left}"


def _state(found: Files, before: Files, after: Files, moment: int) -> str:
    """Which model it is that is there, with all that belongs to it."""
    for name, files in (("new", after), ("old", before)):
        belongs = [n for n in files if n.startswith(OUT)]
        if OUT in files and all(found.get(n) == files[n] for n in belongs):
            return name
    assert OUT not in found, f"at moment {moment} the model is half old and half new: {[*found]}"
    return "none"


def run(number: signal.Signals, old: list[str] | None, options: list[str]) -> list[str]:
    """All moments, in a folder of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        folder.mkdir()
        return list(moments(number, old, options, folder))


CASES: Mapping[str, tuple[list[str] | None, list[str]]] = {
    "nothing before": (None, []),
    "over one file": ([], []),
    "over two files": (["--external-data"], ["--external-data"]),
    "two files over one": ([], ["--external-data"]),
    "one file over two": (["--external-data"], []),
}

if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            found = run(number, *CASES[case])
            print(f"{case}, {number.name}: {len(found)} moments,", *sorted({*found}), flush=True)
