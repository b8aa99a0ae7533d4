"""Arrays in .npz and .npy files of strangers: no pickles, and large ones mapped and not read."""

from __future__ import annotations

import mmap
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from tncompile.errors import TNCompileError, first_line
from tncompile.ir import Array

LARGE = 1 << 26
"""Bytes above which an array is mapped from the file, or from an unpacked copy that has no name."""


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file by name, that of an .npy under an empty one. TNCompileError for any other file."""
    try:
        if path.suffix == ".npy":
            return {"": _checked(np.load(path, mmap_mode="c" if path.stat().st_size > LARGE else None), path)}
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            found = {info.filename[:-4]: _checked(_member(archive, info), path) for info in members}
    except OSError as error:
        raise TNCompileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise TNCompileError(
            f"{path}: not arrays that can be read ({first_line(error)[:200]}); write them with "
            "numpy.savez(path, name=array), with numbers only"
        ) from error
    if not found:
        raise TNCompileError(f"{path}: holds no arrays; write them with numpy.savez(path, name=array)")
    return found


def _checked(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"an array of {array.dtype} in {path.name}")
    return array


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as part:
        if info.file_size <= LARGE:
            return np.asarray(np.lib.format.read_array(part, allow_pickle=False))
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(part, copy, 1 << 20)
            return _mapped(copy)


def _mapped(file: IO[bytes]) -> Array:
    """An array whose pages are those of a file, which may be closed and deleted."""
    file.flush()
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return np.ndarray(shape, dtype, pages, file.tell(), order="F" if fortran else "C")
