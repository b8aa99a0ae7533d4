"""Open a model file: find out by its content what it is, and load it without running code from it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompile.errors import LoadError
from tncompile.frontend.mapped import PART, STAND_IN, MappedWeights

if TYPE_CHECKING:
    import torch

HOW_TO = "save it with torch.export.save(torch.export.export(model.eval(), example_inputs), path)"

# what the functions in a size expression may be called; anything else in its place could be code
_SIZE_FUNCTIONS = {"Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "Pow"}
_SIZE_FUNCTIONS |= {"Symbol", "Integer", "Rational", "Float", "Add", "Mul"}
_SIZE_FUNCTIONS |= {"Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not"}
_SIZE_FUNCTIONS |= {"ModularIndexing", "Where", "PowByNatural", "CeilToInt", "FloorToInt", "TruncToInt", "ToFloat"}


def load_exported(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Load a file written by `torch.export.save`, whatever its name.

    Raises LoadError, with the file's name and what to do, for anything else. No code from the file runs:
    pickled parts go through torch's restricted unpickler, and size expressions are checked before they are
    parsed.
    """
    path = Path(path)
    kind = detect(path)
    if kind != "exported program":
        raise LoadError(f"{path}: {_refusal(kind)}")
    import torch

    try:
        clean, weights = _checked_copy(path)
        with _quiet_and_safe():
            exported = torch.export.load(clean)
            weights.put_into(exported)
            return exported
    except LoadError:
        raise
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path}: truncated or corrupted ({error}); copy or export it again") from error
    except Exception as error:  # whatever a damaged archive makes torch's reader raise
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise LoadError(
            f"{path}: torch {torch.__version__} cannot read this exported program ({reason[:200]}); it is damaged, "
            f"or was saved by another version of torch: export it again"
        ) from error


def detect(path: Path) -> str:
    """What kind of file this is, from its content alone."""
    try:
        if path.is_dir():
            return "directory"
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0, os.SEEK_END)
            size = file.tell()
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        return "empty"
    if head.startswith(b"PK"):
        return _detect_zip(path)
    if head[0] == 0x80 and len(head) > 1 and head[1] in range(2, 6):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[0] == 0x08 and head[1] < 64 and b"\x12" in head[2:4] + head[4:]:
        return "ONNX"
    if head.startswith(b"\x89HDF"):
        return "HDF5"
    return "unknown"


def _detect_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            if any(n.startswith("models/") and n.endswith(".json") for n in names):
                return "exported program"
            if "serialized_exported_program.json" in [*names, *archive.namelist()]:
                return "old exported program"
            if "constants.pkl" in names or any(n.startswith("code/") for n in names):
                return "TorchScript"
            if "data.pkl" in names:
                with archive.open(next(n for n in archive.namelist() if n.endswith("data.pkl"))) as file:
                    return _detect_pickle(file.read(1 << 20))
            if any(n.endswith(".npy") for n in names):
                return "npz"
            return "zip"
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise LoadError(
            f"{path}: truncated or corrupted, its archive cannot be read ({error}); copy or export it again"
        ) from error
    except Exception as error:  # zlib errors of a damaged member
        raise LoadError(f"{path}: corrupted ({error}); copy or export it again") from error


def _detect_pickle(data: bytes) -> str:
    """A state_dict names only torch's own rebuilding functions; a pickled module names classes."""
    import pickletools

    try:
        named = [str(arg) for op, arg, _ in pickletools.genops(data) if op.name in ("GLOBAL", "STACK_GLOBAL")]
    except Exception:  # not a whole pickle: no more is to be known
        return "pickle"
    plain = ("torch._utils", "torch ", "collections", "torch.storage", "torch.serialization")
    return "state_dict" if all(n.startswith(plain) for n in named) else "pickle"


