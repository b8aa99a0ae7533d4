"""What the steps of a loop have in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tncompile
from tests.helpers import assert_close, operators
from tncompile.ir import Network
from tncompile.passes import DEFAULT


class Unrolled(nn.Module):
    """A recurrent layer in a Python loop, whose input weight has two cores."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.first, self.second, self.back = nn.Linear(24, 3, bias=False), nn.Linear(3, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[1 - self.axis], 16, dtype=x.dtype)
        for step in x.unbind(self.axis):
            h = torch.tanh(self.second(self.first(step)) + self.back(h))
        return h


@pytest.mark.parametrize("axis", [0, 1])
def test_the_input_of_all_steps_is_projected_at_once(axis: int) -> None:
    torch.manual_seed(0)
    module = Unrolled(axis)
    shape = (5, 6, 24) if axis else (6, 5, 24)
    x = torch.randn(shape)
    batch = torch.export.Dim("batch")
    compiled = tncompile.compile(module, (x,), dynamic_shapes=({1 - axis: batch},), batch=(1, 8))
    assert_close(compiled.run(x), module.double()(x.double()).detach().numpy(), tolerance=1e-5)
    readers = [n for n in compiled.stages["steps"].nodes if isinstance(n, Network) and "x" in n.inputs]
    assert len(readers) == 1
    without = tncompile.compile(
        module.float(), (x,), passes=[p for p in DEFAULT if p.name() != "steps"], batch=(1, 8), check=False
    )
    assert products(compiled) < products(without)


def products(compiled: tncompile.CompiledModel) -> int:
    return sum(operator in ("MatMul", "Gemm") for operator in operators(compiled.onnx))


def test_slices_of_several_tensors_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x[0]).relu() + self.layer(y[1]).tanh()

    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    module = Two()
    compiled = tncompile.compile(module, (x, y), dynamic_shapes=None, batch=(1,))
    assert not any("_steps" in n.output.name for n in compiled.program.networks)
    assert_close(compiled.run(x, y), module.double()(x.double(), y.double()).detach().numpy(), tolerance=1e-5)
