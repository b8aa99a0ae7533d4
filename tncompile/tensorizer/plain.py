"""What a model is without tensor formats: the dense file and what torch's exporter writes, in fewer bits throughout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tncompile.emit.file import adopt
from tncompile.errors import TNCompileError, first_line
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.runtime import rivals
from tncompile.runtime.probe import Limits, probe
from tncompile.runtime.quantize import whole
from tncompile.runtime.settle import write_rival
from tncompile.tensorizer.options import Rounding, Statistics
from tncompile.tensorizer.prepare import Prepared

EXPORT = 120.0
"""Seconds that torch's exporter may take."""

EIGHT = ("int8", "int8-static")
"""What the exporter's file is tried in: in all else it is like ours."""


def in_fewer_bits(
    made: Prepared, dense: bytes, ways: Sequence[str], suffix: str, progress: Callable[[str], None]
) -> tuple[dict[str, bytes], list[str]]:
    """A dense file in each of some bits throughout, by name, and notes on what cannot be."""
    found: dict[str, bytes] = {}
    notes = []
    for bits in ways:
        if bits == "fp32" or (bits == "int8-static" and made.data is None):
            continue
        progress(f"quantizing the dense model to {bits}{suffix}")
        try:
            found[f"{bits}{suffix}"] = whole(dense, bits, made.train)
        except TNCompileError as error:
            notes.append(f"{bits} throughout{suffix}: {error}")
    return found, notes


def exported(
    made: Prepared, bits: Sequence[str], progress: Callable[[str], None]
) -> tuple[dict[str, bytes], list[str]]:
    """What torch's exporter makes of the dense model, or the ONNX file as it came in, and that in eight bits."""
    suffix = ", as it came" if isinstance(made.traced, OnnxModel) else ", exported by torch"
    progress(f"fp32{suffix}")
    try:
        plain = _exported(made.traced, made)
    except Exception as error:  # an exporter raises whatever it likes
        return {}, [f"fp32{suffix}: {type(error).__name__}: {first_line(error)[:100]}"]
    found, notes = in_fewer_bits(made, plain, [b for b in EIGHT if b in bits], suffix, progress)
    return {f"fp32{suffix}": plain, **found}, notes


def _exported(traced: ImportedModel, made: Prepared) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with rivals.time_limit(EXPORT):
            write_rival(traced, path)
        tried = probe(path, max(made.feeds.items())[1], Limits())
        if tried.ms is None:
            raise TNCompileError(tried.note)
        return adopt(path.read_bytes(), traced).data


def weight_error(made: Prepared, bits: str) -> float:
    """The relative error of all weights in some bits, where there is nothing to measure errors on."""
    local = (made.sensitivity[s.name] * Rounding(s, None, [Statistics()]).error(bits) for s in made.sites)
    return math.sqrt(math.fsum(error**2 for error in local))
