from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.tensorize.small import as_onnx, imported, mlp, nn
from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.tensorizer.runner import Runner

TOLERANCE = 1e-5
"""Relative to the largest number: some float32 roundings."""


class Tied(nn.Module):
    """One weight as table and as head, and one that is computed before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.mixed = nn.Linear(32, 32)
        self.gain = nn.Parameter(torch.rand(32, 1) + 0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = torch.nn.functional.linear(x, torch.sigmoid(self.mixed.weight) * self.gain, self.mixed.bias).tanh()
        return x @ self.table.weight.T


@pytest.mark.parametrize("load", [imported, as_onnx])
def test_replaced_weights_are_those_of_another_module(load: Callable[..., ImportedModel]) -> None:
    module, x = mlp(), torch.randn(6, 48)
    model = load(module, x[:4])
    runner = Runner(model)
    other = mlp(seed=1)
    names = dict(other.named_parameters())
    known = model.program.arrays
    weights = {n: p.detach().numpy() for n, p in names.items() if n in known}
    assert len(weights) == 6  # both ways keep the module's names
    (name,) = (v.name for v in model.program.inputs)
    for given, wanted in (({}, module), (weights, other), ({}, module)):
        (output,) = runner.run({name: x.numpy()}, given).outputs.values()
        np.testing.assert_allclose(output, wanted(x).detach().numpy(), atol=TOLERANCE)
    half = {"2.weight": weights["2.weight"]}
    with torch.no_grad():
        module[2].weight.copy_(other[2].weight)
    (output,) = runner.run({name: x.numpy()}, half).outputs.values()
    np.testing.assert_allclose(output, module(x).detach().numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("load", [imported, as_onnx])
def test_values_inside(load: Callable[..., ImportedModel]) -> None:
    module, x = mlp(), torch.randn(6, 48)
    model = load(module, x[:4])
    runner = Runner(model)
    (name,) = (v.name for v in model.program.inputs)
    wanted = [v for v, value in model.program.values.items() if value.shape == ("batch", 64)]
    ran = runner.run({name: x.numpy()}, wanted=wanted, outputs=False)
    assert not ran.outputs
    np.testing.assert_allclose(ran.values[wanted[0]], module[0](x).detach().numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(ran.values[wanted[-1]], module[:2](x).detach().numpy(), atol=TOLERANCE)
    for bad in (
        {"weights": {"3.weight": np.zeros(2)}},
        {"wanted": ["nothing"]},
        {"weights": {"0.weight": np.zeros(2)}},
    ):
        with pytest.raises(TNCompileError, match=r"no weight|no value|has shape"):
            runner.run({name: x.numpy()}, **bad)
    with pytest.raises(TNCompileError, match="cannot run on the calibration data"):
        runner.run({name: x.numpy()[:, :40]})


def test_tied_and_computed_weights() -> None:
    torch.manual_seed(0)
    module, ids = Tied(), torch.randint(0, 40, (4, 5))
    model = imported(module, ids)
    runner = Runner(model)
    table = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    computed = next(n for n, a in model.program.arrays.items() if a.shape == (32, 32))
    assert computed not in module.state_dict()
    weights = {"table.weight": table, computed: np.eye(32, dtype=np.float32)}
    with torch.no_grad():
        expected = (
            torch.tensor(table)[ids] * (module.gain[:, 0] if computed.startswith("sigmoid") else 1)
        ) + module.mixed.bias
        expected = expected.tanh() @ torch.tensor(table).T
    (output,) = runner.run({"ids": ids.numpy()}, weights).outputs.values()
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-4)


def test_long_einsums_are_contracted_along_a_path() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = nn.ParameterList([torch.randn(24, 3) * 0.3 for _ in range(8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # left to right, the full tensor has 24^8 numbers
            return torch.einsum("za,ar,br,cr,dr,er,fr,gr,hr->zh", x, *self.factors)

    module, x = Chain(), torch.randn(3, 24)
    runner = Runner(imported(module, x))
    sums = [f.detach().numpy().astype(np.float64).sum(0) for f in module.factors[1:7]]
    first, last = (module.factors[k].detach().numpy().astype(np.float64) for k in (0, 7))
    expected = (x.numpy() @ first * np.prod(sums, 0)) @ last.T
    (output,) = runner.run({"x": x.numpy()}).outputs.values()
    np.testing.assert_allclose(output, expected, atol=1e-4 * np.abs(expected).max())
