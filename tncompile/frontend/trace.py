"""Trace a module with torch.export so that its networks survive."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompile.errors import TNCompileWarning, UnsupportedError
from tncompile.frontend.adapters import adapted


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
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    # torch.export marks the tensors it is given as dynamic, for good: it gets copies
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone(), (tuple(example_inputs), kwargs)
    )
    automatic = isinstance(dynamic_shapes, str) and dynamic_shapes == "batch"
    if automatic:
        given = (args, kwargs)
        args, kwargs = _doubled(given)
        dynamic_shapes = _first_modes(_bound(module, args, kwargs or {}))
    with whole_einsums(), adapted(module):
        exported = _export(module, args, kwargs, dynamic_shapes)
        if automatic and args is not given[0] and _has_batch(args) and not exported.range_constraints:
            exported = _export(module, *given, None)  # fixed: to the example's own size, not to twice that
    if automatic and _has_batch(args) and not exported.range_constraints:
        warnings.warn(
            f"{type(module).__name__} fixes the batch to the example's: it cannot be traced otherwise",
            TNCompileWarning,
            stacklevel=3,
        )
    return exported


def _first_modes(value: Any) -> Any:
    """``{0: Dim.AUTO}`` for each tensor: dynamic where the trace allows it."""
    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] > 1 else None
    if isinstance(value, (list, tuple)):
        return type(value)(map(_first_modes, value))
    if isinstance(value, dict):
        return {k: _first_modes(v) for k, v in value.items()}
    return None


def _doubled(inputs: Any) -> Any:
    """Inputs of batch 1 twice over: torch.export takes a size of 1 for a fixed one."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim]
    if any(t.shape[0] != 1 for t in tensors):
        return inputs
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, inputs)


def _has_batch(args: Any) -> bool:
    return any(t.ndim and t.shape[0] > 1 for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor))


def _bound(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by parameter of `forward`, those of ``*args`` together: as torch.export pairs them with shapes."""
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise UnsupportedError(f"torch.export cannot trace {type(module).__name__}: {error}") from error


def _export(module: torch.nn.Module, args: Any, kwargs: Any, shapes: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings(), silence():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedError(f"torch.export cannot trace {type(module).__name__}: {first}") from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep torch from logging what is raised as well."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


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
