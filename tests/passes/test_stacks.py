"""Stacks of slices."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tncompile.ir import Opaque
from tncompile.passes import Context, Pipeline
from tncompile.passes.stacks import SLICE, STACK, Stacks


class Pairs(nn.Module):
    """A chain of matrices, stacked anew and multiplied by neighbours until one is left, as TensorKrowch does it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.shape[0] > 1:
            parts = x.unbind(0)
            x = torch.stack(parts[::2]) @ torch.stack(parts[1::2])
        return x[0]


class Along(nn.Module):
    """Slices along one axis, stacked along others."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        columns = [x.select(1, k) for k in range(4)]
        whole, some = torch.stack(columns), torch.stack(columns[1:4], -1)
        backward, twice = torch.stack(columns[::-1], 1), torch.stack([columns[0], columns[0]])
        return whole * 2, some * 2, backward * 2, twice * 2


def compiled(module: nn.Module, x: torch.Tensor) -> tncompile.CompiledModel:
    return tncompile.compile(module, (x,), dynamic_shapes=None, batch=(1,))


def operators(model: tncompile.CompiledModel) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(model.onnx).graph.node]


def test_a_tree_of_pairs_has_slices_alone() -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = compiled(Pairs(), x)
    found = operators(model)
    assert not {"Concat", "Split", "Gather"} & {*found}
    assert found.count("MatMul") == 3
    assert found.count("Slice") == 6
    np.testing.assert_allclose(model.run(x), Pairs()(x.double()).numpy(), rtol=0, atol=1e-4)


def test_axes_and_steps() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    model = compiled(Along(), x)
    for found, expected in zip(model.run(x).values(), Along()(x), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    left = [n for n in model.stages["stacks"].nodes if isinstance(n, Opaque)]
    assert [n.target for n in left if n.target in (STACK, SLICE)] == [SLICE, STACK, STACK]  # backward and twice stay


@pytest.mark.parametrize("axis", [0, 1])
def test_every_axis_of_an_unbind(axis: int) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack(x.unbind(axis)[1:], axis).relu()

    x = torch.randn(3, 4, 5)
    model = compiled(Module(), x)
    assert "Concat" not in operators(model)
    np.testing.assert_array_equal(model.run(x), Module()(x).numpy())


def test_a_program_without_stacks_is_as_it_was() -> None:
    x = torch.randn(3, 4)
    program = compiled(nn.Linear(4, 2), x).traced.program
    after, reports = Pipeline((Stacks(),), scheduled=False).run(program, Context())
    assert after == program
    assert not reports[0].changes
