"""What the benchmarks have in common that run each case in processes of its own and keep what they found."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import CASES
from tncompile.errors import TNCompileError
from tncompile.runtime.files import write_file

ROOT = Path(__file__).resolve().parents[1]


def case_names(text: str) -> tuple[str, ...]:
    """``"minilm_l6,crepe_tiny"`` -> names of cases; refuses others, as `argparse` wants it."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in found if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    return found


def environment() -> dict[str, str]:
    """The environment of a process that finds this package wherever it runs."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def read(store: Path) -> dict[str, Any]:
    """The results in a file. TNCompileError where it cannot be read."""
    try:
        stored = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TNCompileError(f"{store}: not readable ({error}); remove it, or give another --out") from error
    assert isinstance(stored, dict)
    return stored


def write(store: Path, results: dict[str, Any]) -> None:
    """Keep the results, whole: a run that is stopped can go on."""
    write_file(store, (json.dumps(results, indent=1) + "\n").encode())


def check_document(path: Path | None) -> None:
    """TNCompileError, before any work, where the document that a table is to go into is not there."""
    if path is not None and not path.is_file():
        raise TNCompileError(f"{path}: no such file")


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None
) -> int:
    """What `run` answers; 1, and a line that says why, where it refuses. Wrong usage ends in `argparse`'s 2."""
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except TNCompileError as error:
        print(f"{parser.prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 1
