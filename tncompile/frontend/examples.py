"""Trace a module of which only the inputs' shapes are known: on random examples of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tncompile.errors import LoadError, TNCompileWarning, UnsupportedError
from tncompile.frontend.files.infer import flag_for, highest_index, infer, is_torchs_own
from tncompile.frontend.files.inputs import InputSpec, example_sizes
from tncompile.frontend.names import is_variadic, parameters_of, under_names, with_fixed
from tncompile.frontend.script.compare import compare, decide
from tncompile.frontend.script.module import Scripted
from tncompile.frontend.trace import DataDependentError, trace


def trace_on_examples(
    module: torch.nn.Module, inputs: Sequence[InputSpec], fix_choices: bool = False
) -> torch.export.ExportedProgram:
    """Trace a module on random inputs (seed 0) of the shapes given, or of what its first layer takes.

    Sizes with a name are dynamic where the model allows it; a TNCompileWarning says which it does not. LoadError
    where the inputs are not those of the module, UnsupportedError where it cannot be traced on them. TorchScript
    is compared with its trace on other inputs; where it decides by their values, the trace is as these make it decide
    where `fix_choices`, else it is refused.
    """
    given = bool(inputs)
    named = _named(module, list(inputs) if given else [infer(module)])
    sizes = example_sizes(named)
    fixed = {spec.name: spec.value for spec in named if spec.fixed}
    tensors = [spec for spec in named if not spec.fixed]
    below = highest_index(module)
    examples = _examples(tensors, sizes, below)
    if fixed:
        module.forward = with_fixed(module.forward, fixed)
    try:
        if not isinstance(module, Scripted):
            return _traced(module, tensors, examples, sizes, given)
        chose = decide(module, examples, fix_choices)
        program = _traced(module, tensors, examples, sizes, given)
        others = [_examples(tensors, _other_sizes(program, tensors, sizes), below, k, k) for k in (1, -1)]
        compare(module, program, [_called(module, e) for e in others if not chose or module.decides_alike(e)])
        return program
    except DataDependentError:
        raise
    except UnsupportedError as error:
        shown = " ".join(f'--input "{spec}"' for spec in named)
        hint = f"traced with {shown}" if given else f"traced with {shown}, told from its first layer; give others"
        raise type(error)(f"{error} ({hint})") from error


def _traced(
    module: torch.nn.Module,
    specs: Sequence[InputSpec],
    examples: dict[str, torch.Tensor],
    sizes: dict[str, int],
    given: bool,
) -> torch.export.ExportedProgram:
    """With the named sizes dynamic; else as many of them as torch manages; else with none."""
    args, kwargs = _called(module, examples)
    order = [name for name in parameters_of(module) if name in examples]

    def shapes(dims: dict[str, Any]) -> Any:
        found: dict[str, Any] = dict.fromkeys(order)
        for spec in specs:
            found[spec.name] = {axis: dims[d] for axis, d in enumerate(spec.dims) if isinstance(d, str)} or None
        return found

    dims = {name: torch.export.Dim(name) for name in sizes}
    if not dims:
        return trace(module, args, kwargs or None, None)
    try:
        return trace(module, args, kwargs or None, shapes(dims))
    except UnsupportedError:
        pass
    by_name = {spec.name: {axis: d for axis, d in enumerate(spec.dims) if isinstance(d, str)} for spec in specs}
    names = [by_name[name] for name in order]
    batch_alone = len(sizes) == 1 and all([*axes] == [0] for axes in names)
    try:  # a batch alone may be dynamic all the same, see `tncompile.frontend.retrace`
        automatic = "batch" if batch_alone else shapes(dict.fromkeys(sizes, torch.export.Dim.AUTO))
        program = trace(module, args, kwargs or None, automatic, names)
    except UnsupportedError:
        program = trace(module, args, kwargs or None, None)
    kept = _dynamic(program, specs)
    lost = [name for name in sizes if name not in kept]
    if lost and not given:
        asked = " ".join(f'--input "{_upper(spec, lost)}"' for spec in specs)
        raise LoadError(f"the model fixes {' and '.join(lost)} when it is traced; add {asked} with your sizes")
    if lost and not batch_alone:  # else that is told already, with the line
        fixed = ", ".join(f"{name} to {sizes[name]}" for name in lost)
        warnings.warn(
            f"the model fixes {fixed}: it cannot be traced otherwise; give the size that you need in its place",
            TNCompileWarning,
            stacklevel=3,
        )
    return program


def _called(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional arguments, and as named ones from the first that is left out on."""
    order = [name for name in parameters_of(module) if name in inputs]
    leading = [name for name, known in zip(parameters_of(module), order, strict=False) if name == known]
    return tuple(inputs[name] for name in leading), {name: inputs[name] for name in order if name not in leading}


