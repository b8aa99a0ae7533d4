"""A batch that code reads as a number: dynamic where traces at three sizes tell how, told where it stays fixed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tncompile.compiler import import_file
from tncompile.errors import TNCompileWarning
from tncompile.frontend.files.inputs import parse_input
from tncompile.frontend.importer import import_exported
from tncompile.frontend.load import LoadOptions
from tncompile.frontend.trace import trace


class Model(nn.Module):
    """A linear layer, and what a function makes of it and of the batch as a number."""

    def __init__(self, function: Callable[[torch.Tensor, int], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 6)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return self.function(y, int(y.shape[0]))


RECOVERED: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "a reshape": lambda y, n: y.reshape(n, 2, 3),
    "a multiple": lambda y, n: y.reshape(3 * n, 2),
    "less than the batch": lambda y, n: y[: n - 1],
    "a tensor of that size": lambda y, n: torch.zeros(n, 1) + y,
    "a quotient": lambda y, n: y.sum(0) / n,
    "several results": lambda y, n: {"left": y.reshape(n, 6, 1), "right": (y.relu(), y.view(n, 3, 2))},
}


@pytest.mark.parametrize("name", RECOVERED)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_batch_is_dynamic_again(name: str, batch: int) -> None:
    module = Model(RECOVERED[name]).eval()
    with pytest.warns(TNCompileWarning, match=r"plain number at \S+test_retrace.py:\d+ .*int\(y.shape\[0\]\)"):
        exported = trace(module, (torch.randn(batch, 4),))
    for size in (3, 7):
        x = torch.randn(size, 4)
        found, expected = exported.module()(x), module(x)
        leaves = torch.utils._pytree.tree_leaves
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            np.testing.assert_allclose(a.detach(), b.detach(), rtol=0, atol=1e-6)


FIXED: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "a square": lambda y, n: torch.zeros(n * n) + y.sum(),
    "a loop": lambda y, n: torch.stack([y[k] * k for k in range(n)]),
    "a branch": lambda y, n: y.relu() if n % 2 else y.exp(),
    "a constant": lambda y, n: y * torch.tensor([[float(k)] for k in range(n)]),
    "a float": lambda y, n: y * n**-0.5,
}


@pytest.mark.parametrize("name", FIXED)
def test_what_follows_the_batch_in_another_way_stays_fixed(name: str) -> None:
    with pytest.warns(TNCompileWarning, match=r"fixes the batch to the example's at \S+test_retrace.py"):
        exported = trace(Model(FIXED[name]).eval(), (torch.randn(4, 4),))
    assert not exported.range_constraints


def test_inputs_names_layers_and_lines_are_kept() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Model(lambda y, n: y.reshape(n, 2, 3))
            self.scale = nn.Parameter(torch.ones(5, 1, 1))

        def forward(self, image: torch.Tensor, *, weights: torch.Tensor, scale: torch.Tensor) -> Any:
            return {"result": self.part(image)[:, None] * weights[..., None, None] * scale}

    inputs = {"weights": torch.randn(3, 5), "scale": torch.randn(5, 1, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TNCompileWarning)
        exported = trace(Two().eval(), (torch.randn(3, 4),), inputs)
    program = import_exported(exported).program
    assert [(v.name, v.shape) for v in program.inputs] == [
        ("image", ("batch", 4)),
        ("weights", ("batch", 5)),
        ("scale", (5, 1, 1)),
    ]
    assert program.outputs[0][0] == "result"
    linear = next(n for n in program.networks if n.name == "part.layer")
    assert "int" not in linear.source.code and "self.layer(x)" in linear.source.code
    assert {c.name for c in linear.cores} == {"part.layer.weight", "part.layer.bias"}


def test_files_that_need_their_inputs_described(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Reshaped(), path)
    loading = LoadOptions((parse_input("float32[batch,6]"),), trust_pickle=True)
    with pytest.warns(TNCompileWarning, match="dynamic all the same") as told:
        traced = import_file(path, loading)
    assert [v.shape for v in traced.program.inputs] == [("batch", 6)]
    assert sum("batch" in str(w.message) for w in told) == 1


class Reshaped(nn.Module):
    """What a pickle can hold: a class of this file."""

    def forward(self, x: torch.Tensor) -> Any:
        return x.reshape(int(x.shape[0]), 2, 3).relu()
