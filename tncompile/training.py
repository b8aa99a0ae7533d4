"""Back to PyTorch: a model as a module that is trained along planned orders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from tncompile.compiler import CompiledModel
from tncompile.cost.devices import choose
from tncompile.cost.profile import DeviceProfile
from tncompile.emit.module.graph import Emitted, emit
from tncompile.emit.module.trainable import TrainableModule, state_of
from tncompile.errors import TNCompileError, UnsupportedError
from tncompile.frontend.importer import TracedModel
from tncompile.frontend.load import load
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.trace import trace
from tncompile.frontend.training import TrainedModel, import_for_training
from tncompile.passes import Clean, Context, Fold, Pipeline
from tncompile.passes.stacks import Stacks
from tncompile.passes.training import TrainingOrder

DEFAULT_BATCH = (32, 256)
Memory = Literal["high", "auto", "low"]
_SHARE: Mapping[Memory, float] = {"high": 0.0, "auto": 0.01, "low": float("inf")}

Model = torch.nn.Module | torch.export.ExportedProgram | TracedModel | CompiledModel | OnnxModel


def to_torch(
    model: Model | str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    batch: int | Sequence[int] = DEFAULT_BATCH,
    sizes: Mapping[str, int] | None = None,
    train: bool = True,
    memory: Memory = "auto",
    profile: DeviceProfile | str | None = None,
) -> TrainableModule:
    """A module to train, whose networks are computed along orders planned for a training step, forward and backward.

    `model` is a module with `example_inputs` (and `kwargs`, `dynamic_shapes` as in `tncompile.compile`), traced in
    training mode and, for ``.eval()``, in evaluation mode; where not `train`, in evaluation mode alone. Or it is an
    exported program, a compiled model or a model file, in the one mode that it was exported in. The module has copies
    of the model's parameters and buffers under their own names; none are merged.

    Gradients are planned for parameters that require them, and for inputs where the example does: a layer that is to
    stand inside a network is given an example that requires one.

    `batch`: the batch sizes to plan for; `sizes`: those of other dynamic dimensions. `memory`: ``"high"`` keeps every
    intermediate for the backward pass; ``"low"`` computes again those in the slices with the lowest peak, or all where
    no slices need less; ``"auto"`` those for which that is predicted to add at most 1% to a step, or makes slices,
    which may add 10%.
    `profile` as in `tncompile.compile`. UnsupportedError for what cannot be traced; TNCompileError for wrong arguments.
    """
    if memory not in _SHARE:
        raise TNCompileError(f"no memory {memory!r}; choose from {', '.join(_SHARE)}")
    exported = _exported(model, example_inputs, kwargs, dynamic_shapes, train)
    chosen = profile if isinstance(profile, DeviceProfile) else choose(profile).profile
    batches = tuple([batch] if isinstance(batch, int) else batch)
    context = Context(batches, sizes or {}, chosen)
    through = [isinstance(x, torch.Tensor) and x.requires_grad for x in _leaves(example_inputs, kwargs)]
    modes = {training: _planned(e, context, _SHARE[memory], through) for training, e in exported.items()}
    return TrainableModule(modes, state_of(next(iter(exported.values()))))


def _planned(
    exported: torch.export.ExportedProgram, context: Context, share: float, through: Sequence[bool]
) -> tuple[TrainedModel, Emitted]:
    """A model, and the graph that computes it."""
    model = import_for_training(exported)
    unknown = sorted({*context.sizes} - {*model.sizes})
    if unknown:
        raise TNCompileError(f"no dynamic dimension {unknown[0]}; the model has {', '.join(model.sizes) or 'none'}")
    context = replace(context, sizes={**model.sizes, **context.sizes})
    state = exported.state_dict
    trained = {name for name, key in model.state.items() if key in state and state[key].requires_grad}
    trained |= {name for name, needs in zip(model.arguments, through, strict=False) if name and needs}
    passes = (Clean(), Stacks(), Fold(), Clean(), TrainingOrder(frozenset(trained)))
    program, _ = Pipeline(passes, scheduled=False).run(model.program, context)
    return model, emit(model, program, context, trained, share)


# ------------------------------------------------------------------------------------ what is given


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    args = (args,) if isinstance(args, torch.Tensor) else args
    return torch.utils._pytree.tree_leaves((tuple(args or ()), kwargs or {}))


def _exported(
    model: Model | str | os.PathLike[str], example_inputs: Any, kwargs: Any, dynamic_shapes: Any, train: bool
) -> dict[bool, torch.export.ExportedProgram]:
    """The graph for training mode (True), evaluation mode (False), or both."""
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise TNCompileError("a module needs example_inputs to be traced on: to_torch(module, (x,))")
        found = {}
        for training in (True, False) if train else (False,):
            with _mode(model, training):
                found[training] = trace(model, example_inputs, kwargs, dynamic_shapes)
        return found
    if example_inputs is not None or kwargs is not None:
        raise TNCompileError("example_inputs are for modules: this model has been traced already")
    if isinstance(model, (str, os.PathLike)):
        model = load(model)
    if isinstance(model, CompiledModel):
        model = model.traced
    if isinstance(model, TracedModel):
        model = model.reference
    if isinstance(model, OnnxModel):
        raise UnsupportedError("an ONNX model cannot be trained by PyTorch; take the model that it was exported from")
    return {train: model}


@contextlib.contextmanager
def _mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """Within it a module is in a mode; one that is in that mode already keeps the modes of all its parts."""
    before = {part: part.training for part in module.modules()}
    if module.training != training:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
