"""The demo's network: scikit-learn's digits through every form a tensorized layer comes in."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tltorch
import torch
from sklearn.datasets import load_digits
from torch import nn

Modes = tuple[int, ...]

PIXELS: Modes = (4, 4, 4)
WIDE: Modes = (8, 8, 16)
NARROW: Modes = (8, 8, 8)
LAST: Modes = (4, 8, 8)


class TTLinear(nn.Module):
    """A tensor-train matrix by hand: one einsum of the input and three cores, and a bias."""

    def __init__(self, inputs: Modes, outputs: Modes, rank: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.in_features, self.out_features = math.prod(inputs), math.prod(outputs)
        bonds = [1, rank, rank, 1]
        sites = zip(bonds, inputs, outputs, bonds[1:], strict=False)
        self.cores = nn.ParameterList(
            torch.randn(left, i, o, right) * (2 ** (1 / 3) / (i * left)) ** 0.5 for left, i, o, right in sites
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, *self.inputs)
        y = torch.einsum("zabc,padq,qber,rcfp->zdef", x, *self.cores)
        return y.reshape(-1, self.out_features) + self.bias


def tensorized(inputs: Modes, outputs: Modes, form: str, implementation: str, rank: float) -> nn.Module:
    """A layer of tensorly-torch whose initial weights keep the size of what flows through.

    A ``rank`` that is an int is the rank itself; a float is the share of the dense parameters.
    """
    layer = tltorch.FactorizedLinear(inputs, outputs, factorization=form, rank=rank, implementation=implementation)
    spread = (2 / math.prod(inputs)) ** 0.5
    with torch.no_grad():
        layer.weight.normal_(0, spread)
        factors = list(layer.weight.parameters())
        correction = (spread / float(layer.weight.to_matrix().std())) ** (1 / len(factors))
        for factor in factors:
            factor.mul_(correction)
        layer.bias.zero_()
    result: nn.Module = layer
    return result


@dataclass(frozen=True)
class Layer:
    """One row of the demo: what it is, and how to make a fresh one."""

    title: str
    make: Callable[[], nn.Module]


LAYERS: dict[str, Layer] = {
    "tucker_reconstructed": Layer(
        "Tucker, reconstructed", lambda: tensorized(PIXELS, WIDE, "tucker", "reconstructed", 0.2)
    ),
    "block_tt_factorized": Layer("block TT, factorized", lambda: tensorized(WIDE, WIDE, "blocktt", "factorized", 16)),
    "cp_factorized": Layer("CP, factorized", lambda: tensorized(WIDE, NARROW, "cp", "factorized", 64)),
    "tucker_factorized": Layer("Tucker, factorized", lambda: tensorized(NARROW, WIDE, "tucker", "factorized", 0.1)),
    "block_tt_reconstructed": Layer(
        "block TT, reconstructed", lambda: tensorized(WIDE, NARROW, "blocktt", "reconstructed", 16)
    ),
    "cp_reconstructed": Layer("CP, reconstructed", lambda: tensorized(NARROW, NARROW, "cp", "reconstructed", 32)),
    "tt_by_hand": Layer("TT by hand, one einsum", lambda: TTLinear(NARROW, NARROW, 16)),
    # Nothing nonlinear between these two: together they are one network.
    "pair": Layer(
        "block TT then Tucker, nothing between",
        lambda: nn.Sequential(
            tensorized(NARROW, WIDE, "blocktt", "factorized", 8),
            tensorized(WIDE, LAST, "tucker", "factorized", 0.05),
        ),
    ),
}


def linears(module: nn.Module) -> Iterator[Any]:
    """The tensorized layers inside a module, in order."""
    return (m for m in module.modules() if isinstance(m, (TTLinear, tltorch.FactorizedLinear)))


def features(layer: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a layer or a chain of layers."""
    parts = list(linears(layer))
    return int(parts[0].in_features), int(parts[-1].out_features)


def network() -> nn.Sequential:
    """Every layer of `LAYERS`, each with batch norm and relu behind it, and a dense head."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in LAYERS.items():
        parts[name] = layer.make()
        parts[f"{name}_norm"] = nn.BatchNorm1d(features(parts[name])[1])
        parts[f"{name}_relu"] = nn.ReLU()
    parts["head"] = nn.Linear(math.prod(LAST), 10)
    return nn.Sequential(parts)


def dense(module: nn.Module) -> nn.Module:
    """The same function with an `nn.Linear` for each tensorized layer."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(OrderedDict((n, dense(m)) for n, m in module.named_children()))
    if module not in list(linears(module)):
        return module
    inputs, outputs = features(module)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.bias.copy_(module(torch.zeros(1, inputs))[0])
        linear.weight.copy_((module(torch.eye(inputs)) - linear.bias).T)
    return linear


def parameters(module: nn.Module) -> int:
    """How many numbers a module stores."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Digits:
    """1797 handwritten digits of 8 by 8 pixels, a fifth of them held out."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @staticmethod
    def load() -> Digits:
        """Split with a fixed seed."""
        data = load_digits()
        x = torch.tensor(data.data / 16, dtype=torch.float32)
        y = torch.tensor(data.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held_out, kept = order[: len(x) // 5], order[len(x) // 5 :]
        return Digits(x[kept], y[kept], x[held_out], y[held_out])


def train(net: nn.Module, data: Digits, epochs: int = 20, batch: int = 64, rate: float = 0.02) -> Iterator[float]:
    """Train, yielding the loss of each epoch."""
    net.train()
    steps = len(data.train_x) // batch
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(data.train_x))[: steps * batch].split(batch):  # type: ignore[no-untyped-call]
            loss = nn.functional.cross_entropy(net(data.train_x[rows]), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        yield total / steps
    net.eval()
