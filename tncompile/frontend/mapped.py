"""Weights of an exported program, mapped from its archive into memory instead of read.

torch's reader gets the archive with a stand-in for each weight (see `tncompile.frontend.files.exported`); the weights
themselves are pages of the file, which the system reads when they are wanted and may take back at any time.
"""

from __future__ import annotations

import mmap
import re
import weakref
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PART = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
"""The parts of an archive that are nothing but numbers."""

STAND_IN = b"\0" * 16
"""What torch reads in the place of a weight: at least one element of any dtype."""

_LOCAL_HEADER = 30
_CHUNK = 1 << 24
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class MappedWeights:
    """The weights of one archive: their bytes by part, and what `config` files say of each tensor.

    Parts that are stored uncompressed are mapped; compressed ones are read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # a private copy on write: torch and numpy warn of, or copy, memory that cannot be written to
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _maps.add(self._map)
        self._parts: dict[str, memoryview] = {}
        self._configs: dict[str, dict[str, Any]] = {}

    def add(self, part: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        """Take a part of the archive. zipfile.BadZipFile where its checksum is wrong."""
        if info.compress_type != zipfile.ZIP_STORED:
            self._parts[part] = memoryview(bytearray(archive.read(info)))
            return
        if info.flag_bits & 1:
            raise zipfile.BadZipFile(f"{info.filename} is encrypted")
        header = self._map[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile(f"no header of {info.filename}")
        start = info.header_offset + _LOCAL_HEADER
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = memoryview(self._map)[start : start + info.file_size]
        crc = 0
        for offset in range(0, len(data), _CHUNK):
            crc = zlib.crc32(data[offset : offset + _CHUNK], crc)
            release_pages()
        if len(data) != info.file_size or crc != info.CRC:
            raise zipfile.BadZipFile(f"bad checksum of {info.filename}")
        self._parts[part] = data

    def stand_in(self, part: str, config: dict[str, Any]) -> dict[str, Any]:
        """A ``weights_config.json`` that says of every tensor that it is one number; what it said is remembered."""
        self._configs[part] = config["config"]
        single = {"sizes": [], "strides": [], "storage_offset": {"as_int": 0}}
        entries = {
            name: {**entry, "tensor_meta": {**entry["tensor_meta"], **single}}
            for name, entry in config["config"].items()
        }
        return {**config, "config": entries}

    def put_into(self, exported: torch.export.ExportedProgram) -> None:
        """Replace the stand-ins of a loaded program by the weights. Raises where a tensor exceeds its part."""
        for part, entries in self._configs.items():
            store: dict[str, Any] = exported.constants if part.startswith("data/constants") else exported.state_dict
            for name, entry in entries.items():
                if name in store:
                    store[name] = self._tensor(f"{part.rpartition('/')[0]}/{entry['path_name']}", entry, store[name])

    def _tensor(self, part: str, entry: Mapping[str, Any], stand_in: torch.Tensor) -> torch.Tensor:
        import torch

        meta, data, dtype = entry["tensor_meta"], self._parts[part], stand_in.dtype
        sizes = [int(s["as_int"]) for s in meta["sizes"]]
        strides = [int(s["as_int"]) for s in meta["strides"]]
        if len(data):
            flat = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensor = flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).to(stand_in.device)
        if isinstance(stand_in, torch.nn.Parameter):
            return torch.nn.Parameter(tensor, requires_grad=stand_in.requires_grad)
        return tensor


def release_pages() -> None:
    """Give back the memory that mapped weights take at the moment; what is read again comes from the file again.

    A weight must never be written to: that would be undone here.
    """
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        for mapped in list(_maps):
            mapped.madvise(mmap.MADV_DONTNEED)
