"""What a compiled file carries in its metadata."""

from __future__ import annotations

import os

from tncompile.emit.file import BATCHES
from tncompile.errors import LoadError, ParseError
from tncompile.ir import Program
from tncompile.ir import text as ir_text

KEY = "tncompile.program"


def program_of(path: str | os.PathLike[str]) -> Program | None:
    """Read the program of an ONNX file that tncompile wrote; its cores have shapes but no numbers.

    None for another ONNX file, LoadError for a damaged one.
    """
    text = _metadata(path).get(KEY)
    if text is None:
        return None
    try:
        if not isinstance(text, str):  # protobuf gives the bytes of what is no UTF-8
            raise ParseError("it is not text")
        return ir_text.parse(text)
    except ParseError as error:
        raise LoadError(f"{path}: the program in its metadata is damaged ({error}); compile the model again") from error


def batches_of(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Batch sizes at which every way to compute of a compiled file runs once; none where it does not tell any.

    LoadError for a damaged file.
    """
    text = _metadata(path).get(BATCHES, "")
    words = text.split() if isinstance(text, str) else []
    return tuple(int(word) for word in words if word.isdecimal() and len(word) < 10)


def _metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    import onnx

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base
        raise LoadError(f"{path}: not a readable ONNX file ({error})") from error
    return {p.key: p.value for p in model.metadata_props}
