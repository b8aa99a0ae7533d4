"""Small models of every structure in `benchmarks.models`, from file to file by the command line, fixed and dynamic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tncompile
from tests.helpers import assert_close, session_of
from tncompile.cli import main

tltorch = pytest.importorskip("tltorch")

TOLERANCE = 5e-6
"""Of float32 against float64, relative to the largest number of the output."""

BATCH = 3
"""Of the example; 5 is what a dynamic batch is run at, which nothing was planned for."""


class Ring(nn.Module):
    """A linear layer 12 -> 10 by tensordots and permutes, as TedNet writes a tensor ring."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((2, 3, 2), (2, 4, 2), (2, 2, 2), (2, 5, 2))
        self.cores = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.cores
        inside, outside = torch.tensordot(a, b, ([2], [0])), torch.tensordot(c, d, ([2], [0]))
        weight = torch.tensordot(inside, outside, ([3, 0], [0, 3]))
        y = torch.tensordot(x.reshape(-1, 3, 4), weight, ([1, 2], [0, 1]))
        return y.reshape(x.shape[0], -1)


class Monarch(nn.Module):
    """Two block-diagonal products with a permutation between, as in Monarch matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = torch.bmm(x.reshape(-1, 3, 4).transpose(0, 1), self.first.transpose(1, 2))
        y = torch.bmm(blocks.permute(2, 1, 0), self.second.transpose(1, 2))
        return y.permute(1, 2, 0).reshape(-1, 12)


class States(nn.Module):
    """A matrix product state over five sites whose library reads sizes as numbers, as quimb's does."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ParameterList(nn.Parameter(torch.randn(3, 2, 3) / 2) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.stack([x.cos(), x.sin()], -1)
        batch, sites, _ = map(int, features.shape)
        state = torch.ones(batch, 3, dtype=x.dtype)
        for k in range(sites):
            matrices = torch.tensordot(features[:, k], self.sites[k], ([1], [1]))
            state = torch.bmm(state.reshape(batch, 1, 3), matrices).reshape(batch, 3)
        return state


class Patterns(nn.Module):
    """A convolution as an einsum over index patterns, as einconv writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis, kernel, out = torch.arange(8)[:, None, None], torch.arange(3)[:, None], torch.arange(8)
        pattern = (axis == out + kernel - 1).to(x.dtype)
        return torch.einsum("ncij,ikp,jlq,ockl->nopq", x, pattern, pattern, self.weight)


class Steps(nn.Module):
    """An LSTM of two cells by hand with a factorized projection."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 16))
        self.hidden = nn.Linear(4, 16)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for step in x.unbind(1):
            gates = step @ self.left @ self.right + self.hidden(h)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


def factorized(form: str, implementation: str) -> nn.Module:
    layer = tltorch.FactorizedLinear((3, 4), (2, 5), factorization=form, rank=2, implementation=implementation)
    return filled(layer)


def convolution(form: str, implementation: str) -> nn.Module:
    dense = nn.Conv2d(4, 6, 3, padding=1)
    return filled(
        tltorch.FactorizedConv.from_conv(
            dense, rank=0.5, factorization=form, implementation=implementation, decompose_weights=False
        )
    )


def embedding(form: str) -> nn.Module:
    return filled(tltorch.FactorizedEmbedding(24, 12, factorization=form, rank=3, n_tensorized_modes=2))


def contraction() -> nn.Module:
    layer = filled(tltorch.TCL((4, 3, 3), rank=(3, 2, 2), bias=False))
    head = filled(tltorch.TRL((3, 2, 2), (5,), factorization="tucker", rank=0.5, bias=True))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), layer, head)


def filled(layer: Any) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    assert isinstance(layer, nn.Module)
    return layer


Made = Callable[[], nn.Module]
MODELS: dict[str, tuple[Made, tuple[int, ...] | None]] = {
    "cp_factorized": (lambda: factorized("cp", "factorized"), (12,)),
    "conv_tucker": (lambda: convolution("tucker", "factorized"), (4, 6, 6)),
    "embedding_blocktt": (lambda: embedding("blocktt"), None),
    "contraction": (contraction, (1, 8, 8)),
    "ring": (Ring, (12,)),
    "monarch": (Monarch, (12,)),
    "states": (States, (5,)),
    "patterns": (Patterns, (2, 8, 8)),
    "steps": (Steps, (3, 6)),
}


def inputs(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    shape = MODELS[name][1]
    if shape is None:
        return (torch.randint(0, 24, (batch, 5), generator=generator),)
    x = torch.randn((batch, *shape), generator=generator)
    return (x, *(torch.randn(batch, 4, generator=generator) for _ in range(2))) if name == "steps" else (x,)


@pytest.mark.filterwarnings("ignore::tncompile.errors.TNCompileWarning")
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, True) for name in MODELS), *((name, False) for name in ("states", "ring"))],
)
def test_from_file_to_file(name: str, dynamic: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = MODELS[name][0]().eval()
    path, output, report = tmp_path / "model", tmp_path / "out.onnx", tmp_path / "report.json"
    tncompile.save(module, inputs(name, BATCH), path, dynamic_shapes="batch" if dynamic else None)
    assert main([str(path), "-o", str(output), "--batch", "1,4", "--report", str(report), "-q"]) == 0
    assert main(["verify", str(path), str(output), "--batch", "1,4"]) == 0
    assert "passed" in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert told["dynamic"] == dynamic and told["networks"] and told["check"]["passed"]
    session = session_of(output.read_bytes())
    for batch in (1, 5) if dynamic else (BATCH,):
        given = inputs(name, batch)
        (found,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)})
        if name.startswith("embedding"):  # its own forward indexes by NumPy, in its own dtype
            expected = module(*given).detach().double()
        else:
            expected = MODELS[name][0]().eval().requires_grad_(False)
            expected.load_state_dict(module.state_dict())
            expected = expected.double()(*(x.double() for x in given))
        assert_close(found, np.asarray(expected), tolerance=TOLERANCE, what=f"{name} at batch {batch}")
