"""Trace a module with torch.export so that its networks survive."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompile.errors import UnsupportedError


def trace(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
) -> torch.export.ExportedProgram:
    """Export a module in its present mode (call ``.eval()`` first for inference).

    `dynamic_shapes` as in `torch.export.export`; ``"batch"`` makes the first mode of every tensor input
    dynamic where the model allows it and falls back to the example's own shapes where it does not;
    None keeps all shapes fixed.
    """
    args = tuple(example_inputs)
    if dynamic_shapes != "batch":
        with whole_einsums():
            return _export(module, args, kwargs, dynamic_shapes)

    def first_mode(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] > 1:
            return {0: torch.export.Dim.DYNAMIC}
        if isinstance(value, (list, tuple)):
            return type(value)(map(first_mode, value))
        if isinstance(value, dict):
            return {k: first_mode(v) for k, v in value.items()}
        return None

    shapes: Any = tuple(map(first_mode, args))
    if kwargs:
        shapes = {**dict(zip(_parameters(module), shapes, strict=False)), **first_mode(kwargs)}
    with whole_einsums():
        try:
            return _export(module, args, kwargs, shapes)
        except Exception as error:
            try:
                exported = _export(module, args, kwargs, None)
            except Exception:
                raise error from None
        warnings.warn(
            "the batch is fixed to the example's: the model cannot be traced with a dynamic one "
            f"({str(error).splitlines()[0]})",
            stacklevel=3,
        )
        return exported


def _parameters(module: torch.nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(module.forward).parameters)


def _export(module: torch.nn.Module, args: Any, kwargs: Any, shapes: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedError(f"torch.export cannot trace {type(module).__name__}: {first}") from error


@contextlib.contextmanager
def whole_einsums() -> Iterator[None]:
    """Keep opt_einsum out of tracing: it picks a path from concrete sizes, which fixes a dynamic batch."""
    backend = torch.backends.opt_einsum
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before
