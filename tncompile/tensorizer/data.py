"""Calibration data: samples of a model's inputs, cut into runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.ir import Array, Value
from tncompile.tensorizer.arrays import read_arrays
from tncompile.tensorizer.cut import Run, cut

MOST = 1024
"""Samples that are used where there are more, unless the caller says otherwise."""

_FEW = 32  # samples
_RUNS = 10  # that a single array is cut into at least, if it has as many samples


@dataclass(frozen=True, eq=False)
class Calibration:
    """Runs of a model in a fixed order. `notes` say what of the data is not used, or is little."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (run.feeds() for run in self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(run.samples for run in self.runs)

    def split(self, every: int = 5) -> tuple[Calibration, Calibration]:
        """What is chosen by, and what is held out to evaluate the choice on: every so manieth run, at least one.

        Both are all there is where that is a single run; a note says so.
        """
        if len(self.runs) == 1:
            note = "too little calibration data to hold any out: errors are of the data that was chosen by"
            both = replace(self, notes=(*self.notes, note))
            return both, both
        every = min(every, len(self.runs))
        held = tuple(run for k, run in enumerate(self.runs) if k % every == every - 1)
        rest = tuple(run for k, run in enumerate(self.runs) if k % every != every - 1)
        return replace(self, runs=rest), replace(self, runs=held)

    def take(self, samples: int) -> Calibration:
        """At least one run, evenly spaced, of so many samples together or a little more."""
        share = min(1.0, samples / max(1, self.samples))
        count = max(1, math.ceil(share * len(self.runs)))
        return replace(self, runs=tuple(self.runs[k * len(self.runs) // count] for k in range(count)))


def load(path: str | os.PathLike[str], model: ImportedModel, most: int | None = MOST) -> Calibration:
    """The data in an .npz (arrays by input name, the first axis samples), an .npy, or a folder of such.

    Of a folder each file is a sample or a batch, in the order of their names; sizes other than the batch may differ
    between files. TNCompileError where there are none, or they do not fit the inputs.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy"))
        if not files:
            raise TNCompileError(f"{path}: a folder without .npz or .npy files; write one for each sample or batch")
    elif path.suffix in (".npz", ".npy"):
        files = [path]
    else:
        raise TNCompileError(f"{path}: calibration data are an .npz, an .npy or a folder of such files")
    return _calibration(((read_arrays(file), str(file)) for file in files), model, most, whole=path.is_dir())


def collect(samples: Any, model: ImportedModel, most: int | None = MOST) -> Calibration:
    """The data in a tensor or array (of a model with one input), a tuple of them in the order of the inputs, a dict
    by their names, or an iterable of such, as a DataLoader is: each then a batch.

    TNCompileError where there are none, or they do not fit the inputs.
    """
    if isinstance(samples, Calibration):
        return samples
    single = isinstance(samples, (tuple, Mapping)) or _is_array(samples)
    if not single and not isinstance(samples, Iterable):
        raise TNCompileError(f"calibration data are tensors or an iterable of them, not {type(samples).__name__}")
    items = [samples] if single else samples
    named = ((_by_name(item), f"batch {k} of the calibration data") for k, item in enumerate(items))
    return _calibration(named, model, most, whole=not single)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _by_name(item: Any) -> dict[str, Array]:
    """Arrays by name, or by their place where they have none."""
    if isinstance(item, Mapping):
        return {str(name): _array(value) for name, value in item.items()}
    values = [item] if _is_array(item) else list(item) if isinstance(item, (tuple, list)) else None
    if not values:
        raise TNCompileError(f"a batch of calibration data is a tensor, a tuple or a dict, not {type(item).__name__}")
    return {"" if len(values) == 1 else str(k): _array(value) for k, value in enumerate(values)}


def _array(value: Any) -> Array:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "fiub":
        raise TNCompileError(f"calibration data are numbers, not {array.dtype}")
    return array


# ------------------------------------------------------------------------------------ fitting the inputs


def _calibration(
    items: Iterable[tuple[Mapping[str, Array], str]], model: ImportedModel, most: int | None, whole: bool
) -> Calibration:
    """Runs of all items; of an item that is all there is (not `whole`) at least ten, if it has as many samples."""
    inputs = {v.name: v for v in model.program.inputs}
    if not inputs:
        raise TNCompileError("the model has no inputs: there is nothing to calibrate it with")
    runs: list[Run] = []
    notes: list[str] = []
    for given, where in items:
        named = _named(given, inputs, where)
        if len(given) == 1 and not {*given} <= {*inputs, "", "arr_0"}:
            notes.append(f"{where}: the array {next(iter(given))} is taken for the input {next(iter(named))}")
        found, left_out = cut(named, model, where, 1 if whole else _RUNS)
        runs += found
        notes += left_out
        if whole and most is not None and sum(run.samples for run in runs) >= 4 * most:
            notes.append(f"of the calibration data what comes after {where} is not read")
            break
    if not runs:
        raise TNCompileError("the calibration data hold no samples")
    data = Calibration(tuple(runs))
    if most is not None and data.samples > most:
        taken = data.take(most)
        notes.append(f"{taken.samples} of {data.samples} samples are used, evenly spaced")
        data = taken
    if data.samples < _FEW:
        notes.append(f"{data.samples} samples are few to calibrate with: {_FEW} or more tell more")
    for run in data.runs:
        for name, array in run.arrays.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise TNCompileError(f"the calibration data of {name} hold NaN")
    return replace(data, notes=tuple(dict.fromkeys(notes)))


def _named(given: Mapping[str, Array], inputs: Mapping[str, Value], where: str) -> dict[str, Array]:
    """The arrays by the names of the inputs: one of any name for a single input, several without names in order."""
    if {*given} == {*inputs}:
        return {name: given[name] for name in inputs}
    if len(given) == len(inputs) == 1 or (len(given) == len(inputs) and all(n == str(k) for k, n in enumerate(given))):
        return dict(zip(inputs, given.values(), strict=True))
    shown = ", ".join(filter(None, given)) or f"{len(given)} arrays"
    raise TNCompileError(f"{where} has {shown}; the inputs are {', '.join(inputs)}: give one array for each")
