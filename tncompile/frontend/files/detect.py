"""What kind of file is this? Its content says; its name does not matter."""

from __future__ import annotations

import io
import json
import os
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tncompile.errors import LoadError
from tncompile.frontend.files.archive import open_archive
from tncompile.frontend.files.legacy import object_span

_LARGEST_PICKLE = 1 << 28  # bytes of a model's structure; its tensors are apart
_PLAIN = ("torch._utils.", "torch.", "collections.OrderedDict", "collections.Counter")

# the field of an ONNX model behind ir_version: producer, version, domain, text, graph, operator sets, metadata
_AFTER_IR_VERSION = (b"\x12", b"\x1a", b"\x22", b"\x28", b"\x32", b"\x3a", b"\x42", b"\x72")


def detect(path: Path) -> str:
    """What kind of file this is, from its content alone. LoadError where it is missing or cannot be read."""
    try:
        if path.is_dir():
            return "directory"
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0, os.SEEK_END)
            size = file.tell()
            if head[:1] == b"\x80" and len(head) > 1 and head[1] in range(2, 6):
                file.seek(0)
                return _detect_legacy(file)
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        return "empty"
    if head.startswith(b"PK"):
        return _detect_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[0] == 0x08 and 0 < int.from_bytes(head[1:2], "little") < 64 and head[2:3] in _AFTER_IR_VERSION:
        return "ONNX"
    if head.startswith(b"\x89HDF"):
        return "HDF5"
    if head.lstrip()[:1] == b"{" and size < _LARGEST_PICKLE and _is_index(path):
        return "index"
    return "unknown"


def _is_index(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("weight_map"), dict)


def _detect_zip(path: Path) -> str:
    try:
        with open_archive(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            if any(n.startswith("models/") and n.endswith(".json") for n in names):
                return "exported program"
            if "serialized_exported_program.json" in [*names, *archive.namelist()]:
                return "old exported program"
            if "constants.pkl" in names or any(n.startswith("code/") for n in names):
                return "TorchScript"
            if "data.pkl" in names:
                info = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl")))
                if info.file_size > _LARGEST_PICKLE:
                    return "pickle"
                return _kind_of_pickle(archive.read(info))
            if any(n.endswith(".npy") for n in names):
                return "npz"
            return "zip"
    except LoadError:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise LoadError(
            f"{path}: truncated or corrupted, its archive cannot be read ({error}); copy or export it again"
        ) from error
    except Exception as error:  # zlib errors of a damaged member
        raise LoadError(f"{path}: corrupted ({error}); copy or export it again") from error


def _detect_legacy(file: IO[bytes]) -> str:
    data = file.read()
    span = object_span(data)
    return "plain pickle" if span is None else _kind_of_pickle(data[slice(*span)])


def _kind_of_pickle(data: bytes) -> str:
    """A state_dict names only torch's own rebuilding functions; a pickled module names classes."""
    try:
        named = [*globals_of(data)]
    except Exception:  # not a whole pickle: no more is to be known
        return "pickle"
    plain = all(n.startswith(_PLAIN) and not n.startswith("torch.nn.modules.") for n in named)
    return "state_dict" if plain else "pickle"


def globals_of(data: bytes) -> Iterator[str]:
    """The dotted names of everything that a pickle would import, without importing it.

    A name that is put together on the stack is given as ``"?"``. Raises ValueError where this is no whole pickle.
    """
    strings: list[str] = []
    for op, arg, _ in pickletools.genops(io.BytesIO(data)):
        if op.name in ("GLOBAL", "INST"):
            yield str(arg).replace(" ", ".").replace("__builtin__.", "builtins.")
        elif op.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:]) if len(strings) > 1 else "?"
        elif op.name.startswith("EXT"):
            yield "?"
        elif "UNICODE" in op.name:
            strings.append(str(arg))
