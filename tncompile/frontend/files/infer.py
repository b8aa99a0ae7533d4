"""What a module takes, told from its first layer; and the flag to add where that cannot be told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tncompile.errors import LoadError
from tncompile.frontend.files.inputs import InputSpec
from tncompile.frontend.names import parameters_of
from tncompile.frontend.script.module import Scripted

#: sizes a user must fill in, after batch and channels
_SPATIAL: Mapping[str, str] = {"1d": "LENGTH", "2d": "HEIGHT,WIDTH", "3d": "DEPTH,HEIGHT,WIDTH"}
_RECURRENT = ("LSTM", "GRU", "RNN")
_OF_SEQUENCES = (*_RECURRENT, "MultiheadAttention")
_BATCH, _SEQ = 3, 8  # sizes to try a shape with


def is_torchs_own(module: torch.nn.Module) -> bool:
    """Whether a module is a layer or container of torch.nn, whose arguments have torch's names."""
    if isinstance(module, Scripted):
        return hasattr(torch.nn, str(module.__dict__["script"].original_name))
    return type(module).__module__.startswith("torch.nn.")


def flag_for(module: torch.nn.Module, name: str) -> str:
    """The flag that gives an input, with what is left to fill in."""
    kind = module.types[name] if isinstance(module, Scripted) else "Tensor"
    if "Tensor" not in kind:
        return f"--input {name}=VALUE (its type is {kind})"
    return f'--input "{name}:{_suggestion(module, name)}"'


def infer(module: torch.nn.Module) -> InputSpec:
    """The one input of a module, where its first layer settles the shape. LoadError, with the flag, elsewhere.

    A shape that the first layer takes is tried out where other layers may take another: the module runs on it.
    """
    parameters = parameters_of(module)
    needed = [name for name, default in parameters.items() if default is inspect.Parameter.empty]
    if len(needed) != 1:
        # of all that transformers' models may be given, this is what they are of
        main = [name for name in (getattr(module, "main_input_name", ""), *parameters) if name in parameters][:1]
        flags = " ".join(flag_for(module, name) for name in needed or main)
        others = [name for name in parameters if name not in (needed or main)]
        also = f" (it also takes {', '.join(others[:4])}{', ...' * (len(others) > 4)})" if others else ""
        raise LoadError(
            f"the file does not say what shapes its inputs have; add {flags or '--input'} with your sizes{also}"
        )
    found = next(_layers(module), None)
    told = found is not None and (found[0] == "Embedding" or not _is_of_rows(needed[0]))
    specs = [replace(spec, name=needed[0]) for spec in _specs(module, *found)] if found and told else []
    spec = next((spec for spec in specs if _runs(module, spec)), None)
    if spec is None:
        kind = "" if found is None else f", and its first layer, {found[0]}, does not settle it"
        raise LoadError(
            f"the file does not say what shape its input has{kind}; add {flag_for(module, needed[0])} with your sizes"
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


def _is_of_rows(name: str) -> bool:
    """Whether an input is called as those are that select rows of an embedding."""
    return name in ("ids", "tokens", "indices") or name.endswith(("_ids", "_tokens", "_indices"))


def _specs(module: torch.nn.Module, kind: str, weight: torch.Tensor, layer: Any) -> list[InputSpec]:
    """What the first layer takes, the likelier first."""
    dtype = str(weight.dtype).removeprefix("torch.")
    size = int(weight.shape[-1]) if weight.ndim else 0
    if kind in ("LSTMCell", "GRUCell", "RNNCell", "BatchNorm1d", "InstanceNorm1d"):
        return [InputSpec("", dtype, ("batch", size))]
    if kind in _OF_SEQUENCES:
        return [_sequence(layer, dtype, size)]
    if kind == "Embedding":
        return [InputSpec("", "int64", ("batch", "seq"), limit=int(weight.shape[0]))]
    if kind in ("Linear", "LayerNorm"):
        sizes = (size,) if kind == "Linear" else tuple(map(int, weight.shape))
        further = next((found for name, _, found in _layers(module) if name in _OF_SEQUENCES), None)
        if further is not None:  # runs on one sequence as well, which is no batch
            return [_sequence(further, dtype, size)]
        return [InputSpec("", dtype, ("batch", *sizes)), InputSpec("", dtype, ("batch", "seq", *sizes))]
    return []


def _sequence(layer: Any, dtype: str, size: int) -> InputSpec:
    first = bool(getattr(layer, "batch_first", False))
    return InputSpec("", dtype, ("batch", "seq", size) if first else ("seq", "batch", size))


def _runs(module: torch.nn.Module, spec: InputSpec) -> bool:
    """Whether a module runs on an input of this shape; what it may have written to itself is put back."""
    if isinstance(module, Scripted):  # told when it is traced, with the reason
        return True
    shape = [{"batch": _BATCH, "seq": _SEQ}.get(d, 1) if isinstance(d, str) else d for d in spec.dims]
    value = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad():
            module(**{spec.name: value})
    except Exception:  # whatever a layer raises for a shape that it does not take
        return False
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    return True


def _suggestion(module: torch.nn.Module, name: str) -> str:
    """Dtype and sizes of an input as far as they can be told, in the grammar of ``--input``."""
    if _is_of_rows(name):
        tables = (weight.shape[0] for kind, weight, _ in _layers(module) if kind == "Embedding")
        return f"int64[batch,seq]<{next(tables, 'ROWS')}"
    kind, weight, layer = next(_layers(module), ("", torch.empty(0), None))
    dtype = str(weight.dtype).removeprefix("torch.")
    if name == "input_values":  # sound, as transformers' models take it
        return f"{dtype}[batch,LENGTH]"
    if kind.startswith(("Conv", "BatchNorm", "InstanceNorm")) and kind[-2:] in _SPATIAL:
        transposed = "Transpose" in kind
        channels = int(weight.shape[0 if transposed or weight.ndim == 1 else 1])
        if not transposed and weight.ndim > 1:
            channels *= int(getattr(layer, "groups", 1))
        return f"{dtype}[batch,{channels},{_SPATIAL[kind[-2:]]}]"
    return f"{dtype}[batch,...]"
