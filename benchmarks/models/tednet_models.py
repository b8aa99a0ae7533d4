"""Networks of TedNet."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.models import Loaded
from benchmarks.models.inputs import digits


def _network(module: str, name: str, *arguments: Any) -> Any:
    return getattr(import_module(f"tednet.tnn.{module}"), name)(*arguments)


def lenet5(module: str, network: str) -> Loaded:
    """LeNet-5 of one format, all ranks 6."""
    model = _network(module, network, 10, [6, 6, 6, 6])
    if module == "cp":  # as it comes, its outputs are far below what float32 resolves beside a bias
        _even_out(model)
    return Loaded(model, (digits(8, 28),))


def _even_out(model: nn.Module) -> None:
    """Give every factor the spread of its size, so that no layer shrinks what flows through it by orders."""
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "bias" not in name:
                factor.normal_(0, factor.shape[-1] ** -0.5)


def resnet20() -> Loaded:
    """ResNet-20 for 32 x 32 images, tensor trains of rank 7."""
    return Loaded(_network("tensor_train", "TTResNet20", [7] * 7, 10), (torch.randn(2, 3, 32, 32),))


class _Classifier(nn.Module):
    """A recurrent layer over steps x batch x features, and a head on its last output."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(256, 11)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.recurrent(x, (hidden, cell))
        result: torch.Tensor = self.head(outputs[-1])
        return result


def _lstm(recurrent: Any) -> Loaded:
    projection = recurrent.cell.weight_ih
    if hasattr(projection, "reset_parameters"):  # 0.1.3 leaves its factors as memory was
        projection.reset_parameters()
    state = torch.zeros(4, 256)
    batch = torch.export.Dim("batch")
    inputs = (torch.randn(6, 4, 2048), state, state.clone())
    return Loaded(_Classifier(recurrent), inputs, None, dynamic=({1: batch}, {0: batch}, {0: batch}))


def ring_lstm() -> Loaded:
    """Six steps of an LSTM 2048 -> 256 whose input weights are a tensor ring of rank 5."""
    return _lstm(_network("tensor_ring", "TRLSTM", [4, 8, 8, 8], [8, 8, 4], [5] * 7))


def tucker_lstm() -> Loaded:
    """Six steps of an LSTM 2048 -> 256 whose input weights are Tucker-2 of ranks 8."""
    return _lstm(_network("tucker2", "TK2LSTM", [8, 16, 16], 256, [8, 8]))
