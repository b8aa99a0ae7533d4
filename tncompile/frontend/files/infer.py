"""What a module takes, told from its first layer; and the flag to add where that cannot be told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tncompile.errors import LoadError
from tncompile.frontend.files.inputs import InputSpec
from tncompile.frontend.names import parameters_of
from tncompile.frontend.script.module import Scripted

#: sizes a user must fill in, after batch and channels
_SPATIAL: Mapping[str, str] = {"1d": "LENGTH", "2d": "HEIGHT,WIDTH", "3d": "DEPTH,HEIGHT,WIDTH"}


def flag_for(module: torch.nn.Module, name: str) -> str:
    """The flag that gives an input, with what is left to fill in."""
    kind = module.types[name] if isinstance(module, Scripted) else "Tensor"
    return f'--input "{name}:float32[batch,...]"' if "Tensor" in kind else f"--input {name}=VALUE (its type is {kind})"


def infer(module: torch.nn.Module) -> InputSpec:
    """The one input of a module, where its first layer settles the shape. LoadError, with the flag, elsewhere."""
    needed = [name for name, default in parameters_of(module).items() if default is inspect.Parameter.empty]
    if len(needed) != 1:
        flags = " ".join(flag_for(module, name) for name in needed)
        raise LoadError(f"the file does not say what shapes its inputs have; add {flags or '--input'} with your sizes")
    found = next(_layers(module), None)
    spec = None if found is None else _spec(needed[0], *found)
    if spec is None:
        kind = "" if found is None else f", and its first layer, {found[0]}, does not settle it"
        raise LoadError(
            f"the file does not say what shape its input has{kind}; "
            f'add --input "{needed[0]}:{_suggestion(*found) if found else "float32[batch,...]"}" with your sizes'
        )
    return spec


def highest_index(module: torch.nn.Module) -> int:
    """Whole numbers below this are rows of every embedding table; 2 where there is none."""
    sizes = [layer[1].shape[0] for layer in _layers(module) if layer[0] in ("Embedding", "EmbeddingBag")]
    return min(sizes, default=2)


def _layers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    """The class, the weight and the module of each layer that has a weight, in the order of definition."""
    script = module.__dict__.get("script", module)
    for layer in script.modules():
        name = getattr(layer, "original_name", type(layer).__name__)
        for weight in ("weight", "weight_ih_l0", "weight_ih", "in_proj_weight"):
            tensor = getattr(layer, weight, None)
            if isinstance(tensor, torch.Tensor):
                yield name, tensor, layer
                break


def _spec(name: str, kind: str, weight: torch.Tensor, layer: Any) -> InputSpec | None:
    dtype = str(weight.dtype).removeprefix("torch.")
    size = int(weight.shape[-1]) if weight.ndim else 0
    if kind in ("Linear", "LSTMCell", "GRUCell", "RNNCell"):
        return InputSpec(name, dtype, ("batch", size))
    if kind in ("LSTM", "GRU", "RNN", "MultiheadAttention"):
        first = bool(getattr(layer, "batch_first", False))
        return InputSpec(name, dtype, ("batch", "seq", size) if first else ("seq", "batch", size))
    if kind == "Embedding":
        return InputSpec(name, "int64", ("batch", "seq"), limit=int(weight.shape[0]))
    if kind in ("BatchNorm1d", "InstanceNorm1d"):
        return InputSpec(name, dtype, ("batch", size))
    if kind == "LayerNorm":
        return InputSpec(name, dtype, ("batch", *map(int, weight.shape)))
    return None


def _suggestion(kind: str, weight: torch.Tensor, layer: Any) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    if kind.startswith(("Conv", "BatchNorm", "InstanceNorm")) and kind[-2:] in _SPATIAL:
        transposed = "Transpose" in kind
        channels = int(weight.shape[0 if transposed or weight.ndim == 1 else 1])
        if not transposed and weight.ndim > 1:
            channels *= int(getattr(layer, "groups", 1))
        return f"{dtype}[batch,{channels},{_SPATIAL[kind[-2:]]}]"
    return f"{dtype}[batch,...]"
