"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tncompile.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """OutputError, before any work is done, for a path that cannot become a file."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; give the name of the file to write")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the directory {path.parent} is not writable")


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it appears whole or not at all, and an old one stays until then.

    OutputError where that cannot be done, a full disk included.
    """
    path = Path(path)
    check_writable(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode is for private files
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        raise
