"""An index of shards: the files, beside it, that the weights of one model are spread over."""

from __future__ import annotations

import json
from pathlib import Path

from tncompile.errors import LoadError


def shards(index: Path) -> list[Path]:
    """The files that an index names, sorted. LoadError where one is to lie outside its folder."""
    names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    for name in names:
        if Path(name).name != name:
            raise LoadError(f"{index}: names a file outside its folder ({name}); refused")
    return [index.parent / name for name in names]
