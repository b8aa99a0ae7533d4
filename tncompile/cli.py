"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tncompile.commands import bench, compile, inspect, tensorize, tune, verify
from tncompile.errors import TNCompileError, TNCompileWarning
from tncompile.runtime import signals
from tncompile.runtime.files import reason

Command = tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int]]
COMPILE: Command = (compile.parser, compile.run)
COMMANDS: dict[str, Command] = {
    "inspect": (inspect.parser, inspect.run),
    "verify": (verify.parser, verify.run),
    "tune": (tune.parser, tune.run),
    "bench": (bench.parser, bench.run),
    "tensorize": (tensorize.parser, tensorize.run),
}
_AS_IT_WAS = "no file was left half written"


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print our own warnings as one line, without the place in our code."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, TNCompileWarning):
                print(f"tncompile: note: {message}", file=sys.stderr)
            else:
                others(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("always", TNCompileWarning)
        yield


def _meant(word: str) -> str:
    """The command that a word which is neither a command nor a file comes near to; "" where there is none."""
    found = [] if os.path.lexists(word) else difflib.get_close_matches(word, COMMANDS, 1, 0.75)
    return found[0] if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 refused or failed a check, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = bool(arguments) and arguments[0] in COMMANDS
    if arguments and not named and (meant := _meant(arguments[0])):
        print(f"tncompile: no file and no command {arguments[0]!r}; did you mean {meant}?", file=sys.stderr)
        return 2
    parser, run = COMMANDS[arguments[0]] if named else COMPILE
    try:
        with signals.raised(), _one_line_warnings():
            code = run(parser().parse_args(arguments[named:]))
            sys.stdout.flush()
            return code
    except TNCompileError as error:
        print(f"tncompile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tncompile: interrupted; {_AS_IT_WAS}", file=sys.stderr)
        return 130
    except signals.Terminated as error:
        print(f"tncompile: ended by a signal ({error.number}); {_AS_IT_WAS}", file=sys.stderr)
        return 128 + error.number
    except MemoryError:
        print("tncompile: not enough memory for this model", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away: `tncompile inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk under our output or under temporary files
        print(f"tncompile: {error.filename or 'standard output'}: {reason(error)}", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python would write at its end
        return 1
