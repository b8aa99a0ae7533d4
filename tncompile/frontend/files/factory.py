"""The module that weights belong into: ``--model package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tncompile.errors import LoadError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def build(factory: str | Callable[[], Any]) -> torch.nn.Module:
    """What the factory makes, called without arguments. LoadError where there is none or it fails."""
    import torch

    with importable_here():
        function = named(factory, "--model") if isinstance(factory, str) else factory
        try:
            module = function()
        except Exception as error:  # whatever the user's code raises
            reason = str(error).strip().split("\n")[0]
            raise LoadError(
                f"--model {factory}: calling it without arguments fails: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(module, torch.nn.Module):
        raise LoadError(f"--model {factory}: gives {type(module).__name__}, not a torch.nn.Module; name what makes one")
    return module


def named(reference: str, option: str) -> Callable[..., Any]:
    """What ``package.module:function`` names; LoadError, which mentions the `option`, where there is no such thing.

    To be called within `importable_here`.
    """
    name, _, attribute = reference.partition(":")
    if not name or not attribute:
        raise LoadError(f"{option} {reference}: write package.module:function, something to call")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{option} {reference}: no module {error.name} (looked in the current directory and where Python looks); "
            "run from the folder that holds it, or install it"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise LoadError(f"{option} {reference}: importing {name} fails: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LoadError(
                f"{option} {reference}: {name} has no {part}; it has "
                f"{', '.join(_callables(found)[:8]) or 'nothing to call'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise LoadError(f"{option} {reference}: is not a function or class")
    called: Callable[..., Any] = found
    return called


def _callables(module: Any) -> list[str]:
    """The public names of a module that can be called without arguments, then its others; what it imports is last."""

    def rank(name: str) -> tuple[bool, bool]:
        value = vars(module)[name]
        imported = getattr(value, "__module__", None) != getattr(module, "__name__", None)
        return imported, imported or not _needs_nothing(value)

    return sorted((n for n, value in vars(module).items() if not n.startswith("_") and callable(value)), key=rank)


def _needs_nothing(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # ValueError: some builtins have no signature
        return False
    return True
