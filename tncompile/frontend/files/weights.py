"""Weights without a model: a state_dict or safetensors, loaded into the module that ``--model`` makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tncompile.errors import LoadError
from tncompile.frontend.files.detect import detect
from tncompile.frontend.files.index import shards

#: where training scripts keep a state_dict inside a checkpoint
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params_ema",
    "params",
    "ema",
)
#: what wrappers of modules put in front of every name
_WRAPPERS = ("module.", "_orig_mod.")


def safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, memory-mapped. LoadError where it is damaged."""
    from safetensors.torch import load_file

    try:
        weights: dict[str, torch.Tensor] = load_file(path, device="cpu")
    except Exception as error:  # SafetensorError is no public class of a stable place
        raise LoadError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    return weights


def sharded(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index names, which lie beside it. LoadError where one is missing."""
    from tncompile.frontend.files.pickled import read

    weights: dict[str, torch.Tensor] = {}
    for shard in shards(index):
        kind = detect(shard)
        if kind == "safetensors":
            weights.update(safetensors(shard))
        elif kind == "state_dict":
            weights.update(tensors(read(shard), shard))
        else:
            raise LoadError(f"{shard}: is part of {index.name}, but not a file of weights")
    return weights


def tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state_dict in what a file held: itself, or the part of a checkpoint. LoadError where there is none."""
    for candidate in (content, *(content.get(key) for key in _NESTED)) if isinstance(content, Mapping) else ():
        if not isinstance(candidate, Mapping):
            continue
        found = {str(k): torch.Tensor.detach(v) for k, v in candidate.items() if isinstance(v, torch.Tensor)}
        if found and len(found) >= len(candidate) - 2:  # beside a few numbers of a wrapper
            return found
    keys = ", ".join(map(str, [*content][:6])) if isinstance(content, Mapping) else type(content).__name__
    raise LoadError(f"{path}: holds no state_dict (only {keys or 'nothing'}); save model.state_dict() itself")


def fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put the weights in their places. LoadError, with their names, where they do not fit."""
    own = module.state_dict()
    weights = _unwrapped(weights, own)
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    shapes = {name: tensor for name, tensor in own.items() if isinstance(tensor, torch.Tensor)}
    tied = {name for name in missing if name in shapes and _tied(name, shapes, weights)}
    missing = [name for name in missing if name not in tied]
    unexpected = [k for k in weights if k not in own]
    wrong = [
        f"{k} is {[*weights[k].shape]} in the file and {[*t.shape]} in the model"
        for k, t in shapes.items()
        if k in weights and weights[k].shape != t.shape
    ]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing in the file", missing),
            ("not in the model", unexpected),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise LoadError(f"{path}: does not fit {type(module).__name__}; " + "; ".join(problems))
    fitting = {k: v.to(shapes[k].dtype) for k, v in weights.items()}
    module.load_state_dict(fitting, strict=False, assign=not tied)


def _unwrapped(weights: Mapping[str, torch.Tensor], own: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Without the prefixes of DataParallel and torch.compile, where the model does not have them itself."""
    for prefix in _WRAPPERS:
        if weights and all(k.startswith(prefix) for k in weights) and not any(k.startswith(prefix) for k in own):
            return _unwrapped({k.removeprefix(prefix): v for k, v in weights.items()}, own)
    return weights


def _tied(name: str, shapes: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a weight that the file lacks is another name of one that it has."""
    tensor = shapes[name]
    return any(
        k in weights and other.numel() > 0 and other.data_ptr() == tensor.data_ptr() and other.shape == tensor.shape
        for k, other in shapes.items()
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
