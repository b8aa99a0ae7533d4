"""Every error of tncompile, and the place in the user's code that one points at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceRef:
    """Where in the user's model a node comes from.

    ``module`` is the path of the layer (``"encoder.0.fc1"``), ``file`` and ``line`` the user's line of
    Python and ``code`` its text; each may be unknown (``""`` or ``0``).
    """

    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return ", ".join(part for part in (self.module, place) if part) or "unknown place"


class TNCompileError(Exception):
    """Base of all errors a user can cause; its text says what, where and what to do."""

    def __init__(self, message: str, source: SourceRef | None = None) -> None:
        self.source = source
        if source is not None and (source.file or source.module):
            message = f"{message}\n  at {source}"
            if source.code:
                message = f"{message}\n     {source.code}"
        super().__init__(message)


class LoadError(TNCompileError):
    """A model file cannot be read, or is of a kind that is not accepted."""


class UnsupportedError(TNCompileError):
    """The model uses something that cannot be compiled."""


class VerificationError(TNCompileError):
    """A program breaks an invariant of the IR: a fault of a pass, with the node that shows it."""


class ParseError(TNCompileError):
    """The text of a program cannot be parsed."""


class CheckError(TNCompileError):
    """The compiled model's numbers are not those of the traced model."""


class OutputError(TNCompileError):
    """An output file cannot be written."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything, the error's type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class TNCompileWarning(UserWarning):
    """What a user should know of a result that is right all the same; the command line prints it as one line."""
