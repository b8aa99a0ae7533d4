"""Calibration data as runs of a model, and the values at the boundaries of its slices, kept in bounded memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tncompile.errors import TNCompileError, first_line
from tncompile.ir import Array
from tncompile.tensorizer.flow import Flow, Values

BATCH = 32
RUNS = 16
"""Samples of a run, of a model that takes any number of them: fewer where there would be less than that many runs."""

Feeds = Mapping[str, Array]


class Store:
    """Keeps tensors: in memory up to `limit` bytes, beyond that mapped to files in `folder`."""

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self.used = 0
        self.files = 0

    def keep(self, values: Values) -> dict[int, Any]:
        """The same values, as long as they are referred to; no tensor holds the storage of a larger one."""
        return {number: self._kept(v) if isinstance(v, torch.Tensor) else v for number, v in values.items()}

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if size and self.used + size > self.limit:
            return self._mapped(tensor.detach())
        whole = tensor.detach().contiguous()
        if whole.untyped_storage().nbytes() > size or whole.data_ptr() == tensor.data_ptr():
            whole = whole.clone()
        self.used += size
        weakref.finalize(whole, self._release, size)
        return whole

    def _release(self, size: int) -> None:
        self.used -= size

    def _mapped(self, tensor: torch.Tensor) -> torch.Tensor:
        path = self.folder / str(self.files)
        self.files += 1
        try:
            mapped = torch.from_file(str(path), True, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        except RuntimeError as error:  # a full disk
            raise TNCompileError(
                f"activations of the calibration data cannot be kept in {self.folder}: {first_line(error)}"
            ) from error
        weakref.finalize(mapped, path.unlink, missing_ok=True)
        return mapped.copy_(tensor).to(tensor.device)


def runs_of(flow: Flow, feeds: Sequence[Feeds]) -> list[dict[int, torch.Tensor]]:
    """The calibration data as inputs of the model, run by run, by the inputs' numbers.

    A model that takes any number of samples gets them in runs of `BATCH` at most; others as they come. TNCompileError
    where they are not the inputs of the model.
    """
    if not feeds:
        raise TNCompileError("no calibration data: give arrays by input name, one mapping a run")
    found = [{n: _tensor(flow, n, feed) for n in range(len(flow.inputs))} for feed in map(_checked(flow), feeds)]
    if not _any_batch(flow) or len({tuple(t.shape[1:] for t in run.values()) for run in found}) > 1:
        return found
    whole = {n: torch.cat([run[n] for run in found]) for n in found[0]}
    samples = len(whole[0])
    size = min(BATCH, max(1, samples // RUNS))
    return [{n: t[i : i + size] for n, t in whole.items()} for i in range(0, samples, size)]


def _checked(flow: Flow) -> Any:
    names = [node.name for node in flow.inputs]

    def checked(feed: Feeds) -> Feeds:
        missing = [name for name in names if name not in feed]
        unknown = [name for name in feed if name not in names and name not in flow.fixed]
        if missing or unknown:
            raise TNCompileError(
                f"the calibration data has {', '.join(feed) or 'no arrays'}; the inputs are {', '.join(names)}"
            )
        return feed

    return checked


def _tensor(flow: Flow, number: int, feed: Feeds) -> torch.Tensor:
    node = flow.inputs[number]
    expected = node.meta["val"]
    tensor = torch.from_numpy(np.ascontiguousarray(feed[node.name]))
    if expected.is_complex() and not tensor.is_complex():  # as the program of a compiled model has them
        tensor = torch.view_as_complex(tensor)
    fits = tensor.ndim == expected.ndim and all(
        not isinstance(size, int) or size == given for size, given in zip(expected.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise TNCompileError(
            f"the calibration data for {node.name} is of shape {tuple(tensor.shape)}; the model takes "
            f"{tuple(str(size) for size in expected.shape)}"
        )
    if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise TNCompileError(f"the calibration data for {node.name} has numbers that are NaN; leave those samples out")
    return tensor.to(expected.dtype).to(expected.device)


def _any_batch(flow: Flow) -> bool:
    """Whether the first axis of every input is one symbolic size."""
    shapes = [node.meta["val"].shape for node in flow.inputs]
    sizes = {str(shape[0]) for shape in shapes if shape}
    return all(shapes) and len(sizes) == 1 and not any(isinstance(shape[0], int) for shape in shapes)
