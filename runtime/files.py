"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from tncompile.errors import OutputError
from tncompile.runtime.signals import deferred
from tncompile.runtime.temporary import file_beside

Content = bytes | Path | Callable[[BinaryIO], None]
"""What to write: bytes, a file that has them (a link to it, where the file system allows), or what writes them."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """OutputError, before any work is done, for a path that cannot become a file."""
    path = Path(path)
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a directory; give the name of the file to write")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the directory {path.parent} does not exist; make it first")
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{path}: is read-only; make it writable, or write to another file")
        if not _is_stream(path) and not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path}: the directory {path.parent} is not writable; write to another one")
    except OSError as error:  # a name too long, a link to itself
        raise OutputError(f"{path}: {reason(error)}") from error


def check_not_the_model(path: Path, model: Path) -> None:
    """OutputError where an output would take the place of what it is made from."""
    if path.exists() and model.exists() and path.samefile(model):
        raise OutputError(f"{path}: is the model itself; write to another file")


def data_path(path: Path) -> Path:
    """The data file of a model file."""
    return path.with_name(f"{path.name}.data")


def reason(error: OSError) -> str:
    """Why something cannot be written, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"cannot be written ({error.strerror or error})" + (f"; {advice}" if advice else "")


_SPACE = "free some space, or write to another place"
_ADVICE = {
    errno.ENOSPC: _SPACE,
    getattr(errno, "EDQUOT", -1): _SPACE,
    errno.EFBIG: "its size is limited here: write to another place, or raise the limit (ulimit -f)",
    errno.EROFS: "write to another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it appears whole or not at all, and an old one stays until then.

    OutputError where that cannot be done, a full disk included.
    """
    write_files({Path(path): data})


def write_files(contents: Mapping[Path, Content], remove: Iterable[Path] = ()) -> None:
    """Write files so that all appear whole or none does, and remove others with them; old ones stay until then.

    They appear in order, and the last one is taken to name the others: an old one of its name goes before those that
    it names change, so that whenever the process is killed there are the old files, the new ones, or no last one. What
    is no regular file (``/dev/stdout``) is written to as it is. OutputError where it cannot be done, a full disk
    included.
    """
    with contextlib.ExitStack() as stack:
        temporaries: dict[Path, Path] = {}
        for path, content in contents.items():
            check_writable(path)
            try:
                if _is_stream(path):
                    _fill(path, content)
                else:
                    temporaries[path] = stack.enter_context(file_beside(path))
                    _fill(temporaries[path], content)
                    _publish(temporaries[path])
            except OSError as error:
                raise OutputError(f"{path}: {reason(error)}") from error
        with deferred():
            _rename(temporaries)
            for path in [*remove, *map(_backup, temporaries)]:
                path.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _fill(target: Path, content: Content) -> None:
    if isinstance(content, Path):
        if _is_stream(target):
            shutil.copyfile(content, target)
            return
        target.unlink()
        try:
            os.link(content, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(content, target)
        return
    with target.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        with contextlib.suppress(OSError) if _is_stream(target) else contextlib.nullcontext():
            os.fsync(file.fileno())


def _publish(temporary: Path) -> None:
    """Give a file the mode that any new one has; a temporary one's is private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)


def _rename(temporaries: Mapping[Path, Path]) -> None:
    """Put new files into the places of the old ones: all, or, where one cannot be, none."""
    paths = [*temporaries]
    with contextlib.ExitStack() as undo:
        for number, path in enumerate(paths):
            try:
                if number == 0 and len(paths) > 1 and any(p.exists() for p in paths[:-1]):
                    _set_aside(paths[-1], undo)
                if number + 1 < len(paths):  # what follows may fail
                    _keep(path, undo)
                os.replace(temporaries[path], path)
            except OSError as error:
                raise OutputError(f"{path}: {reason(error)}") from error
        undo.pop_all()


def _backup(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _set_aside(path: Path, undo: contextlib.ExitStack) -> None:
    """Take a file away before what it names changes; it comes back if what follows fails."""
    if path.exists():
        os.replace(path, _backup(path))
        undo.callback(os.replace, _backup(path), path)


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
