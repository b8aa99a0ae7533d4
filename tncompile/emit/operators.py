"""Opaque nodes as torch.fx has them: their operators and arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from tncompile.errors import UnsupportedError
from tncompile.ir import Arg, Constant, Ref


def fx_arg(arg: Arg, env: Mapping[str, torch.fx.Node]) -> Any:
    """An argument of an opaque node as torch.fx takes it; `env` has the node of each value."""
    if isinstance(arg, Ref):
        return env[arg.name]
    if isinstance(arg, Constant):
        return _constant(arg.spelling)
    return [fx_arg(a, env) for a in arg] if isinstance(arg, tuple) else arg


def _constant(spelling: str) -> Any:
    if spelling.startswith("torch.device("):
        return torch.device(spelling.removeprefix("torch.device('").removesuffix("')"))
    return getattr(torch, spelling.removeprefix("torch."))


def operator_of(name: str) -> Any:
    """The operator that an opaque node's target names. UnsupportedError for one that is no torch operator."""
    head, _, rest = name.partition(".")
    if head == "operator":
        for module in (operator, torch, math):
            if hasattr(module, rest):
                return getattr(module, rest)
        raise UnsupportedError(f"{rest} in the traced graph cannot be exported")
    packet, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, head), packet), overload)
