"""Runs that begin behind the weights that no longer change give what runs from the inputs give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tensorize.small import as_onnx, imported, mlp, nn
from tncompile.tensorizer import upstream
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.upstream import Upstream


class Residual(nn.Module):
    """Layers whose input goes on beside them, a mask that no weight touches, a scale for all, and sizes that a trace
    reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask, h = x > 0, x.tanh()
        scale = self.layers[0](h).abs().max()
        for layer in self.layers:
            h = h + torch.where(mask, layer(h) / scale, 0).reshape(x.shape[0], -1)
        return self.last(h), h.argmax(1), scale


def others(runner: Runner, names: list[str]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = runner.model.program.arrays
    return {n: generator.standard_normal(arrays[n].shape).astype(arrays[n].dtype) for n in names}


@pytest.mark.parametrize("load", [imported, as_onnx])
def test_as_from_the_inputs(load: object) -> None:
    x = torch.randn(40, 12)
    runner = Runner(load(Residual(), x[:4]))  # type: ignore[operator]
    data = collect([*x.split(8)], runner.model)
    weights = [*sorted(n for n in runner.model.program.arrays if n.endswith("weight"))]
    order = [*weights[1:], weights[0]]  # the last layer is called last.weight
    state = Upstream(runner, data)
    found: dict[str, np.ndarray] = {}
    for k, name in enumerate(order):
        state.advance(order[k:], found)
        found |= others(runner, [name])
        for ran, feeds in zip(state.runs(found, outputs=True), data, strict=True):
            expected = runner.run(feeds, found).outputs
            assert {*ran.outputs} == {*expected}
            for output, array in expected.items():
                np.testing.assert_array_equal(ran.outputs[output], array)


def test_only_what_comes_after_is_computed() -> None:
    module, x = mlp((16, 24, 24, 24, 8)), torch.randn(12, 16)
    runner = Runner(imported(module, x[:4]))
    (before,) = runner.ahead_of(["4.weight", "6.weight"])
    (read,) = (n.name for n in runner.model.exported.graph.nodes if n.users and n.name == before)  # type: ignore
    assert read.startswith("relu")
    given = {before: np.zeros((12, 24), np.float32)}
    (found,) = runner.run({"input": x.numpy()}, None, known=given).outputs.values()
    with torch.no_grad():
        np.testing.assert_allclose(found, module[4:](torch.zeros(12, 24)).numpy(), atol=1e-6)
    assert runner.ahead_of(["0.weight"]) == ()


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = mlp((16, 24, 24, 8)), torch.randn(12, 16)
    runner = Runner(imported(module, x[:4]))
    data = collect([*x.split(4)], runner.model)
    monkeypatch.setattr(upstream, "KEPT", 12 * 24 * 4 - 1)
    state = Upstream(runner, data)
    state.advance(["4.weight"])
    known: list[object] = []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda *args, **named: known.append(named["known"]) or run(*args, **named))
    (found,) = np.concatenate([next(iter(ran.outputs.values())) for ran in state.runs(None, outputs=True)])[None]
    assert known == [{}] * 3
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), atol=1e-6)
