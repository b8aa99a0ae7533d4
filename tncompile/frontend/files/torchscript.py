"""TorchScript archives: checked before torch reads them, then made an ordinary module."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch

from tncompile.errors import LoadError
from tncompile.frontend.files.archive import open_archive, parts
from tncompile.frontend.files.detect import globals_of

#: the parts that torch.jit.load reads; compiled code for phones and lists of lines stay behind
_PARTS = re.compile(r"(data|constants)\.pkl|(data|constants)/\d+|code/[\w./]+\.py|version|byteorder|\.data/\w+")
_LEFT = re.compile(
    r"extra/.*|.*\.debug_pkl|bytecode\.pkl|bytecode/.*|(mobile_)?debug.*|traced_inputs(\.pkl|/\d+)"
    r"|\.format_version|\.storage_alignment|attributes\.pkl|.*/"
)
#: torch's own operators on files; the word alone is enough, so that no way to write a call escapes
_TOUCHES_FILES = re.compile(rb"\b(save|from_file)\b")
#: what makes an expression one level deeper; not the sign of a number in a list
_OPERATORS = re.compile(rb"(?<![\[(,])(?<![\[(,] )[-+*/~%@]|\b(?:not|and|or|if)\b|\.(?=[A-Za-z_])")
_BRACKETS = re.compile(rb"[\[({})\]]")
_DEEPEST = 200  # levels, as in Python's own parser
_SAFER = "export the module that it was made from: tncompile.save(module, example_inputs, path)"


def load_script(path: Path, trust: bool) -> torch.jit.ScriptModule:
    """The module in evaluation mode. LoadError where it is damaged or, unless trusted, where loading it runs code."""
    try:
        source = str(path) if trust else _checked_copy(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; files of it remain
            script: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                source, map_location="cpu"
            )
    except LoadError:
        raise
    except Exception as error:  # whatever a damaged archive makes torch's reader raise
        reason = " ".join(str(error).strip().split("\n")[-1].split()) or type(error).__name__
        raise LoadError(
            f"{path}: torch {torch.__version__} cannot read this TorchScript file ({reason[:200]}); {_SAFER}"
        ) from error
    if not script._c._has_method("forward"):
        raise LoadError(f"{path}: this TorchScript module has no forward; {_SAFER}")
    if hasattr(script, "training"):  # a frozen one has no such mode
        script.eval()
    return script


def _checked_copy(path: Path) -> io.BytesIO:
    """The archive, read once, checked, and written anew: torch then reads what was checked and nothing else.

    Reading a TorchScript file restores classes of C++ and calls the `__setstate__` of its own; neither may be in it.
    Its `forward` is run by `tncompile.frontend.script`, operator by operator, before torch's interpreter runs it.
    """

    def refusal(name: str) -> LoadError:
        return LoadError(f"{path}: a TorchScript file with a part that it should not have ({name}); {_SAFER}")

    copy = io.BytesIO()
    with open_archive(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        for name, part in parts(archive, _PARTS, refusal, left_out=_LEFT):
            data = archive.read(name)  # checks the checksum
            if part.endswith(".py") and _too_deep(data):
                raise LoadError(f"{path}: damaged, or made to crash its reader: {name} is nested too deeply; {_SAFER}")
            reason = _harmful(part, data)
            if reason:
                raise LoadError(
                    f"{path}: a TorchScript file that {reason} when it is read, so it is refused; add --trust-pickle "
                    f"if you trust where it comes from, or {_SAFER}"
                )
            checked.writestr(name, data)
    copy.seek(0)
    return copy


def _too_deep(source: bytes) -> bool:
    """Whether torch's parser, which calls itself at every level, could run out of stack."""
    depth = 0
    for bracket in _BRACKETS.findall(source):
        depth += 1 if bracket in b"([{" else -1
        if depth > _DEEPEST:
            return True
    return any(
        len(line) - len(line.lstrip()) > 4 * _DEEPEST or sum(1 for _ in _OPERATORS.finditer(line)) > 5 * _DEEPEST
        for line in source.splitlines()
    )


def _harmful(part: str, data: bytes) -> str:
    """What reading this part of an archive would run; "" for nothing."""
    if part.endswith(".py"):
        if b"__setstate__" in data:
            return "runs code of its own (__setstate__)"
        found = _TOUCHES_FILES.search(data)
        return f"may read or write files (torch.{found[0].decode()})" if found else ""
    if part.endswith(".pkl"):
        for name in globals_of(data):
            if not name.startswith(
                ("__torch__.", "torch.jit._pickle.", "torch._utils.", "torch.", "collections.OrderedDict")
            ):
                return f"makes {name}"
            if "torch.classes" in name or name == "?":
                return f"makes a class of C++ ({name})"
    return ""
