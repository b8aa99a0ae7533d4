"""What a translator of an ATen operation is, and what it may ask about its node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tncompile.frontend import equation as algebra
from tncompile.frontend.equation import Label, NotMultilinear

Product = algebra.Product[torch.fx.Node]
Equation = algebra.Equation[torch.fx.Node]
Reshape = algebra.Reshape[torch.fx.Node]
Translation = Equation | Reshape
Translator = Callable[..., Translation]
T = TypeVar("T", bound=Translator)
TRANSLATORS: dict[str, Translator] = {}

# evaluates a node that depends on weights alone
Constant = Callable[[torch.fx.Node], torch.Tensor]


def operator_name(node: torch.fx.Node) -> str:
    """``"aten.relu"`` for ``aten.relu.default``, ``"operator.getitem"`` for a Python operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return f"operator.{getattr(target, '__name__', target)}"


@dataclass(frozen=True)
class Context:
    """What a translator may ask about its node."""

    node: torch.fx.Node
    constant: Constant
    is_constant: Callable[[Any], bool]


def register(*names: str) -> Callable[[T], T]:
    """Make a function the translator of some operations: ``"linear"`` of aten.linear, whatever the overload."""

    def add(function: T) -> T:
        for name in names:
            TRANSLATORS[f"aten.{name}"] = function
        return function

    return add


def shape_of(node: torch.fx.Node) -> torch.Size:
    """The (possibly symbolic) shape of a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise NotMultilinear(f"{node.name} is not a tensor")
    return value.shape


def rank_of(node: Any) -> int:
    """The number of a tensor's axes. NotMultilinear where it is none."""
    if not isinstance(node, torch.fx.Node):
        raise NotMultilinear("a tensor was expected")
    return len(shape_of(node))


def axis_of(dim: int, rank: int) -> int:
    """An axis counted from the front."""
    return dim + rank if dim < 0 else dim


def elementwise(node: torch.fx.Node, rank: int) -> list[Label]:
    """Labels that align the axes of a tensor to the right, as broadcasting does."""
    return algebra.broadcast(rank_of(node), rank)
