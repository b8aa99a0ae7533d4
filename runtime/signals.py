"""Signals that end the process: it tidies up first, and never in the middle of renaming files."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(BaseException):
    """The process was asked to end, by the signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Let a request to end the process raise `Terminated`, as Ctrl-C raises KeyboardInterrupt: files are tidied.

    Signals that the caller ignores (``nohup``) stay ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    with _handled(end, [n for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL]):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let signals that Python handles wait until the end, for what must not be left half done and takes no time."""
    waiting: list[int] = []
    handled = [n for n in (signal.SIGINT, *_ENDING) if callable(signal.getsignal(n))]
    with _handled(lambda number, frame: waiting.append(number), handled):
        yield
    for number in waiting[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handled(handler: object, numbers: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may, and only that one is interrupted
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
