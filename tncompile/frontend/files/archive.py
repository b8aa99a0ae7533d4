"""Zip archives of strangers: none is opened that would unpack to far more than the file holds."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator
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


def parts(
    archive: zipfile.ZipFile,
    allowed: re.Pattern[str],
    refusal: Callable[[str], LoadError],
    left_out: re.Pattern[str] = re.compile(r"(?!)"),
) -> Iterator[tuple[str, str]]:
    """The names of an archive's members, and of the parts that they are: without the folder that torch puts all in.

    Raises the `refusal` of the first name that is not `allowed`, or stands there twice: torch finds parts whatever the
    case of their names.
    """
    names = archive.namelist()
    root = names[0].partition("/")[0] if names else ""
    seen: set[str] = set()
    for name in names:
        part = name.removeprefix(f"{root}/")
        if left_out.fullmatch(part):
            continue
        if not allowed.fullmatch(part) or name == part or name.lower() in seen:
            raise refusal(name)
        seen.add(name.lower())
        yield name, part
