"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from tncompile.errors import OutputError

Content = bytes | Path | Callable[[BinaryIO], None]
"""What to write: bytes, a file that has them (a link to it, where the file system allows), or what writes them."""


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
    write_files({Path(path): data})


def write_files(contents: Mapping[Path, Content], remove: Iterable[Path] = ()) -> None:
    """Write files so that all appear whole or none does, and remove others with them; old ones stay until then.

    They appear in order. OutputError where that cannot be done, a full disk included.
    """
    temporaries: dict[Path, Path] = {}
    with contextlib.ExitStack() as undo:
        for path, content in contents.items():
            check_writable(path)
            try:
                temporaries[path] = _temporary(path, undo)
                _fill(temporaries[path], content)
            except OSError as error:
                raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        for number, (path, temporary) in enumerate(temporaries.items()):
            try:
                if number + 1 < len(temporaries):  # what follows may fail
                    _keep(path, undo)
                os.replace(temporary, path)
            except OSError as error:
                raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        undo.pop_all()
    for path in [*remove, *(_backup(p) for p in temporaries)]:
        path.unlink(missing_ok=True)


def _temporary(path: Path, undo: contextlib.ExitStack) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    undo.callback(Path(name).unlink, missing_ok=True)
    return Path(name)


def _fill(temporary: Path, content: Content) -> None:
    mask = os.umask(0)
    os.umask(mask)
    if isinstance(content, Path):
        temporary.unlink()
        try:
            os.link(content, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(content, temporary)
        os.chmod(temporary, 0o666 & ~mask)
        return
    with temporary.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode is for private files


def _backup(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _keep(path: Path, undo: contextlib.ExitStack) -> None:
    """Let a file that is about to be replaced come back if what follows fails."""
    backup = _backup(path)
    if path.exists():
        backup.unlink(missing_ok=True)
        try:
            os.link(path, backup)
        except OSError:  # a file system without links
            os.rename(path, backup)
        undo.callback(backup.unlink, missing_ok=True)  # where both are one file, a rename leaves both names
        undo.callback(os.replace, backup, path)
    else:
        undo.callback(path.unlink, missing_ok=True)
