from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tensorize.small import as_onnx, imported, mlp, nn
from tncompile.decomp import SVD, Metric, Ranks
from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.tensorizer import moments as module_of_moments
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.moments import Moments, crosses, moments
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sites import composed, joint_sites, separate, sites_of
from tncompile.tensorizer.upstream import Upstream

TOLERANCE = 2e-5
"""Relative to the largest moment: products of float32 numbers, summed in float32 for each run."""


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


def second(rows: torch.Tensor) -> np.ndarray:
    flat = rows.detach().double().reshape(-1, rows.shape[-1])
    return (flat.T @ flat / len(flat)).numpy()


@pytest.mark.parametrize("load", [imported, as_onnx])
def test_of_linear_layers(load: Callable[..., ImportedModel]) -> None:
    module, x = mlp(), torch.randn(100, 48) + 0.5
    model = load(module, x[:4])
    sites = sites_of(composed(model), minimum=100)
    assert len(sites) == 3
    found = moments(sites, Runner(model), collect(x, model))
    for layer in (0, 2, 4):
        rows = module[:layer](x)
        one = found[f"{layer}.weight"]
        close(one.matrix, second(rows))
        close(one.mean, rows.double().mean(0).detach().numpy())
        assert one.rows == 100 and one.exact


class Conv(nn.Module):
    def __init__(self, dimensions: int, groups: int, kernel: int, stride: int, dilation: int, padding: int) -> None:
        super().__init__()
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv = make(4, 6, kernel, stride, padding, dilation, groups)
        self.scale = nn.BatchNorm3d(4) if dimensions == 3 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@settings(max_examples=8, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    size=st.integers(6, 8),
)
def test_of_convolutions(
    dimensions: int, groups: int, kernel: int, stride: int, dilation: int, padding: int, size: int
) -> None:
    torch.manual_seed(0)
    module = Conv(dimensions, groups, kernel, stride, dilation, padding)
    x = torch.randn(3, 4, *[size + k for k in range(dimensions)])
    model = imported(module, x)
    sites = sites_of(composed(model), minimum=1)
    found = moments(sites, Runner(model), collect(x, model))["conv.weight"]
    padded = torch.nn.functional.pad(x, [padding] * 2 * dimensions)
    for axis in range(dimensions):
        padded = padded.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)
    patches = padded[(..., *[slice(None, None, dilation)] * dimensions)]  # [b, c, out..., kernel...]
    patches = patches.movedim(1, 1 + dimensions)  # [b, out..., c, kernel...]
    rows = patches.reshape(*patches.shape[: 1 + dimensions], groups, -1)
    close(found.matrix, second(rows))
    assert found.shared == (groups > 1)


