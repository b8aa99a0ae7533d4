"""Layers of tensorly-torch, alone and in small networks."""

from __future__ import annotations

import math
from typing import Any

import tltorch
import torch
from torch import nn

from benchmarks.models import Loaded
from benchmarks.models.inputs import digits

Modes = tuple[int, ...]


def spread(weight: Any, std: float) -> None:
    """Fill a factorized tensor with numbers such that the whole it stands for has this standard deviation.

    The numbers come from the factors alone: the model must not run before it is traced.
    """
    with torch.no_grad():
        weight.normal_(0, std)
        whole = weight.to_matrix() if hasattr(weight, "to_matrix") else weight.to_tensor()
        factors = list(weight.parameters())
        correction = (std / float(whole.std())) ** (1 / len(factors))
        for factor in factors:
            factor.mul_(correction)


def _biased(layer: Any) -> nn.Module:
    with torch.no_grad():
        layer.bias.normal_(0, 0.1)
    assert isinstance(layer, nn.Module)
    return layer


def _block_tt(inputs: Modes, outputs: Modes) -> nn.Module:
    layer = tltorch.FactorizedLinear(inputs, outputs, factorization="blocktt", rank=16, implementation="factorized")
    spread(layer.weight, (2 / math.prod(inputs)) ** 0.5)
    return _biased(layer)


def linear(form: str, implementation: str) -> Loaded:
    """768 -> 512 in three modes each, a twentieth of the parameters."""
    layer = tltorch.FactorizedLinear(
        (8, 8, 12), (8, 8, 8), factorization=form, rank=0.05, implementation=implementation
    )
    spread(layer.weight, 768**-0.5)
    return Loaded(_biased(layer), (torch.randn(8, 768),))


def convolution(form: str, implementation: str) -> Loaded:
    """64 -> 128 channels, 3x3, a tenth of the parameters."""
    dense = nn.Conv2d(64, 128, 3, padding=1)
    layer = tltorch.FactorizedConv.from_conv(
        dense, rank=0.1, factorization=form, implementation=implementation, decompose_weights=False
    )
    spread(layer.weight, (64 * 9) ** -0.5)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
    return Loaded(layer, (torch.randn(4, 64, 16, 16),))


def embedding(form: str) -> Loaded:
    """8000 rows of 256 in three modes."""
    layer = tltorch.FactorizedEmbedding(
        8000, 256, factorization=form, rank=5 if form == "tucker" else 16, n_tensorized_modes=3
    )
    spread(layer.weight, 1.0)
    return Loaded(layer, (torch.randint(0, 8000, (4, 32)),))


def _features() -> list[nn.Module]:
    """Two convolutions: 1 x 28 x 28 -> 32 x 7 x 7."""
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    return [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)]


def regression_cnn(form: str) -> Loaded:
    """A small CNN whose head is a tensor regression layer, 32 x 7 x 7 -> 10."""
    head = tltorch.TRL((32, 7, 7), (10,), factorization=form, rank=0.2, bias=True)
    with torch.no_grad():
        head.weight.normal_(0, 0.03)
    return Loaded(nn.Sequential(*_features(), _biased(head)), (digits(8, 28),))


def contraction_cnn() -> Loaded:
    """A small CNN with a tensor contraction layer, 32 x 7 x 7 -> 16 x 4 x 4, before its head."""
    layer = tltorch.TCL((32, 7, 7), rank=(16, 4, 4), bias=False)  # 0.5.0 fails to make one with a bias
    with torch.no_grad():
        for factor in layer.parameters():
            factor.normal_(0, 0.2)
    return Loaded(nn.Sequential(*_features(), layer, nn.Flatten(), nn.Linear(256, 10)), (digits(8, 28),))


def block_tt_mlp() -> Loaded:
    """784 -> 1024 -> 1024 -> 256 -> 10 of block TT layers, with nothing nonlinear between the first two."""
    wide: Modes = (8, 8, 16)
    layers = [_block_tt((4, 7, 28), wide), _block_tt(wide, wide), nn.ReLU(), _block_tt(wide, (4, 8, 8)), nn.ReLU()]
    return Loaded(nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, 10)), (digits(8, 28),))
