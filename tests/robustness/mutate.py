"""Damage to files: blind, in their bytes, and knowing, in the parts that their format is made of."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

MARK = "it-ran"
"""The file that code from a mutant makes, in the directory it runs in."""

_COMMAND = f"touch {MARK}"
_OPEN = f"open('{MARK}','w')"
_BOMBS = (
    b"cos\nsystem\n(X" + struct.pack("<I", len(_COMMAND)) + _COMMAND.encode() + b"tR",
    b"(X" + struct.pack("<I", len(_COMMAND)) + _COMMAND.encode() + b"ios\nsystem\n",
    b"\x8c\x08builtins\x8c\x04eval\x93(\x8c"
    + bytes([len(f"open('{MARK}','w')")])
    + f"open('{MARK}','w')".encode()
    + b"tR",
)
_CODE = f"__import__('pathlib').Path('{MARK}').touch()"
_PATHS = ("../../../etc/passwd", "/etc/passwd", ".", "..", "", "a/../../b", "C:\\x", "nul\0l", "x" * 300, "data.pkl/")
_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64, 10**30, 1e308, -0.5, 255)
_BOMB_SIZE = 1 << 29
_LARGEST = 1 << 25


def mutant(random: Random, data: bytes, format: str, others: list[bytes]) -> bytes:
    """One damaged copy; `others` are whole files to splice with."""
    known: dict[str, Callable[[Random, bytes], bytes]] = {
        "zip": archive,
        "pickle": pickled,
        "json": text,
        "protobuf": message,
        "safetensors": header,
    }
    if format in known and random.random() < 0.65:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            try:
                changed = known[format](random, data)
            except (
                ValueError,
                EOFError,
                zipfile.BadZipFile,
                NotImplementedError,
                RecursionError,
                OSError,
                RuntimeError,
            ):
                break  # the damage before left no such structure
            if len(changed) > _LARGEST:  # a bomb that was unpacked is an honest large file
                break
            data = changed
        return data
    return spliced(random, data, others) if random.random() < 0.2 else blind(random, data)


# ---------------------------------------------------------------------------------------- bytes


def blind(random: Random, data: bytes) -> bytes:
    """Cut off, flipped, overwritten, doubled or left out, wherever."""
    kind = random.choice(("cut", "cut", "flip", "flip", "run", "leave", "double", "insert"))
    size = len(data)
    at = random.randrange(size + 1) if random.random() < 0.7 else min(size, random.randrange(64))
    end = min(size, at + random.choice((1, 4, 16, 256, size)))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 8, 64))):
            if size:
                changed[random.randrange(size)] ^= 1 << random.randrange(8)
        return bytes(changed)
    if kind == "run":
        filled = random.choice((b"\0", b"\xff", random.randbytes(1))) * (end - at)
        return data[:at] + (filled if random.random() < 0.5 else random.randbytes(end - at)) + data[end:]
    if kind == "leave":
        return data[:at] + data[end:]
    if kind == "double":
        return data[:end] + data[at:]
    return data[:at] + random.randbytes(random.choice((1, 8, 100))) + data[at:]


def spliced(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """The beginning of one file and the end of another, or one inside the other."""
    other = random.choice(others)
    a, b = random.randrange(len(data) + 1), random.randrange(len(other) + 1)
    return random.choice((data[:a] + other[b:], other[:b] + data[a:], data + other, data[:a] + other + data[a:]))


# ------------------------------------------------------------------------------------- archives


def archive(random: Random, data: bytes) -> bytes:
    """Parts changed under a right checksum, twice, renamed, missing, or larger than they are."""
    kind = random.choice(("part",) * 8 + ("rename", "double", "drop", "bomb", "size", "pack", "many", "flags"))
    if kind in ("size", "flags"):
        return _directory(random, data, kind)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        parts = [(name, file.read(name)) for name in file.namelist()]
    if not parts:
        return data
    at = random.randrange(len(parts))
    name, content = parts[at]
    packing = zipfile.ZIP_STORED
    if kind == "part":
        parts[at] = (name, _part(random, name, content))
    elif kind == "rename":
        folder = name.rpartition("/")[0]
        new = random.choice(
            (*_PATHS, *(f"{folder}/{p}" for p in _PATHS), name.upper(), random.choice(parts)[0], f"{name}x")
        )
        parts[at] = (new.replace("\0", "") or "x", content)
    elif kind == "double":
        parts.insert(
            random.randrange(len(parts) + 1), (random.choice((name, name.upper())), _part(random, name, content))
        )
    elif kind == "drop":
        del parts[at]
    elif kind == "bomb":
        return _bomb(parts, at)
    elif kind == "pack":
        packing = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        parts += [(f"{name.partition('/')[0]}/{random.choice(('data', 'x', 'code'))}/{k}", b"") for k in range(5000)]
    return _zipped(parts, packing)


def _bomb(parts: list[tuple[str, bytes]], at: int) -> bytes:
    """An archive of which one part is 512 MiB of zeros, under a right checksum."""
    packed, checksum = zeros()
    changed = bytearray(_zipped([*parts[:at], (parts[at][0], packed), *parts[at + 1 :]], zipfile.ZIP_STORED))
    with zipfile.ZipFile(io.BytesIO(changed)) as file:
        local = file.infolist()[at].header_offset
    central = -1
    for _ in range(at + 1):
        central = changed.index(b"PK\1\2", central + 1 if central >= 0 else local)
    for method, start in ((8, local), (10, central)):
        struct.pack_into("<H", changed, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<III", changed, start + method + 6, checksum, len(packed), _BOMB_SIZE)
    return bytes(changed)


@functools.cache
def zeros() -> tuple[bytes, int]:
    """512 MiB of zeros as raw deflate, and its checksum."""
    packer, checksum, packed = zlib.compressobj(1, wbits=-15), 0, []
    for _ in range(_BOMB_SIZE >> 24):
        packed.append(packer.compress(bytes(1 << 24)))
        checksum = zlib.crc32(bytes(1 << 24), checksum)
    return b"".join([*packed, packer.flush()]), checksum


def _zipped(parts: list[tuple[str, bytes]], packing: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", packing) as file:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in parts:
            file.writestr(name, content)
    return buffer.getvalue()


def _part(random: Random, name: str, content: bytes) -> bytes:
    chosen = random.random()
    if name.endswith(".json") and chosen < 0.9:
        return text(random, content)
    if name.endswith(".pkl") and chosen < 0.9:
        return pickled(random, content)
    if name.endswith(".py") and chosen < 0.9:
        return _script(random, content)
    return blind(random, content)


def _script(random: Random, content: bytes) -> bytes:
    """The text of a TorchScript class with lines exchanged, doubled, or with a word in the place of another."""
    lines = content.decode("utf-8", "replace").splitlines(keepends=True)
    at = random.randrange(len(lines))
    kind = random.choice(("word", "word", "line", "drop", "double", "save", "deep", "number"))
    if kind == "word":
        words = [w for line in lines for w in line.split()]
        lines[at] = lines[at].replace(random.choice(lines[at].split() or [""]) or "\n", random.choice(words), 1)
    elif kind == "line":
        lines[at], lines[0] = lines[0], lines[at]
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "save":
        lines.insert(at, f"    torch.save(input, '{MARK}')\n")
    elif kind == "deep":
        lines[at] = lines[at].replace("input", "(" * 20000 + "input" + ")" * 20000)
    else:
        lines[at] = "".join(str(random.choice(_NUMBERS)) if c.isdigit() else c for c in lines[at])
    return "".join(lines).encode()


def _directory(random: Random, data: bytes, kind: str) -> bytes:
    """A field of one entry of the central directory changed: what it says of sizes, places, flags or packing."""
    entries = [i for i in range(len(data)) if data.startswith(b"PK\1\2", i)]
    if not entries:
        return data
    changed = bytearray(data)
    at = random.choice(entries)
    if kind == "flags":
        offset, code = random.choice(((8, "<H"), (10, "<H"), (28, "<H"), (30, "<H"), (6, "<H")))
        value = random.choice((1, 8, 9, 12, 14, 99, 0x0800, 0xFFFF))
    else:
        offset, code = random.choice(((16, "<I"), (20, "<I"), (24, "<I"), (42, "<I")))
        value = random.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 1 << 30, len(data), random.randrange(len(data))))
    struct.pack_into(code, changed, at + offset, value)
    if random.random() < 0.5 and offset in (20, 24):  # both sizes
        struct.pack_into("<II", changed, at + 20, value, value)
    return bytes(changed)


# -------------------------------------------------------------------------------------- pickles


def pickled(random: Random, data: bytes) -> bytes:
    """Pickles, one after the other, with an instruction left out, doubled, moved, changed, or a call put in."""
    ends: list[int] = []
    file = io.BytesIO(data)
    try:
        while file.tell() < len(data):
            ops = [(op, arg, pos) for op, arg, pos in pickletools.genops(file)]
            ends += [int(pos or 0) for _, _, pos in ops] + [file.tell()]
    except ValueError:  # the tensors' bytes behind the pickles of an old file
        pass
    if len(ends) < 3:
        return blind(random, data)
    at = random.randrange(len(ends) - 1)
    start, end = ends[at], ends[at + 1]
    kind = random.choice(("drop", "double", "swap", "bomb", "number", "number", "string", "deep", "memo", "stop"))
    op = data[start:end]
    if kind == "drop":
        op = b""
    elif kind == "double":
        op += op
    elif kind == "swap":
        other = random.randrange(len(ends) - 1)
        op = data[ends[other] : ends[other + 1]]
    elif kind == "bomb":
        op = random.choice(_BOMBS) + random.choice((b"", b"0")) + op
    elif kind == "deep":
        op = random.choice((b"]" * 50000 + b"a" * 49999, b"(" * 50000 + b"t" * 50000, b")" + b"\x85" * 50000)) + op
    elif kind == "memo":
        op = b"h" + random.randbytes(1) + op
    elif kind == "stop":
        op = b"." + op
    elif kind == "number":
        numbers = [k for k in range(len(ends) - 1) if data[ends[k] : ends[k] + 1] in (b"K", b"M", b"J", b"\x8a", b"G")]
        if numbers:
            at = random.choice(numbers)
            start, end = ends[at], ends[at + 1]
            op = pickle.dumps(random.choice(_NUMBERS), 2)[2:-1]
    else:
        strings = [k for k in range(len(ends) - 1) if data[ends[k] : ends[k] + 1] in (b"X", b"c", b"\x8c")]
        if strings:
            at, other = random.choice(strings), random.choice(strings)
            start, end = ends[at], ends[at + 1]
            op = data[ends[other] : ends[other + 1]]
    return data[:start] + op + data[end:]


# ----------------------------------------------------------------------------------------- JSON


def text(random: Random, data: bytes) -> bytes:
    """JSON with values exchanged for others, of any type, or left out."""
    content = json.loads(data)
    places = [*_places(content)]
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        if not places:
            break
        holder, key = random.choice(places)
        kind = random.choice(("value", "value", "number", "copy", "drop", "code", "deep", "add"))
        try:
            old = holder[key]
            if kind == "value":
                holder[key] = random.choice((None, True, "", "x", [], {}, [[]], 0, -1, 1.5, {"a": 1}, ["x"]))
            elif kind == "number":
                holder[key] = random.choice((*_NUMBERS, float("nan"), float("inf")))
            elif kind == "copy":
                other, name = random.choice(places)
                holder[key] = other[name]
            elif kind == "drop":
                del holder[key]
            elif kind == "code":
                holder[key] = random.choice(
                    (_CODE, f"open('{MARK}','w')", "torch.ops.aten.save", *_PATHS, "Pow(9,Pow(9,9))")
                )
            elif kind == "deep":
                for _ in range(random.choice((5, 900, 900))):
                    old = [old]
                holder[key] = old
            elif isinstance(old, list):
                old.append(random.choice((None, *old)))
            elif isinstance(old, dict):
                old[random.choice(("x", "", "as_int", "as_expr"))] = random.choice((None, *old.values()))
        except (KeyError, IndexError):
            continue  # it went with what was changed before
    try:
        return json.dumps(content).encode()
    except (ValueError, RecursionError):  # a copy that contains itself
        return b'{"a":' * 100_000


def _places(node: Any) -> Any:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield node, key
        yield from _places(value)


# ---------------------------------------------------------------------------------- safetensors


def header(random: Random, data: bytes) -> bytes:
    """A safetensors file whose header is other JSON, or says another length."""
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.2:
        return (
            random.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
            + data[8:]
        )
    changed = text(random, data[8 : 8 + size])
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


# ------------------------------------------------------------------------------------- protobuf

Field = tuple[int, int, Any]  # number, wire type, and a number, bytes, or the fields of a message


def message(random: Random, data: bytes) -> bytes:
    """A protobuf message with one field changed, all lengths around it right."""
    fields = _fields(data)
    places: list[tuple[list[Field], int]] = []

    def walk(inside: list[Field]) -> None:
        for position, (_, _, value) in enumerate(inside):
            places.append((inside, position))
            if isinstance(value, list):
                walk(value)

    walk(fields)
    holder, at = random.choice(places)
    number, wire, value = holder[at]
    kind = random.choice(("value",) * 5 + ("copy", "drop", "double", "number", "deep", "move"))
    if kind == "value":
        if wire == 0:
            holder[at] = (
                number,
                wire,
                random.choice(_NUMBERS[:9]) & (2**64 - 1) if random.random() < 0.7 else value ^ 1,
            )
        elif isinstance(value, bytes) and value:
            new = random.choice((blind(random, value), b"", b"../../etc/passwd", random.choice(_strings(fields))))
            holder[at] = (number, wire, new if wire == 2 else blind_same(random, value))
        else:
            holder[at] = (number, wire, blind(random, _bytes(value)) if wire == 2 else value)
    elif kind == "copy":
        other, position = random.choice(places)
        holder[at] = (number, *other[position][1:])
    elif kind == "drop":
        del holder[at]
    elif kind == "double":
        holder.insert(at, holder[at])
    elif kind == "number":
        holder[at] = (random.randrange(1, 30), wire, value)
    elif kind == "move":
        other, position = random.choice(places)
        other.insert(min(position, len(other)), (number, wire, _bytes(value) if wire == 2 else value))
    else:
        nested = _bytes(value) if wire == 2 else b""
        for _ in range(random.choice((50, 2000))):
            nested = _bytes([(number, 2, nested)])
        holder[at] = (number, 2, nested)
    return _bytes(fields)


def blind_same(random: Random, data: bytes) -> bytes:
    """Other bytes, as many."""
    return random.randbytes(len(data))


def _strings(fields: list[Field]) -> list[bytes]:
    found = [b"x"]
    for _, _, value in fields:
        if isinstance(value, list):
            found += _strings(value)
        elif isinstance(value, bytes):
            found.append(value)
    return found


def _fields(data: bytes, depth: int = 0) -> list[Field]:
    """The fields of a message; bytes that can be read as a message are taken for one. ValueError for others."""
    position, fields = 0, []
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, position = _varint(data, position)
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            value, position = data[position : position + width], position + width
        elif wire == 2:
            size, position = _varint(data, position)
            value, position = data[position : position + size], position + size
            if depth < 12 and len(value) > 1:
                with contextlib.suppress(ValueError):
                    value = _fields(value, depth + 1)
        else:
            raise ValueError("not protobuf")
        if number == 0 or position > len(data):
            raise ValueError("not protobuf")
        fields.append((number, wire, value))
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
    raise ValueError("not protobuf")


def _bytes(fields: list[Field] | bytes) -> bytes:
    if isinstance(fields, bytes):
        return fields
    result = bytearray()
    for number, wire, value in fields:
        result += _number(number << 3 | wire)
        if wire == 0:
            result += _number(value)
        elif wire == 2:
            content = _bytes(value)
            result += _number(len(content)) + content
        else:
            result += value
    return bytes(result)


def _number(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])
