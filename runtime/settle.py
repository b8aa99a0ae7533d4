"""The last word of `--tune`: the compiled model against torch's own export of the same model, and in micro-batches
against whole batches, as whole models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array
from tncompile.runtime import rivals
from tncompile.runtime.device import providers
from tncompile.runtime.inputs import random_inputs
from tncompile.runtime.probe import Limits, probe
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race

MARGIN = 1.03
"""How many times faster the exporter's file must be at its best batch size to be taken: less is noise."""

_LIMITS = Limits(first_call_s=20.0, build_s=180.0)


@dataclass(frozen=True)
class Settled:
    """Milliseconds of the compiled model and of the exporter's at each batch size, or why the exporter has none.

    For a model that came in as ONNX the `rival` is the original file. `exported` are the bytes of the rival's file
    where that is the faster one.
    """

    batches: tuple[int, ...]
    ours: tuple[float, ...]
    exporter: tuple[float, ...]
    note: str = ""
    exported: bytes | None = None
    rival: str = "torch.onnx.export"

    def __str__(self) -> str:
        if self.note:
            return f"{self.rival}: {self.note}"
        times = zip(self.batches, self.ours, self.exporter, strict=True)
        taken = "; its file is the one that was written" if self.exported is not None else ""
        return f"measured against {self.rival}: {_each(times)}{taken}"


def _each(times: Iterable[tuple[int, float, float]]) -> str:
    return ", ".join(f"{ours:.3g} ms for {other:.3g} at batch {batch}" for batch, ours, other in times)


def write_rival(traced: ImportedModel, path: Path) -> None:
    """Write what there is without tncompile: torch's export, or the original file. Whatever the exporter raises."""
    if isinstance(traced, OnnxModel):
        traced.save(path)
    else:
        rivals.export_plain(traced.exported, path)


def settle(
    ours: bytes | Path,
    traced: ImportedModel,
    batches: Sequence[int],
    seconds: float,
    device: str = "cpu",
    threads: int = 0,
) -> Settled:
    """Race the two files at each batch size, for so many seconds in all, on so many threads (0: one a core)."""
    rival = "the original file" if isinstance(traced, OnnxModel) else "torch.onnx.export"
    sizes = tuple(batches) if "batch" in traced.sizes else (traced.sizes.get("batch", 1),)
    feeds = _feeds(traced, sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "exporter.onnx")
        try:
            with rivals.time_limit(_LIMITS.build_s):
                write_rival(traced, path)
        except Exception as error:  # an exporter raises whatever it likes
            return Settled((), (), (), f"fails ({type(error).__name__})", rival=rival)
        for size, arrays in zip(sizes, feeds, strict=True):
            tried = probe(path, arrays, _LIMITS, device=device)
            if tried.ms is None:
                return Settled((), (), (), f"{tried.note} at batch {size}", rival=rival)
        times = _raced((ours, path), feeds, seconds, device, threads)
        first, second = zip(*times, strict=True)
        # taken only where it wins at some batch size and loses at none
        gain = max(a / b for a, b in times)
        loss = max(b / a for a, b in times)
        taken = path.read_bytes() if gain > MARGIN >= loss else None
        return Settled(sizes, first, second, exported=taken, rival=rival)


def whole_is_faster(
    whole: bytes | Path,
    parts: bytes | Path,
    traced: ImportedModel,
    batches: Sequence[int],
    seconds: float,
    threads: int = 0,
) -> bool:
    """Whether a model that computes whole batches is faster than the same in micro-batches at some of these sizes."""
    times = _raced((whole, parts), _feeds(traced, batches), seconds, "cpu", threads)
    return any(MARGIN * mine < others for mine, others in times)


def _feeds(traced: ImportedModel, sizes: Sequence[int]) -> list[dict[str, Array]]:
    generator = np.random.default_rng(0)
    return [random_inputs(traced, {**traced.sizes, "batch": size}, generator) for size in sizes]


def _raced(
    files: tuple[bytes | Path, bytes | Path],
    feeds: Sequence[Mapping[str, Array]],
    seconds: float,
    device: str,
    threads: int,
) -> list[tuple[float, float]]:
    """Milliseconds of two files on each of some inputs, in turns."""
    first, second = (Session(file, providers(device), threads=threads) for file in files)
    times = []
    for arrays in feeds:
        calls = {"first": first.bound(first.feeds(arrays)), "second": second.bound(second.feeds(arrays))}
        raced = race(calls, budget_s=seconds / len(feeds))
        times.append((raced.median("first"), raced.median("second")))
    return times
