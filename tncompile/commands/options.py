"""What several commands share: options and their types, example inputs, progress, and how results are printed."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tncompile.errors import LoadError, TNCompileError

if TYPE_CHECKING:
    from tncompile.frontend.files.inputs import InputSpec
    from tncompile.frontend.load import LoadOptions
    from tncompile.ir import Array

PASSES_HELP = "passes to run, in order, with options in braces: clean,fold,merge_cores,order{max_trials=64},layout"

PROFILE_HELP = "device profile to plan with (default: as `tncompile tune --device` stored it, else the shipped one)"


def sizes(text: str) -> tuple[int, ...]:
    """``"1,32"`` -> (1, 32); refuses anything but positive whole numbers, as `argparse` wants it."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give sizes of at least 1, with commas between them, like 1,32")
    return tuple(map(int, parts))


def positive(text: str) -> float:
    """A positive number; refuses anything else, as `argparse` wants it."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        like = f"{float(text[:-1]) / 100:g} for {text}" if re.fullmatch(r"\d+(\.\d+)?%", text) else "0.01"
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0, like {like}")
    return number


def count(text: str) -> int:
    """A positive whole number. ValueError for anything else."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


count.__name__ = "positive whole number"


def names(known: Iterable[str], kind: str = "") -> Callable[[str], tuple[str, ...]]:
    """Reads ``"a,b"`` as some of the known names, each once; refuses others, as `argparse` wants it."""

    def chosen(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            wrong = ", ".join(unknown) or repr(text)
            raise argparse.ArgumentTypeError(f"no {kind}{wrong}; choose from {', '.join(known)}")
        return found

    return chosen


def memory(text: str) -> int:
    """``"500MB"``, ``"2GiB"`` -> bytes; refuses anything else, as `argparse` wants it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    power = " KMGT".index(found[2].upper() or " ") if found else 0
    if found is None or (size := float(found[1]) * (1024 if found[3] else 1000) ** power) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a size of at least a byte in B, kB, MB, GB or TB, or KiB, MiB, GiB or TiB, like 500MB"
        )
    return int(size)


def dimension(text: str) -> tuple[str, int]:
    """``"seq=128"`` -> its name and size. ValueError for anything else."""
    name, _, size = text.partition("=")
    if not name or int(size) < 1:
        raise ValueError(text)
    return name, int(size)


dimension.__name__ = "NAME=N"


def input_spec(text: str) -> InputSpec:
    """``"x:float32[batch,3]"`` -> an input; refuses others, as `argparse` wants it."""
    from tncompile.frontend.files.inputs import parse_input

    try:
        return parse_input(text)
    except TNCompileError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


MODEL_HELP = "the model file: an exported program, TorchScript, a pickled module, or weights with --model"


def loading_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a model file may not say itself."""
    parser.add_argument(
        "--input",
        type=input_spec,
        action="append",
        default=[],
        metavar="NAME:DTYPE[SIZES]",
        help="an input's shape, where the file has none: x:float32[batch,3,224,224], where a word is a dynamic size "
        "(size=64 to trace it with 64); ids:int64[batch,seq]<8000 for numbers below 8000; NAME=VALUE for one that "
        "never changes; once for each input",
    )
    parser.add_argument(
        "--model",
        dest="factory",
        metavar="MODULE:FACTORY",
        help="what makes the module that a file of weights goes into: package.module:factory",
    )
    parser.add_argument(
        "--trust-pickle", action="store_true", help="let a pickle run its code: only if you trust where it comes from"
    )
    parser.add_argument(
        "--fix-choices",
        action="store_true",
        help="where a TorchScript model branches on the values of its inputs, compile the way that random ones take",
    )


def loading(options: argparse.Namespace) -> LoadOptions:
    """What `loading_options` took."""
    from tncompile.frontend.load import LoadOptions

    return LoadOptions(tuple(options.input), options.factory, options.trust_pickle, options.fix_choices)


def dimension_option(parser: argparse.ArgumentParser) -> None:
    """The option that says what the sizes of dynamic dimensions are like."""
    parser.add_argument(
        "--dim",
        type=dimension,
        action="append",
        default=[],
        metavar="NAME=N",
        help="typical size of another dynamic dimension (default: the example's)",
    )


def planning_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to plan for."""
    parser.add_argument(
        "--batch", type=sizes, default=(1, 32), metavar="N,N,...", help="batch sizes to plan for (default 1,32)"
    )
    dimension_option(parser)
    parser.add_argument("--passes", metavar="LIST", help=PASSES_HELP)
    parser.add_argument("--profile", metavar="FILE|default", help=PROFILE_HELP)
    parser.add_argument(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help="what the operands and intermediates of a network may take at once at these batch sizes, like 500MB",
    )


def example_option(parser: argparse.ArgumentParser) -> None:
    """The option that gives inputs to check on."""
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="FILE.npz",
        help="inputs to check on, by name, instead of random ones; may be given several times",
    )


def passes(options: argparse.Namespace) -> Any:
    """The passes that were asked for, None for the default ones."""
    if options.passes is None:
        return None
    from tncompile.passes.pipeline import parse_passes

    return parse_passes(options.passes)


def load_example(path: str) -> dict[str, Array]:
    """The arrays of an ``.npz`` file. LoadError where there are none to read."""
    import numpy as np

    from tncompile.frontend.files.archive import open_archive

    try:
        with open_archive(path), np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except LoadError:
        raise
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file") from error
    except Exception as error:  # whatever a damaged archive makes numpy raise
        raise LoadError(f"{path}: not a readable .npz file of arrays ({error})") from error


class Progress:
    """What is going on, on stderr: a spinner on a terminal, a line each elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.status: Any = None

    def __enter__(self) -> Progress:
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


def console(file: Any) -> Any:
    """A rich console, as wide as the terminal, or of 140 columns elsewhere."""
    from rich.console import Console

    result = Console(file=file, highlight=False)
    return result if result.is_terminal else Console(file=file, highlight=False, width=140)
