"""What a model returns, as dicts and tuples: the names in it, and structures that no class is needed to read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

Path = tuple[str | int, ...]
"""Where a leaf is: keys and fields by name, places in lists and tuples by number."""


def output_names(exported: torch.export.ExportedProgram) -> list[str]:
    """The model's own names of its outputs, ``""`` for each that is None.

    The keys of a returned dict or fields of a class, joined by dots where they are nested; what has none is ``output``,
    or ``output_0``, ``output_1``. Where two would be called the same, their places in the tuples above are added.
    """
    args = [spec.arg for spec in exported.graph_signature.output_specs]
    shown = [not (isinstance(arg, ConstantArgument) and arg.value is None) for arg in args]
    spec = exported.call_spec.out_spec
    paths = _paths(spec) if spec is not None else []
    if len(paths) != len(args):
        paths = [(place,) for place in range(len(args))]
    kept = [path for path, is_shown in zip(paths, shown, strict=True) if is_shown]
    numbered = [f"output_{place}" for place in range(len(kept))]
    ways = (_by_keys(kept), [_whole(path) for path in kept], numbered)
    names = iter(next(names for names in ways if len({*names}) == len(kept)))
    return [next(names) if is_shown else "" for is_shown in shown]


def _by_keys(paths: Sequence[Path]) -> list[str]:
    """Each path from its first key on; those without a key are numbered."""
    named = [path[next((k for k, part in enumerate(path) if isinstance(part, str)), len(path)) :] for path in paths]
    unnamed = sum(not path for path in named)
    numbers = iter(range(unnamed))
    return [
        ".".join(map(str, path)) if path else "output" if unnamed == 1 else f"output_{next(numbers)}" for path in named
    ]


def _whole(path: Path) -> str:
    joined = ".".join(map(str, path))
    return joined if path and isinstance(path[0], str) else f"output_{joined}"


def _paths(spec: Any) -> list[Path]:
    if spec.is_leaf():
        return [()]
    keys: Sequence[str | int] = keys_of(spec) or range(spec.num_children)
    below = zip(keys, spec.children(), strict=True)
    return [(key, *path) for key, child in below for path in _paths(child)]


def keys_of(spec: Any) -> list[str]:
    """Names of the children: a dict's keys, a class's fields; empty where they have none."""
    context = spec.context[1] if spec.type is defaultdict else spec.context
    fields = getattr(context, "_fields", None)  # of a namedtuple the context is the class
    if fields is None and hasattr(spec.type, "n_sequence_fields"):  # torch.return_types
        fields = spec.type.__match_args__
    return keys_in(context if fields is None else fields, spec.num_children)


def keys_in(context: Any, count: int) -> list[str]:
    """The names of so many children in what a class registered with torch says of an instance; empty where none are."""
    if isinstance(context, (list, tuple)) and len(context) == 2 and isinstance(context[0], list):
        context = context[0]  # of a registered dataclass: the fields that are set, and those that are None
    named = isinstance(context, (list, tuple)) and len(context) == count
    return [str(key) for key in context] if named else []


# -------------------------------------------------------------------------------- without classes


def make_plain(exported: torch.export.ExportedProgram) -> None:
    """Let a program take and return dicts, lists and tuples alone, so that a file of it is read without its classes."""
    entry = exported.module_call_graph[0]
    if entry.signature is None:
        return
    takes, returns = _plain(entry.signature.in_spec), _plain(entry.signature.out_spec)
    entry.signature = dataclasses.replace(entry.signature, in_spec=takes, out_spec=returns)
    if exported.example_inputs is not None:
        exported.example_inputs = pytree.tree_unflatten(pytree.tree_leaves(exported.example_inputs), takes)


def flat_calls(inputs: int, outputs: int) -> list[ModuleCallEntry]:
    """How a program is called that takes so many tensors in order and returns a tuple of so many."""
    takes = pytree.tree_structure(((None,) * inputs, {}))
    returns = pytree.tree_structure((None,) * outputs)
    return [ModuleCallEntry("", ModuleCallSignature(inputs=[], outputs=[], in_spec=takes, out_spec=returns))]


def _plain(spec: Any) -> Any:
    if spec.is_leaf():
        return spec
    children = [_plain(child) for child in spec.children()]
    if spec.type in (dict, list, tuple):
        return pytree.TreeSpec(spec.type, spec.context, children)
    keys = keys_of(spec)
    return pytree.TreeSpec(dict, keys, children) if keys else pytree.TreeSpec(tuple, None, children)


@contextlib.contextmanager
def wrapped_forward(
    module: torch.nn.Module, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within it, a module's `forward` is what the wrapper makes of it, under the same arguments."""
    if isinstance(module, torch.jit.ScriptModule):  # takes no other; torch.export says what it thinks of one
        yield
        return
    forward, own = module.forward, vars(module).get("forward")
    module.forward = functools.wraps(forward)(wrapper(forward))
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def returning_fields(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a dict in the place of each dataclass that torch does not know as a structure."""
    return lambda *args, **kwargs: _with_fields(forward(*args, **kwargs))


def _with_fields(value: Any) -> Any:
    def fields(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {field.name: _with_fields(getattr(leaf, field.name)) for field in dataclasses.fields(leaf)}

    return pytree.tree_map(fields, value)
