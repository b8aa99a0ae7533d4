"""Arrays of samples cut into runs that fit the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.ir import Array, Value, dims

_MEMORY = 1 << 28  # bytes that all values of one run may take
_SAMPLES = 32  # of a run, at most


@dataclass(frozen=True)
class Run:
    """Arrays by input name, views of what was given, and the dtypes that the model wants. `samples` counts rows."""

    arrays: Mapping[str, Array] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)
    samples: int

    def feeds(self) -> dict[str, Array]:
        """The arrays as the model takes them."""
        return {name: np.ascontiguousarray(array, self.dtypes[name]) for name, array in self.arrays.items()}


def cut(given: Mapping[str, Array], model: ImportedModel, where: str, at_least: int = 1) -> tuple[list[Run], list[str]]:
    """Arrays by input name as runs, `at_least` so many if there are as many samples, and notes on what is left out.

    Of a dynamic batch a run has as many samples as fit into memory with all values of the model. Of a fixed batch
    every run is one, and what has the size of one batch alone is the same in all. TNCompileError where an array does
    not fit its input; `where` says whose they are.
    """
    inputs = {v.name: v for v in model.program.inputs}
    given = _with_batch(given, inputs)
    for name, array in given.items():
        _check(array, inputs[name], where)
    places = {name: _place(value) for name, value in inputs.items()}
    dynamic = {name: place for name, place in places.items() if place is not None}
    dtypes = {name: value.dtype for name, value in inputs.items()}
    if dynamic:
        total = _total({n: given[n].shape[axis] // rows for n, (axis, rows) in dynamic.items()}, where)
        size = max(1, min(_SAMPLES, _MEMORY // _bytes(model, given, inputs), -(-total // at_least)))
        spans = [(k, min(k + size, total)) for k in range(0, total, size)]
        return [Run(_part(given, dynamic, *span), dtypes, span[1] - span[0]) for span in spans], []
    batches = {n: int((inputs[n].shape or (1,))[0]) for n in given}
    counts = {n: a.shape[0] // batches[n] if a.ndim else 1 for n, a in given.items()}
    total = _total({n: c for n, c in counts.items() if c != 1} or counts, where)
    if not total:
        raise TNCompileError(f"{where} has too few samples: the model has a fixed batch of {max(batches.values())}")
    fixed = {n: (0, batches[n]) for n, count in counts.items() if count > 1}
    left = [n for n, (_, batch) in fixed.items() if given[n].shape[0] % batch]
    notes = [f"the model has a fixed batch of {batches[n]}: samples of {n} that fill none are left out" for n in left]
    batch = max((rows for _, rows in fixed.values()), default=max(batches.values()))
    return [Run(_part(given, fixed, k, k + 1), dtypes, batch) for k in range(total)], notes


def _part(given: Mapping[str, Array], places: Mapping[str, tuple[int, int]], start: int, stop: int) -> dict[str, Array]:
    """The samples from `start` to `stop` where there are several, all of any other array."""
    parts = dict(given)
    for name, (axis, rows) in places.items():
        parts[name] = given[name][(slice(None),) * axis + (slice(start * rows, stop * rows),)]
    return parts


def _total(counts: Mapping[str, int], where: str) -> int:
    if len({*counts.values()}) > 1:
        shown = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise TNCompileError(f"{where} has different numbers of samples: {shown}")
    return next(iter(counts.values()))


def _place(value: Value) -> tuple[int, int] | None:
    """The axis of an input that holds samples, and how many rows of it each takes; None for a fixed batch."""
    shown = [(axis, dims.shows(dim, "batch")) for axis, dim in enumerate(value.shape or ())]
    return next(((axis, rows) for axis, rows in shown if rows), None)


def _with_batch(given: Mapping[str, Array], inputs: Mapping[str, Value]) -> dict[str, Array]:
    """A single sample without an axis for the batch gets one."""
    if all(array.ndim == len(inputs[name].shape or ()) - 1 for name, array in given.items()):
        return {name: np.expand_dims(array, (_place(inputs[name]) or (0, 1))[0]) for name, array in given.items()}
    return dict(given)


def _check(array: Array, value: Value, where: str) -> None:
    """Raise TNCompileError where an array does not fit an input, but for the number of samples."""
    shape, (sampled, _) = value.shape or (), _place(value) or (0, 1)
    fits = array.ndim == len(shape) and all(
        size == dim or axis == sampled or not isinstance(dim, int)
        for axis, (size, dim) in enumerate(zip(array.shape, shape, strict=True))
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise TNCompileError(f"{where}: {value.name} has shape {list(array.shape)}; the input's is [{wanted}]")
    kind = np.dtype(value.dtype).kind
    if array.dtype.kind not in ("iu" if kind in "iu" else kind):
        raise TNCompileError(
            f"{where}: {value.name} is {array.dtype}; the input is {value.dtype}: prepare it as for the model"
        )
    if 0 in array.shape:
        raise TNCompileError(f"{where}: {value.name} has no samples")


def _bytes(model: ImportedModel, given: Mapping[str, Array], inputs: Mapping[str, Value]) -> int:
    """Bytes of all values of the program for one sample; what has a size that is not known counts nothing."""
    sizes = dict(model.sizes)
    for name, value in inputs.items():
        sizes |= {d: n for n, d in zip(given[name].shape, value.shape or (), strict=True) if isinstance(d, str)}
    sizes["batch"] = 1
    total = 1
    for value in model.program.values.values():
        try:
            shape = [dims.evaluate(d, sizes) for d in value.shape or ()]
        except (KeyError, SyntaxError):
            continue
        if value.dtype not in ("tuple", "scalar", "object"):
            total += int(np.prod(shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize
    return total
