"""A dense model made smaller and faster within a budget: from Python and from files."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tncompile.compiler import Progress, naming
from tncompile.errors import OutputError, TNCompileError, UnsupportedError
from tncompile.frontend.load import LoadOptions, load
from tncompile.frontend.model import LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.trace import trace
from tncompile.runtime.files import check_writable, write_file
from tncompile.runtime.quantize import BITS
from tncompile.tensorizer.budget import FORMATS, Budget, kind_of
from tncompile.tensorizer.run import NO_HEALING, Healing, Search, Won
from tncompile.training import to_torch


class Tensorized(Won):
    """What won: the file `onnx`, the `model` it was compiled from (with cores in it, if any; in float32, whatever the
    `bits` of the file), and the `report`. `temporary` are files that healing left."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ONNX file (``.onnx``) or the model with its cores as an exported program (``.pt``, ``.pt2``).

        Whole or not at all; OutputError where that cannot be done.
        """
        check_writable(path)
        if kind_of(path) == "onnx":
            write_file(path, self.onnx)
            return
        if isinstance(self.model, OnnxModel):
            raise OutputError(f"{os.fspath(path)}: the model came in as ONNX, and so it can only be written as .onnx")
        if {*self.bits} - {"fp32"}:
            raise OutputError(
                f"{os.fspath(path)}: what won is kept in {', '.join(self.bits)}, and a model to train is in float32: "
                'search with bits=("fp32",)'
            )
        buffer = io.BytesIO()
        torch.export.save(self.model, buffer)
        write_file(path, buffer.getvalue())

    def to_torch(self, **options: Any) -> torch.nn.Module:
        """The model with its cores as parameters in float32, to be trained; options as in `tncompile.to_torch`."""
        return to_torch(self.model, **options)

    def discard(self) -> None:
        """Remove what healing left to resume from."""
        for path in self.temporary:
            path.unlink(missing_ok=True)


def tensorize(
    module: torch.nn.Module,
    calibration: Any = None,
    *,
    example_inputs: Any = None,
    max_error: float | None = None,
    metric: Any = None,
    max_drop: float | None = None,
    max_size: float | None = None,
    min_speedup: float | None = None,
    prefer: Any = "both",
    dynamic_shapes: Any = "batch",
    **options: Any,
) -> Tensorized:
    """Make a module smaller and faster within a budget (see `Budget`); call ``.eval()`` first.

    `calibration`: inputs of the kind the model will see: a tensor or array (first axis: samples), a tuple of them or a
    dict by input name, or an iterable of such batches, as a DataLoader without labels is one. The module is traced on
    `example_inputs`, by default on the first of these. Further `options` as in `tensorize_model`.
    """
    budget = Budget(max_error, metric, max_drop, max_size, min_speedup, prefer)
    if example_inputs is None:
        if calibration is None or isinstance(calibration, (str, os.PathLike)):
            raise TNCompileError("give example_inputs to trace the module on, or calibration data as tensors")
        example_inputs, calibration = _first(calibration)
    exported = trace(module, *_arguments(example_inputs), dynamic_shapes)
    return tensorize_model(exported, calibration, budget, model=type(module).__name__, **options)


def tensorize_file(
    path: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None,
    budget: Budget,
    loading: LoadOptions | None = None,
    **options: Any,
) -> Tensorized:
    """Make the model in a file smaller and faster; options as in `tensorize_model`."""
    loaded = load(path, loading)
    with naming(path):
        return tensorize_model(loaded, calibration, budget, model=str(path), **options)


def tensorize_model(
    loaded: LoadedModel,
    calibration: Any,
    budget: Budget,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    bits: Sequence[str] = BITS,
    healing: Healing = NO_HEALING,
    threads: int = 0,
    model: str = "",
    progress: Progress = lambda message: None,
    **compiling: Any,
) -> Tensorized:
    """Make a model smaller and faster within a budget.

    `calibration`: data as in `tensorize`, the path of a file or folder of it, or None. `formats` and `bits` are what
    weights may become; ``("fp32",)`` gives a model to train further. `threads` are those that it will run in, 0 for
    one a core. Which plan is chosen rests on times taken here, so two searches may differ. Further options as in
    `compile_exported`. Raises TNCompileError where nothing is within the budget.
    """
    unknown = [name for name in (*formats, *bits) if name not in (*FORMATS, *BITS)]
    if unknown or isinstance(formats, str) or isinstance(bits, str) or not bits:
        wrong = ", ".join(unknown) or f"{formats} and {bits}"
        raise TNCompileError(f"formats are some of {', '.join(FORMATS)}, bits some of {', '.join(BITS)}; not {wrong}")
    if isinstance(loaded, OnnxModel) and healing.seconds:
        raise UnsupportedError("a model that came in as ONNX cannot be trained, and so not be healed")
    if calibration is None and healing.seconds:
        raise TNCompileError("healing needs calibration data (--calibrate)")
    won = Search(loaded, calibration, budget, formats, bits, healing, threads, model, progress, compiling).run()
    return Tensorized(**vars(won))


def _first(data: Any) -> tuple[Any, Any]:
    """The first two samples of some calibration data, to trace a module on, and all of it."""
    if not isinstance(data, (torch.Tensor, tuple, Mapping)) and not hasattr(data, "__array__"):
        rest = iter(data)
        try:
            first = next(rest)
        except StopIteration:
            raise TNCompileError("there are no calibration data") from None
        data = itertools.chain([first], rest)
    else:
        first = data
    if isinstance(first, Mapping):
        return {name: value[:2] for name, value in first.items()}, data
    return tuple(value[:2] for value in (first if isinstance(first, (tuple, list)) else (first,))), data


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        if isinstance(example, Mapping):
            return (), {name: torch.as_tensor(value) for name, value in example.items()}
        return tuple(torch.as_tensor(v) for v in (example if isinstance(example, (tuple, list)) else (example,))), {}
    except (TypeError, RuntimeError, ValueError) as error:
        raise TNCompileError(f"example inputs are tensors, a tuple or a dict of them: {error}") from error
