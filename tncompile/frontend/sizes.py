"""Dynamic sizes: which of them are one, and what the user calls them, which torch.export forgets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Place = tuple[int, int]
"""A leaf of the arguments, in the order of `forward`'s parameters, and one of its axes."""

SizeNames = Mapping[int, str]
"""What the axes of one input are called."""

_NAMES = "tncompile.sizes"


def named_sizes(exported: torch.export.ExportedProgram) -> Mapping[str, str]:
    """The names that a user gave to torch's symbols."""
    names: Mapping[str, str] = exported.graph_module.meta.get(_NAMES, {})
    return names


def name_sizes(exported: torch.export.ExportedProgram, names: Mapping[str, str]) -> None:
    """Remember the names of symbols, for `named_sizes` of this very program."""
    exported.graph_module.meta[_NAMES] = {symbol: name for symbol, name in names.items() if name.isidentifier()}


def symbols_of(exported: torch.export.ExportedProgram, names: Sequence[SizeNames | None]) -> dict[str, str]:
    """The symbols behind named axes of the inputs, in order; not where torch found one to follow from another."""
    found: dict[str, str] = {}
    for value, axes in zip(inputs_of(exported), names, strict=False):
        for axis, name in (axes or {}).items():
            symbol = symbol_at(value, axis)
            if symbol:
                found.setdefault(symbol, name)
    return found


def inputs_of(exported: torch.export.ExportedProgram) -> list[Any]:
    """What stands for each input of the user's while tracing, in the order of the arguments; tensors mostly."""
    values = {n.name: n.meta.get("val") for n in exported.graph_module.graph.nodes if n.op == "placeholder"}
    return [values.get(s.arg.name) for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]


def symbol_at(value: Any, axis: int) -> str:
    """The symbol that the size of an axis is; ``""`` for a number or an expression."""
    size = value.shape[axis] if isinstance(value, torch.Tensor) and axis < value.ndim else 0
    expression = None if isinstance(size, int) else size.node.expr
    return str(expression) if expression is not None and expression.is_Symbol else ""


# ------------------------------------------------------------------------------------- one size


def equal_first_modes(arguments: Mapping[str, Any]) -> list[list[Place]]:
    """First modes of tensors that have the same size in the example, two at least: they are one batch."""
    groups: dict[int, list[Place]] = {}
    for number, leaf in enumerate(pytree.tree_leaves(arguments)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] > 1:
            groups.setdefault(int(leaf.shape[0]), []).append((number, 0))
    return [places for places in groups.values() if len(places) > 1]


def equal_names(names: Sequence[SizeNames | None]) -> list[list[Place]]:
    """The places of each name that stands at two of them or more."""
    groups: dict[str, list[Place]] = {}
    for number, axes in enumerate(names):
        for axis, name in (axes or {}).items():
            groups.setdefault(name, []).append((number, axis))
    return [places for places in groups.values() if len(places) > 1]


def apart(exported: torch.export.ExportedProgram, groups: Sequence[Sequence[Place]]) -> bool:
    """Whether sizes that are one have several symbols."""
    inputs = inputs_of(exported)
    symbols = [{symbol_at(inputs[leaf], axis) for leaf, axis in group} - {""} for group in groups]
    return any(len(found) > 1 for found in symbols)


def requiring_equal(groups: Sequence[Sequence[Place]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper of `forward` that compares sizes first: torch.export then has one symbol for them."""

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        def compared(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves(dict(signature.bind(*args, **kwargs).arguments))
            for (first, axis), *others in groups:
                for leaf, other in others:
                    if leaves[leaf].shape[other] != leaves[first].shape[axis]:
                        raise ValueError(f"two sizes that are one: {leaves[leaf].shape} and {leaves[first].shape}")
            return forward(*args, **kwargs)

        return compared

    return wrapper


# ---------------------------------------------------------------------------------------- names


def names_in_shapes(arguments: Mapping[str, Any], shapes: Any) -> list[SizeNames | None]:
    """The names of `torch.export.Dim` for the axes of each leaf of the arguments, as `dynamic_shapes` has them."""
    if isinstance(shapes, (list, tuple)):
        shapes = dict(zip(arguments, shapes, strict=False))
    return [*_paired(arguments, shapes if isinstance(shapes, Mapping) else None)]


def _paired(value: Any, shapes: Any) -> Iterator[SizeNames | None]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _paired(part, shapes.get(key) if isinstance(shapes, Mapping) else None)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            has = isinstance(shapes, (list, tuple)) and place < len(shapes)
            yield from _paired(part, shapes[place] if has else None)
    else:
        yield _names(shapes) if isinstance(value, torch.Tensor) else None
        yield from (None for _ in pytree.tree_leaves(value)[1:])


def _names(axes: Any) -> SizeNames | None:
    if isinstance(axes, (list, tuple)):
        axes = dict(enumerate(axes))
    if not isinstance(axes, Mapping):
        return None
    return {axis: dim.__name__ for axis, dim in axes.items() if isinstance(dim, torch.export.Dim)}
