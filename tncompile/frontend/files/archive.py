"""Zip archives of strangers: none is opened that would unpack to far more than the file holds."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tncompile.errors import LoadError

_ALWAYS = 1 << 28  # bytes that any archive may unpack to
_TIMES = 64  # beyond that, how many times the size of the file; weights do not compress nearly so well


def is_archive(path: Path) -> bool:
    """Whether a file begins as an archive does, which is how torch tells them from its old files."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


@contextlib.contextmanager
def open_archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """The archive, its sizes checked. LoadError where they are not plausible, zipfile.BadZipFile where it is damaged.

    Reading a part never gives more than the size checked here: Python stops there.
    """
    with zipfile.ZipFile(path) as archive:
        whole = os.stat(path).st_size
        stored = [p.file_size for p in archive.infolist() if p.compress_type == zipfile.ZIP_STORED]
        unpacked = sum(part.file_size for part in archive.infolist())
        if sum(stored) > whole or unpacked > max(_ALWAYS, _TIMES * whole):
            raise LoadError(
                f"{path}: damaged or made to fill the memory: a file of {whole:,} bytes that says it holds "
                f"{unpacked:,}; copy or save it again"
            )
        yield archive
