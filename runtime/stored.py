"""A written model where ONNX Runtime can load it, and how it becomes files of the user's."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from tncompile.emit.onnxfile import OnnxFile
from tncompile.errors import OutputError
from tncompile.runtime.files import check_writable, data_path, reason, write_files
from tncompile.runtime.session import Session
from tncompile.runtime.temporary import folder_in


class Stored:
    """A model in memory, or, where its weights are in a file of their own, in a folder that lives as long as this.

    `folder` is where that folder is made, the system's own place where it is None; `save` to the same file system
    then copies nothing. OutputError where it cannot be written.
    """

    def __init__(self, file: OnnxFile, folder: Path | None = None) -> None:
        self.file = file
        self.source: bytes | Path = file.message
        self.close: Callable[[], object] = lambda: None
        """Removes the folder, as happens at the latest when this goes; nothing can be run or saved any more."""
        if not file.external:
            return
        folders = contextlib.ExitStack()
        self.close = weakref.finalize(self, folders.close)
        try:
            self.source = folders.enter_context(folder_in(folder)) / "model.onnx"
            _write(self.source, file)
        except (OSError, OutputError) as error:
            self.close()
            cause = error if isinstance(error, OSError) else error.__cause__
            why = reason(cause) if isinstance(cause, OSError) else str(error)
            raise OutputError(f"{folder or tempfile.gettempdir()}: the weights {why}") from error

    def session(self) -> Session:
        """A session to check the numbers with."""
        return Session(self.source, prepack=not self.file.external)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``PATH`` and, where weights are apart, ``PATH.data``: both whole, or neither. OutputError if not."""
        data = None if isinstance(self.source, bytes) else data_path(self.source)
        _write(Path(path), self.file, data)


def session_of(path: Path) -> Session:
    """A session to check a file with: weights that are in a file of their own stay as they are there."""
    return Session(path, prepack=not data_path(path).is_file())


def _write(path: Path, file: OnnxFile, data: Path | None = None) -> None:
    """Write a model's files; `data` has the data file's contents where they have been written before."""
    beside = data_path(path)
    if not file.external:
        stale = [beside] if _refers_to(path, beside) else []
        write_files({path: file.message}, remove=stale)
        return
    check_writable(beside)
    message = file.message_for(beside.name)
    write_files({beside: file.write_data if data is None else data, path: message})


def _refers_to(model: Path, data: Path) -> bool:
    """Whether an existing model file has its weights in `data`."""
    if not data.is_file() or not model.is_file() or model.stat().st_size > data.stat().st_size:
        return False
    return data.name.encode() in model.read_bytes()
