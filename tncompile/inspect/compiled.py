"""The program that a compiled file carries in its metadata."""

from __future__ import annotations

import os

from tncompile.errors import LoadError
from tncompile.ir import Program
from tncompile.ir import text as ir_text

KEY = "tncompile.program"


def program_of(path: str | os.PathLike[str]) -> Program | None:
    """Read the program of an ONNX file that tncompile wrote; its cores have shapes but no numbers.

    None for another ONNX file, LoadError for a damaged one.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base
        raise LoadError(f"{path}: not a readable ONNX file ({error})") from error
    text = {p.key: p.value for p in model.metadata_props}.get(KEY)
    return None if text is None else ir_text.parse(text)
