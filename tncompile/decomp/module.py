"""A factorization as a PyTorch module, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from tncompile.decomp.base import Factorized, connected, group_names
from tncompile.decomp.permutation import Permutation
from tncompile.errors import TNCompileError
from tncompile.ir import Array

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class FactorizedModule(torch.nn.Module):
    """The cores as parameters, called as in the format; a matrix is a linear layer, any other tensor is computed as
    it is.

    ``forward(x[..., in])`` contracts the input with one core after the other, and never the cores alone; without a
    matrix, ``forward()`` is the dense tensor. Each step is an einsum of two operands, so that tracing is the same
    with and without opt_einsum. `bias` and `permutation` are those of the whole layer.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        factorized: Factorized,
        dtype: str = "float32",
        bias: Array | None = None,
        permutation: Permutation | None = None,
    ) -> None:
        super().__init__()
        linear = len(factorized.axes) == 2
        if not linear and (bias is not None or permutation is not None):
            raise TNCompileError(f"a tensor of shape {factorized.shape} is no layer: it has no bias and no permutation")
        self.kind = type(factorized)
        # All fields that say what the format is, without the numbers.
        self.options = {
            f.name: getattr(factorized, f.name) for f in fields(factorized) if f.name not in ("cores", "bound", "notes")
        }
        self.axes = factorized.axes
        self.core_names = factorized.core_names
        self.dtype = dtype
        kind = getattr(torch, dtype)
        for name, core in zip(self.core_names, factorized.cores, strict=True):
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(core.copy()).to(kind)))
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(torch.tensor(bias, dtype=kind)))
        moves = permutation is not None and not permutation.is_identity
        rows = torch.from_numpy(np.ascontiguousarray(permutation.rows)) if moves and permutation else None
        columns = torch.from_numpy(np.argsort(permutation.columns)) if moves and permutation else None
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.steps = _steps(factorized, linear)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """``y[..., out]`` for ``x[..., in]``; the dense tensor where it is no matrix."""
        if len(self.axes) != 2:
            return self._contract(None).reshape([int(np.prod(axis)) for axis in self.axes])
        if x is None:
            raise TypeError("a linear layer needs an input")
        lead = x.shape[:-1]
        if self.rows is not None:
            x = x.index_select(-1, self.rows)
        y = self._contract(x.reshape(-1, *self.axes[0]))
        y = y.reshape(*lead, int(np.prod(self.axes[1])))
        if self.columns is not None:
            y = y.index_select(-1, self.columns)
        return y if self.bias is None else y + self.bias

    def _contract(self, value: torch.Tensor | None) -> torch.Tensor:
        for name, equation in self.steps:
            core = getattr(self, name)
            value = torch.einsum(equation, core) if value is None else torch.einsum(equation, value, core)
        assert value is not None
        return value

    def factorized(self) -> Factorized:
        """The format object with the parameters as they are now; the bound is not known any more."""
        cores = tuple(getattr(self, name).detach().cpu().double().numpy() for name in self.core_names)
        return self.kind(cores, **self.options)

    @property
    def permutation(self) -> Permutation | None:
        """The permutation of the layer's matrix, None where nothing moves."""
        if self.rows is None or self.columns is None:
            return None
        return Permutation(self.rows.cpu().numpy(), np.argsort(self.columns.cpu().numpy()))

    def with_cores(self, factorized: Factorized) -> FactorizedModule:
        """The same layer, with its bias and permutation, over other cores."""
        bias = None if self.bias is None else self.bias.detach().cpu().double().numpy()
        device = next(self.parameters()).device
        return FactorizedModule(factorized, self.dtype, bias, self.permutation).train(self.training).to(device)

    def extra_repr(self) -> str:
        """Sizes, for printing the model."""
        return f"{self.kind.KIND}, axes={self.axes}, parameters={sum(p.numel() for p in self.parameters())}"


def _steps(factorized: Factorized, linear: bool) -> tuple[tuple[str, str], ...]:
    """For each core, in the order of contraction, its name and the equation that takes it in."""
    labels = factorized.labels
    inputs = group_names(factorized.axes, 0) if linear else ()
    output = [n for n in factorized.modes if n not in inputs]
    order = connected(labels, inputs)
    now: list[str] = ["batch", *inputs] if linear else []
    steps = []
    for place, k in enumerate(order):
        later = {n for other in order[place + 1 :] for n in labels[other]}
        both = dict.fromkeys((*now, *labels[k]))
        kept = [n for n in both if n == "batch" or n in later or n in output]
        if place == len(order) - 1:
            kept = (["batch"] if linear else []) + output
        steps.append((factorized.core_names[k], _equation(now, labels[k], kept, first=place == 0 and not linear)))
        now = kept
    return tuple(steps)


def _equation(left: Sequence[str], right: Sequence[str], result: Sequence[str], first: bool) -> str:
    names = dict.fromkeys((*left, *right))
    if len(names) > len(LETTERS):
        raise TNCompileError(
            f"{len(names)} modes and bonds meet in one step, more than an einsum can name: use fewer modes"
        )
    letter: dict[str, Any] = dict(zip(names, LETTERS, strict=False))

    def spell(part: Sequence[str]) -> str:
        return "".join(letter[n] for n in part)

    return f"{spell(right)}->{spell(result)}" if first else f"{spell(left)},{spell(right)}->{spell(result)}"
