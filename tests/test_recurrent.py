"""Recurrent layers: one ONNX operator where there is one, else unrolled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tncompile
from tests.helpers import assert_close, operators


class First(nn.Module):
    """The sequence of outputs of a recurrent layer, without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True), "LSTM"),
        (nn.GRU(6, 4, bidirectional=True, batch_first=True), "GRU"),
        (nn.LSTM(6, 4, proj_size=3, batch_first=True, bidirectional=True), "Tanh"),
        (nn.RNN(6, 4, nonlinearity="relu", batch_first=True, bias=False), "Relu"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_layer_runs_at_any_batch(layer: nn.Module, operator: str) -> None:
    module = First(layer).eval()
    compiled = tncompile.compile(module, (torch.randn(3, 5, 6),), batch=(1, 7))
    assert operator in operators(compiled.onnx)
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = module.double()(x.double()).detach().numpy()
    module.float()
    assert_close(compiled.run(x), expected, tolerance=1e-5)


class Product(nn.Module):
    """A weight of two cores."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.a @ self.b


def test_weights_that_are_computed_from_cores_are_folded() -> None:
    layer = nn.LSTM(6, 4, batch_first=True)
    parametrize.register_parametrization(layer, "weight_ih_l0", Product(16, 6), unsafe=True)
    module = First(layer).eval()
    compiled = tncompile.compile(module, (torch.randn(3, 5, 6),), batch=(1, 7))
    found = operators(compiled.onnx)
    assert "LSTM" in found
    assert "MatMul" not in found
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert_close(compiled.run(x), module.double()(x.double()).detach().numpy(), tolerance=1e-5)