def test_reads_past_a_scale_and_includes_biases() -> None:
    """Between two layers without anything nonlinear the second one's input has the first one's bias."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 40, bias=False), nn.ReLU())
    x = torch.randn(50, 12)
    model = imported(module, x)
    found = moments(sites_of(composed(model), minimum=100), Runner(model), collect(x, model))
    close(found["1.weight"].matrix, second(module[0](x)))


def test_in_one_einsum_other_cores_are_contracted_first() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 6, 5))
            self.last = nn.Parameter(torch.randn(5, 3, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bij,ipr,rjq->bpq", x.reshape(-1, 4, 3), self.first, self.last)

    torch.manual_seed(0)
    module, x = Chain(), torch.randn(20, 12)
    model = imported(module, x)
    found = moments(sites_of(composed(model), minimum=1), Runner(model), collect(x, model))
    x3 = x.reshape(-1, 4, 3)
    rows = torch.einsum("bij,rjq->bqir", x3, module.last).reshape(-1, 20)
    close(found["first"].matrix, second(rows))
    rows = torch.einsum("bij,ipr->bprj", x3, module.first).reshape(-1, 15)
    close(found["last"].matrix, second(rows))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


def test_joint_sites_share_and_tables_count() -> None:
    torch.manual_seed(0)
    module, ids = Attention(), torch.randint(0, 20, (40, 6))
    model = imported(module, ids)
    sites = sites_of(separate(model))
    found = moments([*sites, *joint_sites(sites)], Runner(model), collect(ids, model))
    assert found["q.weight"] is found["k.weight"] is found["v.weight"]
    close(found["q.weight"].matrix, second(module.table(ids)))
    counts = np.bincount(ids.numpy().reshape(-1), minlength=50)
    np.testing.assert_allclose(found["table.weight"].factors[0], (counts + 1) / (240 + 50))
    table = module.table.weight.detach().numpy()
    cut = SVD.from_dense(table, None, Ranks(given=8), metric=found["table.weight"].metric())
    plain = SVD.from_dense(table, None, Ranks(given=8))
    assert found["table.weight"].error(table, cut.dense()) < found["table.weight"].error(table, plain.dense())


def test_attention_without_biases_keeps_its_sites() -> None:
    """Composed, queries and keys are one bilinear form, in which neither has an output of its own."""
    model = imported(Attention(), torch.randint(0, 20, (4, 6)))
    assert {s.name for s in sites_of(separate(model))} == {"q.weight", "k.weight", "v.weight", "table.weight"}


def test_apart_where_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_moments, "LARGEST", 20)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(8, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 10))
    x = torch.randn(30, 8, 10)
    model = imported(module, x)
    found = moments(sites_of(composed(model), minimum=100), Runner(model), collect(x, model))
    rows = x.unfold(2, 5, 1).movedim(1, 2).double()  # [b, out, c, k]
    one = found["0.weight"]
    assert one.modes == (8, 5) and not one.exact
    channels = torch.einsum("bock,bodk->cd", rows, rows).numpy() / (30 * 6)
    kernel = torch.einsum("bock,bocl->kl", rows, rows).numpy() / (30 * 6)
    close(one.factors[0], channels)
    close(one.matrix, np.kron(channels, kernel) / np.trace(kernel))
    metric = Metric.of_moments(one.matrix, (8, 5), 1e-6)
    for scale, other in zip(one.metric(regularization=1e-6).scales, metric.scales, strict=True):
        np.testing.assert_allclose(scale / scale[0, 0], other / other[0, 0], atol=1e-4)
    assert one.metric((40,)).modes == (40,) and one.metric((2, 4, 5)).modes == (2, 4, 5)
    flat = module[:3](x).double()
    close(found["3.weight"].factors[0], (flat**2).mean(0).detach().numpy())


def test_norm_and_error_are_those_of_outputs() -> None:
    generator = np.random.default_rng(0)
    x, exact, other = (generator.standard_normal(shape) for shape in ((50, 12), (12, 7), (12, 7)))
    one = Moments((x.T @ x / 50,), x.mean(0), 50)
    assert one.norm(exact) == pytest.approx(np.linalg.norm(x @ exact) / 50**0.5)
    assert one.error(exact, other) == pytest.approx(np.linalg.norm(x @ (exact - other)) / np.linalg.norm(x @ exact))
    centred = x - x.mean(0)
    assert one.centred().norm(exact) == pytest.approx(np.linalg.norm(centred @ exact) / 50**0.5)
    with pytest.raises(TNCompileError, match="has no modes"):
        one.metric((5, 2))


def test_many_rows_are_sampled_and_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = mlp(), torch.randn(4000, 48)
    model = imported(module, x[:4])
    sites, runner, data = sites_of(composed(model), minimum=100), Runner(model), collect(x, model, most=None)
    whole = moments(sites, runner, data)
    monkeypatch.setattr(module_of_moments, "_WORK", 2 * 48**2 * 1500)
    monkeypatch.setattr(module_of_moments, "_MEMORY", 1)
    some = moments(sites, runner, data)
    assert 1500 <= some["0.weight"].rows < 1700 < whole["0.weight"].rows == 4000
    near = np.abs(some["2.weight"].matrix - whole["2.weight"].matrix).max() / np.abs(whole["2.weight"].matrix).max()
    assert 0 < near < 0.1  # of 1500 rows: some standard deviations
    assert np.array_equal(some["4.weight"].matrix, moments(sites, runner, data)["4.weight"].matrix)


def test_cross_moments() -> None:
    module, other, x = mlp(), mlp(), torch.randn(60, 48)
    with torch.no_grad():
        other[0].weight.mul_(0.9).add_(0.01)
    model = imported(module, x)
    sites = sites_of(composed(model), minimum=100)
    weights = {"0.weight": other[0].weight.detach().numpy()}
    runner, data = Runner(model), collect(x, model)
    found = crosses(sites, Upstream(runner, data), Upstream(runner, data), weights)["2.weight"]
    before, after = (m[:2](x).detach().double().numpy() for m in (module, other))
    close(found.before.matrix, before.T @ before / 60)
    close(found.after.matrix, after.T @ after / 60)
    close(found.between, after.T @ before / 60)
