"""Trace a module with torch.export so that its networks survive."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tncompile.errors import SourceRef, TNCompileWarning, UnsupportedError, first_line
from tncompile.frontend.adapters import adapted
from tncompile.frontend.retrace import retraced
from tncompile.frontend.sizes import (
    Place,
    SizeNames,
    apart,
    equal_first_modes,
    equal_names,
    name_sizes,
    names_in_shapes,
    requiring_equal,
    symbols_of,
)
from tncompile.frontend.structure import returning_fields, wrapped_forward

_STRUCTURED = "torch.__trace"


def trace(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    names: Sequence[SizeNames | None] | None = None,
) -> torch.export.ExportedProgram:
    """Export a module in its present mode (call ``.eval()`` first for inference).

    `dynamic_shapes` as in `torch.export.export`; ``"batch"`` makes the first mode of every tensor input
    dynamic where the model allows it and falls back to the example's own shapes where it does not;
    None keeps all shapes fixed. First modes of the same size in the example are one batch then. `names` says what the
    sizes of each input are called, in the order of the arguments, and equal names are one size; without, the names are
    those of `torch.export.Dim`. Dataclasses that torch does not know are returned as dicts of their fields.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            "TorchScript comes in as a file: module.save('model.pt'), then tncompile.compile_file('model.pt')"
        )
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    # torch.export marks the tensors it is given as dynamic, for good: it gets copies
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone(), (tuple(example_inputs), kwargs)
    )
    automatic = isinstance(dynamic_shapes, str) and dynamic_shapes == "batch"
    given = (args, kwargs)
    if automatic:
        args, kwargs = _doubled(given)
    arguments = _bound(module, args, kwargs or {})
    kwargs = kwargs and {name: kwargs[name] for name in arguments if name in kwargs} | kwargs  # in forward's order
    names = names_in_shapes(arguments, dynamic_shapes) if names is None else names
    shapes = _first_modes(arguments) if automatic else dynamic_shapes
    one = equal_first_modes(arguments) if automatic else equal_names(names)
    with whole_einsums(), adapted(module), wrapped_forward(module, returning_fields):
        with fixed_sizes() as fixed:
            exported = _export(module, args, kwargs, shapes)
        if apart(exported, one):
            exported = _with_one(one, module, args, kwargs, shapes) or exported
        lost = automatic and _has_batch(args) and not exported.range_constraints
        again = retraced(module, args, kwargs, _export) if lost else None
        if lost and again is None and args is not given[0]:
            exported = _export(module, *given, None)  # fixed: to the example's own size, not to twice that
    if lost:
        _warn_of_fixed(module, fixed, again is not None)
    exported = exported if again is None else again
    name_sizes(exported, symbols_of(exported, names))
    return exported


def _with_one(
    groups: Sequence[Sequence[Place]], module: torch.nn.Module, args: Any, kwargs: Any, shapes: Any
) -> torch.export.ExportedProgram | None:
    """The trace in which the sizes of each group are one; None where the model does not allow that."""
    with wrapped_forward(module, requiring_equal(groups)):
        try:
            exported = _export(module, args, kwargs, shapes)
        except UnsupportedError:
            return None
    return exported if exported.range_constraints else None


def _warn_of_fixed(module: torch.nn.Module, fixed: Sequence[SourceRef], recovered: bool) -> None:
    """Say that the code fixes the batch, and where; `recovered` as a dynamic one all the same."""
    where = f" at {fixed[0]} ({fixed[0].code})" if fixed else ""
    told = (
        f"reads the batch as a plain number{where}; it is dynamic all the same, as traces at three batch sizes tell: "
        "what it decides by the batch is taken to be as there"
        if recovered
        else f"fixes the batch to the example's{where}: it cannot be traced otherwise"
    )
    warnings.warn(f"{type(module).__name__} {told}", TNCompileWarning, stacklevel=4)


def _first_modes(arguments: dict[str, Any]) -> Any:
    """``{0: Dim.AUTO}`` for each tensor: dynamic where the trace allows it."""

    def first(value: Any) -> Any:
        dynamic = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] > 1
        return {0: torch.export.Dim.AUTO} if dynamic else None

    return torch.utils._pytree.tree_map(first, arguments)


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


class DataDependentError(UnsupportedError):
    """The code decides by numbers that it computes: other inputs do not help."""


def _export(module: torch.nn.Module, args: Any, kwargs: Any, shapes: Any) -> torch.export.ExportedProgram:
    # what torch prints of a graph that it could not finish says no more than the line of code does
    with warnings.catch_warnings(), silence(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            name = type(module).__name__
            if isinstance(error, GuardOnDataDependentSymNode):
                raise DataDependentError(
                    f"torch.export cannot trace {name}: what it does next hangs on numbers that it computes, and a "
                    "graph has one way for all; compute both and choose with torch.where, or use torch.cond",
                    _innermost(traceback.extract_tb(error.__traceback__)),
                ) from error
            raise UnsupportedError(f"torch.export cannot trace {name}: {first_line(error)}") from error


@contextlib.contextmanager
def silence(library: str = "torch") -> Iterator[None]:
    """Keep a library from logging what is raised, or told otherwise, as well; torch's structured log goes on."""
    below = [name for name in logging.root.manager.loggerDict if name.startswith(f"{library}.") and name != _STRUCTURED]
    loggers = [logging.getLogger(name) for name in (library, *below)]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def fixed_sizes() -> Iterator[list[SourceRef]]:
    """The lines of code that make torch.export fix a dynamic size while this runs, as its structured log tells them."""
    found: list[SourceRef] = []

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "symbolic_shape_specialization" in (getattr(record, "metadata", None) or {}):
                line = _innermost(traceback.extract_stack())
                found.extend([line] if line.file else [])

    logger, watcher = logging.getLogger(_STRUCTURED), Watcher(logging.DEBUG)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(watcher)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(watcher)
        logger.setLevel(level)
        logger.propagate = propagate


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


def _innermost(stack: Sequence[traceback.FrameSummary]) -> SourceRef:
    """The innermost line of the module that is being exported, or of a library that it calls, outside torch."""
    start = max(k for k, frame in enumerate(stack) if frame.filename == __file__ and frame.name == "_export")
    folders = tuple(str(Path(file).parent) for file in (__file__, torch.__file__, logging.__file__))
    inside = [f for f in stack[start:] if not f.filename.startswith(folders) and not f.filename.startswith("<")]
    return SourceRef("", inside[-1].filename, inside[-1].lineno or 0, inside[-1].line or "") if inside else SourceRef()