def _other_sizes(
    program: torch.export.ExportedProgram, specs: Sequence[InputSpec], sizes: dict[str, int]
) -> dict[str, int]:
    """The sizes of the trace, with one more of what is dynamic."""
    dynamic = _dynamic(program, specs)
    return {name: size + (name in dynamic) for name, size in sizes.items()}


def _upper(spec: InputSpec, names: Sequence[str]) -> InputSpec:
    """The spec with a place to fill in for each of these sizes."""
    return replace(spec, dims=tuple(d.upper() if isinstance(d, str) and d in names else d for d in spec.dims))


def _dynamic(program: torch.export.ExportedProgram, specs: Sequence[InputSpec]) -> set[str]:
    values = [n.meta["val"] for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    values = [
        v for v, s in zip(values, program.graph_signature.input_specs, strict=True) if s.kind.name == "USER_INPUT"
    ]
    inputs = [v for v in values if isinstance(v, torch.Tensor)]
    return {
        str(d)
        for spec, value in zip(specs, inputs, strict=False)
        for d, size in zip(spec.dims, value.shape, strict=False)
        if isinstance(d, str) and not str(size).isdigit()  # a size that was fixed may still be a SymInt
    }


def _named(module: torch.nn.Module, specs: Sequence[InputSpec]) -> list[InputSpec]:
    """The specs with the names of `forward`'s arguments.

    Other names, for all of its tensors, become theirs where the arguments are torch's: nobody has chosen ``input``.
    """
    if is_variadic(module):
        _rename(module, [s.name or f"input_{k}" for k, s in enumerate(specs)])
    parameters = parameters_of(module)
    names = [*parameters]
    needed = [n for n, default in parameters.items() if default is inspect.Parameter.empty]
    if len({s.name for s in specs if s.name}) < sum(bool(s.name) for s in specs):
        raise LoadError("an input is given twice; give each one --input")
    free = [n for n in names if n not in {s.name for s in specs}]
    unknown = [s.name for s in specs if s.name and s.name not in names]
    others = any(s.name in names and not s.fixed for s in specs) or len(specs) > len(names)
    if unknown and (others or not is_torchs_own(module)):
        raise LoadError(f"the model has no input {unknown[0]}; its inputs are {', '.join(names)}")
    renamed: dict[str, str] = {}
    result = []
    for spec in specs:
        if spec.name in names:
            result.append(spec)
            continue
        if not free:
            raise LoadError(f"{len(specs)} inputs are given; the model has {len(names)}: {', '.join(names)}")
        name = free.pop(0)
        if spec.name:
            renamed[name] = spec.name
        result.append(replace(spec, name=name))
    missing = [n for n in needed if n not in {s.name for s in result}]
    if missing:
        raise LoadError("the model needs further inputs; add " + " ".join(flag_for(module, n) for n in missing))
    if renamed:
        _rename(module, [renamed.get(n, n) for n in names])
    return [replace(s, name=renamed.get(s.name, s.name)) for s in sorted(result, key=lambda s: names.index(s.name))]


def _rename(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Let torch.export call the inputs of a module by these names."""
    module.forward = under_names(module.forward, inspect.signature(module.forward), names)


def _examples(
    specs: Sequence[InputSpec], sizes: dict[str, int], below: int, seed: int = 0, mean: float = 0.0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    examples = {}
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            examples[spec.name] = (torch.randn(shape, generator=generator) + mean).to(dtype)
        else:
            high = 2 if dtype is torch.bool else spec.limit or below
            examples[spec.name] = torch.randint(0, high, shape, generator=generator).to(dtype)
    return examples
