"""The arguments of a module's `forward`, which torch.export names its inputs after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def parameters_of(module: torch.nn.Module) -> dict[str, Any]:
    """The arguments of `forward` and their defaults (`inspect.Parameter.empty` without), no ``**kwargs``."""
    signature = inspect.signature(module.forward)
    return {n: p.default for n, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}


def is_variadic(module: torch.nn.Module) -> bool:
    """Whether `forward` takes any number of inputs, as ``*args``."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def under_names(function: Callable[..., Any], signature: inspect.Signature, names: Sequence[str]) -> Callable[..., Any]:
    """A function whose arguments have other names; as many as names where it takes ``*args``."""
    old = [*signature.parameters.values()]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in old):
        old = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    new = [p.replace(name=name) for p, name in zip(old, names, strict=True)]
    original = dict(zip(names, (p.name for p in old), strict=True))

    def renamed(*args: Any, **kwargs: Any) -> Any:
        bound = renamed.__signature__.bind(*args, **kwargs)  # type: ignore[attr-defined]
        bound.apply_defaults()
        return function(*bound.args, **{original[name]: value for name, value in bound.kwargs.items()})

    renamed.__signature__ = signature.replace(parameters=new)  # type: ignore[attr-defined]
    return renamed


def with_fixed(function: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that takes what is left when some arguments always have these values."""
    signature = inspect.signature(function)
    left = [p for p in signature.parameters.values() if p.name not in values]

    def fixed(*args: Any, **kwargs: Any) -> Any:
        given = fixed.__signature__.bind(*args, **kwargs).arguments  # type: ignore[attr-defined]
        bound = signature.bind_partial()
        bound.arguments.update({**values, **given})
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)

    fixed.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return fixed
