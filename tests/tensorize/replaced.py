"""Small models of every kind of weight, and replacements for their sites."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tncompile.decomp import CP, SVD, BlockTrain, Factorized, MatrixTrain, Ranks, Split, TensorTrain, Tucker, balanced
from tncompile.frontend.importer import TracedModel, import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Array
from tncompile.tensorizer.sites import Replacement, Site, composed, sites_of

EXACT = Ranks(larger=True)
"""Full ranks, although that is no gain."""


class Words(nn.Module):
    """A table that is also the head, attention projections, a convolution along the words, and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(120, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1, stride=2)
        self.query, self.key = nn.Linear(20, 24), nn.Linear(20, 24)
        self.head = nn.Linear(24, 120, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[batch, 8]`` ids -> ``[batch, 4, 120]``."""
        x = torch.relu(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        q = self.query(x).view(-1, 4, 3, 8).permute(0, 2, 1, 3)
        k = self.key(x).reshape(-1, 4, 3, 8).permute(0, 2, 1, 3)
        scores = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1)
        return self.head((scores @ k).permute(0, 2, 1, 3).flatten(2))  # type: ignore[no-any-return]


class Images(nn.Module):
    """Convolutions in two and three dimensions, one of 1 x 1, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, (3, 2), padding=1, dilation=2)
        self.two = nn.Conv2d(8, 12, 1)
        self.three = nn.Conv3d(1, 6, 3, padding=1, bias=False)
        self.fc = nn.Linear(6 * 12 * 4 * 6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, 3, 6, 6]`` -> ``[batch, 10]``."""
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.fc(torch.relu(self.three(x.unsqueeze(1))).flatten(1))  # type: ignore[no-any-return]


INPUTS: dict[type[nn.Module], Any] = {
    Words: lambda: torch.randint(0, 120, (3, 8), generator=torch.Generator().manual_seed(0)),
    Images: lambda: torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)),
}


@cache
def exported(kind: type[nn.Module]) -> torch.export.ExportedProgram:
    """The model, traced once."""
    torch.manual_seed(0)
    return trace(kind().eval(), (INPUTS[kind](),), None, "batch")


@cache
def imported(kind: type[nn.Module]) -> TracedModel:
    """The model as a program."""
    return import_exported(exported(kind))


@cache
def sites(kind: type[nn.Module]) -> dict[str, Site]:
    """Its sites by name."""
    return {site.name: site for site in sites_of(composed(imported(kind)), minimum=64)}


@cache
def exact_formats(kind: type[nn.Module], name: str) -> list[Factorized]:
    """A site's matrix in every format that suits it, exactly."""
    site = sites(kind)[name]
    matrix: Array = site.matrix
    rows, columns = matrix.shape
    ins = tuple(n for n in site.in_sizes if n > 1)
    modes = (balanced(rows, 2), balanced(columns, 2))
    found: list[Factorized] = [SVD.from_dense(matrix, ((rows,), (columns,)), EXACT)]
    found += [kind.from_dense(matrix, modes, EXACT) for kind in (TensorTrain, MatrixTrain, BlockTrain, Tucker)]
    if len(ins) > 1:
        kernel = (ins, (columns,))
        found += [kind.from_dense(matrix, kernel, EXACT) for kind in (TensorTrain, Split)]
        found += [Tucker.from_dense(matrix, kernel, EXACT, factored=(0, len(ins)))]
        found += [CP.from_dense(matrix, kernel, EXACT)] if matrix.size < 2000 else []
    return found


def low_rank(site: Site, rank: int) -> Replacement:
    """An SVD of a rank."""
    rows, columns = site.matrix.shape
    return Replacement(site, SVD.from_dense(site.matrix, ((rows,), (columns,)), Ranks(given=rank)))