def _refusal(kind: str) -> str:
    """What the file is, and what to do instead."""
    return {
        "directory": "is a directory; give the model file itself",
        "empty": "the file is empty; export it again",
        "old exported program": "an exported program of an old version of torch; export it again with torch >= 2.9",
        "TorchScript": f"a TorchScript file; from the original module, {HOW_TO}",
        "state_dict": f"a state_dict, weights without a model; load it into its module, then {HOW_TO}",
        "pickle": f"a pickled Python object, which could run code when opened and is refused; load it where you "
        f"trust it, then {HOW_TO}",
        "safetensors": f"a safetensors file, weights without a model; load it into its module, then {HOW_TO}",
        "ONNX": f"already an ONNX model; from the PyTorch module it came from, {HOW_TO}",
        "npz": f"numpy arrays, not a model; {HOW_TO}",
        "HDF5": f"an HDF5 file; {HOW_TO}",
    }.get(kind, f"not a model that tncompile can read; {HOW_TO}")


# the parts of an exported program that hold no code; compiled or pickled parts are not among them
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
)
# what a node of the graph may call: operators, arithmetic of sizes, and no reading of files
_TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order)\.(?!from_file)\w+(\.\w+)?"
    r"|(_operator|operator|math|builtins)\.\w+|torch\.(_?sym_\w+|_check\w*)|\w+"
)


def _checked_copy(path: Path) -> tuple[io.BytesIO, MappedWeights]:
    """The archive, read once, checked, and written anew: torch then reads what was checked and nothing else.

    torch's own reader takes compiled libraries and pickled objects from further parts, and finds parts whatever
    the case of their names; so only known parts pass, each once. Weights are not copied: in their place stands one
    number each, until they are put into what torch has made of the rest.
    """
    copy, weights = io.BytesIO(), MappedWeights(path)
    seen: set[str] = set()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        names = archive.namelist()
        root = names[0].partition("/")[0] if names else ""
        for name in names:
            part = name.removeprefix(f"{root}/")
            if not _PARTS.fullmatch(part) or name == part or name.lower() in seen:
                raise LoadError(f"{path}: holds a part that could run code ({name}); export a model of tensors only")
            seen.add(name.lower())
            if PART.fullmatch(part):
                weights.add(part, archive, archive.getinfo(name))
                checked.writestr(name, STAND_IN)
                continue
            data = archive.read(name)  # checks the checksum
            if part.endswith(".json"):
                content = json.loads(data)
                _check_json(content, part, path)
                if part.endswith("_config.json"):
                    data = json.dumps(weights.stand_in(part, content)).encode()
            checked.writestr(name, data)
    copy.seek(0)
    return copy, weights


def _check_json(content: Any, part: str, path: Path) -> None:
    """Refuse pickled payloads, sizes that are not arithmetic, and calls of anything but operators."""
    if part.endswith("_config.json"):
        for payload in content.get("config", {}).values():
            if not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
                raise LoadError(
                    f"{path}: holds a pickled object ({payload.get('path_name')}), which could run code; "
                    "export a model of tensors only"
                )
    for key, value in _strings(content):
        if key == "expr_str" and not _is_arithmetic(value):
            raise LoadError(f"{path}: a size in it is not arithmetic ({value[:60]!r}); refused")
        if key == "target" and not _TARGETS.fullmatch(value):
            raise LoadError(f"{path}: calls {value[:60]!r}, which is not an operator of torch; refused")


def _strings(node: Any) -> Iterator[tuple[str, str]]:
    """Every size (``expr_str``) and every node's ``target`` in the JSON of an exported program."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr_str" or (key == "target" and "inputs" in node):
                yield key, str(value)
            yield from _strings(value)
    elif isinstance(node, list):
        for item in node:
            yield from _strings(item)


def _is_arithmetic(expression: str) -> bool:
    """Whether a size holds nothing but numbers, symbols and known functions: ``Mul(Integer(2), Symbol('s0'))``."""
    bare = re.sub(r"'\w+'", "", expression)
    if not re.fullmatch(r"[\w\s+\-*/(),.<>=]*", bare) or "__" in expression:
        return False
    # a dot only inside a number: no attribute can be reached
    attribute = re.search(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_]", bare)
    return attribute is None and {*re.findall(r"(\w+)\s*\(", bare)} <= _SIZE_FUNCTIONS


@contextlib.contextmanager
def _quiet_and_safe() -> Iterator[None]:
    """Make every torch.load inside use the restricted unpickler, and keep torch's reader from logging."""
    key, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[key] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
