"""Healing that survives a kill: all that is needed to go on, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from tncompile.errors import LoadError, TNCompileError
from tncompile.runtime.files import write_file
from tncompile.tensorizer.distil import Progress

VERSION = 1
_KEY = "tncompile.healing"
_TENSORS = ("now", "best", "first", "second")
_NUMBERS = ("before", "loss", "step", "waited", "falls")


@dataclass(frozen=True)
class Stage:
    """What came of one slice, or of training from end to end: the loss on held-out data before and after."""

    name: str
    weights: tuple[str, ...]
    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Position:
    """Where healing is, with so many `runs` of the calibration data (0: not yet chosen).

    `stages` are done, with the weights `healed`; of the next one `training` has been done in `part` seconds of the
    `share` that it has. `seconds`: taken so far.
    """

    runs: int = 0
    stages: tuple[Stage, ...] = ()
    healed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    training: Progress | None = None
    seconds: float = 0.0
    part: float = 0.0
    share: float | None = None


def fingerprint(parts: Iterable[Any]) -> str:
    """A hash of models, data and options: of texts, and of arrays and tensors with their types and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def save(path: Path, mark: str, position: Position) -> None:
    """Write a checkpoint, whole or not at all. OutputError where it cannot be written."""
    training = position.training
    tensors = {f"healed/{key}": tensor for key, tensor in position.healed.items()}
    if training is not None:
        tensors |= {f"{kind}/{key}": t for kind in _TENSORS for key, t in getattr(training, kind).items()}
    record = {
        "version": VERSION,
        "fingerprint": mark,
        "stages": [asdict(stage) for stage in position.stages],
        "training": None if training is None else {name: getattr(training, name) for name in _NUMBERS},
        "runs": position.runs,
        "seconds": position.seconds,
        "part": position.part,
        "share": position.share,
    }
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(contiguous, {_KEY: json.dumps(record)}))


def load(path: Path, mark: str) -> Position:
    """Where healing was when the checkpoint was written.

    LoadError for a file that is none; TNCompileError for one of another model, other data or other options.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if record["version"] == VERSION and record["fingerprint"] == mark:
            return _position(record, tensors)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise LoadError(f"{path}: is no checkpoint of healing, or damaged; remove it, or name another file") from error
    raise TNCompileError(
        f"{path}: is the checkpoint of another model, other calibration data or other options; "
        "remove it to begin anew, or name another file"
    )


def _position(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Position:
    groups: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("healed", *_TENSORS)}
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        groups[kind][key] = tensor
    healed = groups.pop("healed")
    numbers = record["training"]
    return Position(
        record["runs"],
        tuple(Stage(**{**stage, "weights": tuple(stage["weights"])}) for stage in record["stages"]),
        healed,
        None if numbers is None else Progress(**{**groups, **numbers}),
        record["seconds"],
        record["part"],
        record["share"],
    )
