"""Which weights of a model can be tensorized, and which of their axes are contracted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tncompile.decomp import SVD, MatrixTrain, Ranks
from tncompile.errors import TNCompileError
from tncompile.frontend.importer import import_exported
from tncompile.frontend.onnx.importer import import_onnx
from tncompile.frontend.trace import trace
from tncompile.tensorizer.sites import Replacement, Site, composed, joint_sites, sites_of


def found(module: nn.Module, *inputs: torch.Tensor) -> dict[str, Site]:
    traced = import_exported(trace(module.eval(), inputs))
    return {site.name: site for site in sites_of(composed(traced), minimum=64)}


def test_linear_and_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 12, (3, 5), padding=1)
            self.norm = nn.BatchNorm2d(12)
            self.line = nn.Conv1d(12, 16, 3)
            self.fc = nn.Linear(16, 20)
            self.tiny = nn.Linear(20, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.conv(x))).mean(2)
            return self.tiny(torch.relu(self.fc(torch.relu(self.line(x)).mean(2))))

    sites = found(Net(), torch.randn(2, 8, 9, 9))
    assert {n: (s.in_sizes, s.out_sizes) for n, s in sites.items()} == {
        "conv.weight": ((8, 3, 5), (12,)),
        "line.weight": ((12, 3), (16,)),
        "fc.weight": ((16,), (20,)),
    }


def test_matrix_is_the_layer_and_comes_back() -> None:
    layer = nn.Conv2d(8, 12, 3, bias=False)
    (site,) = found(layer, torch.randn(1, 8, 6, 6)).values()
    weight = layer.weight.detach().numpy()
    np.testing.assert_array_equal(site.matrix, weight.transpose(1, 2, 3, 0).reshape(72, 12))
    np.testing.assert_array_equal(site.parts[0].restored(site.matrix), weight)


def test_tables_and_tied_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)
            self.fc = nn.Linear(16, 16, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.fc(self.table(ids)))
            return torch.relu(x) @ self.fc.weight.T

    sites = found(Net(), torch.randint(0, 50, (2, 7)))
    assert sites["table.weight"].parts[0].gathered
    assert (sites["table.weight"].in_sizes, sites["table.weight"].out_sizes) == ((50,), (16,))
    assert len(sites["fc.weight"].parts[0].uses) == 2


def test_a_weight_used_in_two_ways_is_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 24, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.relu(self.fc(x)) @ self.fc.weight
            return y

    assert found(Net(), torch.randn(2, 16)) == {}


def test_layers_without_anything_between_are_sites_of_their_own() -> None:
    sites = found(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 24)), torch.randn(2, 16))
    assert {n: (s.in_sizes, s.out_sizes) for n, s in sites.items()} == {
        "0.weight": ((16,), (8,)),
        "1.weight": ((8,), (24,)),
    }


def test_queries_keys_and_values_together() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
            y: torch.Tensor = scores @ self.v(x)
            return y

    sites = found(Net(), torch.randn(2, 5, 16))
    (joint,) = joint_sites(tuple(sites.values()))
    assert joint.name == "q.weight+k.weight+v.weight"
    assert joint.matrix.shape == (16, 56)
    svd = SVD.from_dense(joint.matrix, ranks=Ranks(larger=True))
    for name, dense in Replacement(joint, svd).dense().items():
        np.testing.assert_allclose(dense, sites[name].parts[0].array, atol=1e-6)
    train = MatrixTrain.from_dense(joint.matrix, ((4, 4), (7, 8)), Ranks(larger=True))
    with pytest.raises(TNCompileError, match="SVD only"):
        Replacement(joint, train)


def test_onnx_models_have_the_same_sites(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    torch.onnx.export(module, (torch.randn(2, 16),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    sites = sites_of(composed(import_onnx(tmp_path / "model.onnx")), minimum=64)
    assert [(s.in_sizes, s.out_sizes) for s in sites] == [((16,), (24,)), ((24,), (8,))]


def test_wrong_shapes_are_refused() -> None:
    (site,) = found(nn.Linear(16, 24), torch.randn(2, 16)).values()
    with pytest.raises(TNCompileError, match="16 x 24"):
        Replacement(site, SVD.from_dense(np.ones((24, 16)), ranks=Ranks(1)))
