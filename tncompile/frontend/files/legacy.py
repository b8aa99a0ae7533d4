"""torch.save's files from before they were archives: a row of pickles, of which the fourth is the object.

For each class of a module such a file has a persistent id, ``("module", class, file name, source)``, which torch's
restricted unpickler refuses as it stands. Here it becomes a call of one harmless function that gives the class back:
the restricted unpickler then judges all of it.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
#: the name that the rewritten pickle has for `class_of`
CLASS_OF = "tncompile_class_of"


def class_of(kind: Any, cls: Any, file: Any, source: Any) -> Any:
    """The class in a persistent id, in place of which this is called."""
    return cls


def object_span(data: bytes) -> tuple[int, int] | None:
    """Where the object's pickle begins and ends; None where this is no old torch file, or not a whole one."""
    file = io.BytesIO(data)
    try:
        if [arg for op, arg, _ in pickletools.genops(file) if op.name.startswith("LONG")] != [MAGIC]:
            return None
        for _ in range(2):
            _skip(file)
        start = file.tell()
        _skip(file)
    except Exception:  # whatever is no pickle makes pickletools raise
        return None
    return start, file.tell()


def _skip(file: io.BytesIO) -> None:
    for _ in pickletools.genops(file):
        pass


def without_sources(data: bytes) -> bytes:
    """An old torch file, each persistent id of a class rewritten; other bytes as they are."""
    span = object_span(data)
    if span is None:
        return data
    start, end = span
    inserted, replaced = _classes(data[start:end])
    parts = [data[:start]]
    last = 0
    for position in sorted({*inserted, *replaced}):
        parts.append(data[start + last : start + position])
        parts.append(f"ctorch\n{CLASS_OF}\n".encode() if position in inserted else b"R")
        last = position if position in inserted else position + 1
    return b"".join([*parts, data[start + last :]])


def _classes(pickled: bytes) -> tuple[set[int], set[int]]:
    """Where the tuples ``("module", ...)`` begin, and where the persistent ids of them are."""
    inserted, replaced = set(), set()
    marks: list[int] = []
    memo: dict[int, str] = {}
    first: dict[int, str] = {}  # of each tuple that begins with a string
    text, tuple_at, expecting = "", -1, -1
    for op, arg, at in pickletools.genops(pickled):
        position, number = int(at or 0), arg if isinstance(arg, int) else -1
        if op.name == "MARK":
            marks.append(position)
            expecting = position
            continue
        string = str(arg) if "UNICODE" in op.name else memo.get(number, "") if op.name.endswith("BINGET") else ""
        if expecting >= 0 and string:
            first[expecting] = string
        expecting = -1
        if op.name.endswith("BINPUT"):
            memo[number] = text
            continue
        text = string
        if pickletools.markobject in op.stack_before and marks:
            tuple_at = marks.pop()
        elif op.name == "BINPERSID" and first.get(tuple_at) == "module":
            inserted.add(tuple_at)
            replaced.add(position)
    return inserted, replaced
