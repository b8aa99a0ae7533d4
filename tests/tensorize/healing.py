"""Models with truncated weights, as healing gets them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from tncompile.frontend.trace import trace


class Factored(nn.Module):
    """A weight rebuilt from two factors of a rank: its truncated SVD."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        u, s, v = torch.linalg.svd(weight.detach().reshape(len(weight), -1), full_matrices=False)
        root = s[:rank].sqrt()
        self.left = nn.Parameter((u[:, :rank] * root).contiguous())
        self.right = nn.Parameter((root[:, None] * v[:rank]).contiguous())

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return torch.einsum("or,ri->oi", self.left, self.right).reshape(self.shape)


def truncated(module: nn.Module, rank: int, names: Sequence[str]) -> nn.Module:
    """A copy with some layers' weights as factors of a rank."""
    found = copy.deepcopy(module)
    for name in names:
        layer: Any = found.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", Factored(layer.weight, rank), unsafe=True)
    return found.eval()


def pair(
    module: nn.Module, rank: int, names: Sequence[str], *example: torch.Tensor
) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]:
    """The student and the teacher, exported."""
    return trace(truncated(module, rank, names), example), trace(module.eval(), example)


def feeds(count: int, samples: int, *shape: int, seed: int = 0, name: str = "x") -> list[dict[str, Any]]:
    """Inputs of a model, normal numbers with correlated features."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((shape[-1], shape[-1])) / shape[-1] ** 0.5
    return [{name: (generator.standard_normal((samples, *shape)) @ mixing).astype(np.float32)} for _ in range(count)]


class Mlp(nn.Module):
    """Three layers of 32 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Conv(nn.Module):
    """Convolutions with a batch norm, one of them in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)
        self.norm.running_mean = torch.randn(16) * 0.1
        self.norm.running_var = torch.rand(16) + 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = y + self.outer(torch.relu(self.inner(y)))
        return self.head(y.mean((2, 3)))


class Block(nn.Module):
    """A block of a transformer, norm first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(y), self.k(y), self.v(y)))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.behind(x))))


LINEARS = ("q", "k", "v", "o", "up", "down")


class Transformer(nn.Module):
    """Two blocks behind an embedding; a mask, made from the inputs alone, passes all of them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids != 0)[:, None, None, :]
        x = self.table(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


TRANSFORMER = [f"blocks.{number}.{name}" for number in range(2) for name in LINEARS]


def sentences(count: int, samples: int, length: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Ids, of which some at the end of each sentence are padding."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = generator.integers(1, 50, (samples, length))
        ids[:, -1] = 0
        found.append({"ids": ids})
    return found
