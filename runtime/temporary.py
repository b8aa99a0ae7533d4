"""Files and folders on the way to becoming output; those that a killed process left are removed by the next one.

Whoever makes one holds a lock on it while it lives, so one that is not locked is nobody's. Where there are no such
locks (Windows), none is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tncompile.runtime.signals import deferred

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_FOLDER = ".tncompile-"
_RANDOM = "[a-z0-9_]{8}"  # what tempfile puts behind a prefix


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of `path`, removed at the end unless it was renamed. OSError if none can be made."""
    prefix = f".{path.name}."
    _sweep(path.parent, prefix)
    handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    try:
        _lock(handle)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def folder_in(parent: Path | None) -> Iterator[Path]:
    """An empty folder in `parent` (None: the system's own place); removed with all in it at the end.

    OSError where none can be made.
    """
    _sweep(Path(tempfile.gettempdir()) if parent is None else parent, _FOLDER)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
    handle: int | None = None
    try:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            _lock(handle)
        yield folder
    finally:
        with deferred():
            shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(folder: Path, prefix: str) -> None:
    """Remove what processes that were killed have left in a folder."""
    if fcntl is None:
        return
    left = re.compile(re.escape(prefix) + _RANDOM)
    with contextlib.suppress(OSError):  # what cannot be listed or removed stays
        for entry in [e for e in os.scandir(folder) if left.fullmatch(e.name) and not e.is_symlink()]:
            with contextlib.suppress(OSError):
                handle = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    if _lock(handle):
                        _remove(entry)
                finally:
                    os.close(handle)


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)


def _lock(handle: int) -> bool:
    """Whether nobody else holds it. Where the file system has no locks, nothing is ever taken for nobody's."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
