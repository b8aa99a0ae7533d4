"""Layers over three dimensions that torch's exporter has no word for, from modules and from traces."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tncompile.frontend.files.inputs import parse_input
from tncompile.ir import Network

X = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(2, 3, 5), (3, 4, 2)])  # windows of one size, and of several
def test_adaptive_pooling(size: tuple[int, int, int]) -> None:
    pool = nn.AdaptiveAvgPool3d(size)
    compiled = tncompile.compile(pool, (X,))
    np.testing.assert_allclose(compiled.run(X), pool(X).numpy(), atol=1e-6)


def test_convolutions_of_a_trace(tmp_path: Path) -> None:
    """A trace writes every convolution, transposed ones too, as the operator that has them all."""
    module = nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, stride=2)).eval()
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.trace(module, (X,)), path)
    loading = tncompile.LoadOptions((parse_input("x:float32[batch,3,4,6,5]"),))
    compiled = tncompile.compile_file(path, loading=loading)
    with torch.no_grad():
        np.testing.assert_allclose(compiled.run(X), module(X).numpy(), atol=1e-5)
    assert any(isinstance(n, Network) and n.cores for n in compiled.program.nodes)


@pytest.mark.parametrize("axes", [5, 3, 2])
def test_small_kernels_of_a_volume_are_not_one_for_each_channel(axes: int) -> None:
    """ONNX Runtime has no kernel for those of three axes: a small dense one, or one axis after the other, is faster."""
    kernels = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
    module = nn.Sequential(
        nn.Conv3d(4, 24, 1, bias=False),
        *(nn.Conv3d(24, 24, kernel, groups=24, bias=False) for kernel in kernels),
        nn.Conv3d(24, 8, 1, bias=False),
        *([nn.Flatten(axes - 1)] if axes < 5 else []),
    ).eval()
    x = torch.randn(2, 4, 8, 8, 8)
    compiled = tncompile.compile(module, (x,), profile="default")
    written = [tuple(i.dims) for i in onnx.load_model_from_string(compiled.onnx).graph.initializer if len(i.dims) == 5]
    assert written and not any(dims[1] == 1 and math.prod(dims[2:]) == 27 for dims in written)
    with torch.no_grad():
        np.testing.assert_allclose(compiled.run(x), module(x).numpy(), atol=1e-5)
