from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.tensorize.small import as_onnx, imported, mlp, nn
from tncompile.errors import TNCompileError
from tncompile.runtime.session import Session
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.evaluation import Evaluation
from tncompile.tensorizer.moments import moments
from tncompile.tensorizer.runner import Ran, Runner
from tncompile.tensorizer.sensitivity import noise, sensitivities, site_error
from tncompile.tensorizer.sites import joint_sites, separate, sites_of


def relative(y: torch.Tensor, y0: torch.Tensor) -> float:
    return float((y - y0).norm() / y0.norm())


def test_output_error_of_weights_a_function_and_a_file() -> None:
    module, other, x = mlp(), mlp(seed=1), torch.randn(70, 48)
    model = imported(module, x[:4])
    runner, data = Runner(model), collect(x, model)
    weights = {name: p.detach().numpy() for name, p in other.named_parameters()}
    expected = relative(other(x), module(x))
    evaluation = Evaluation(runner, data)
    assert evaluation.of_weights(weights) == pytest.approx(expected, rel=1e-5)
    assert evaluation.of(lambda feeds: other(torch.tensor(feeds["input"])).detach()) == pytest.approx(
        expected, rel=1e-5
    )
    file = Session(as_onnx(other, x[:4]).original)
    assert evaluation.of(lambda feeds: file.run(file.feeds(feeds))) == pytest.approx(expected, rel=1e-5)
    assert evaluation.of_weights({}) == 0
    with pytest.raises(TNCompileError, match="2 outputs; the model has 1: output"):
        evaluation.of(lambda feeds: (1, 2))
    with pytest.raises(TNCompileError, match=r"has shape \(\); the model's is"):
        evaluation.of(lambda feeds: 1.0)


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"large": 1000 * x, "small": x, "masked": torch.where(x > 0, x, -math.inf), "best": x.argmax(1)}


def test_error_of_several_outputs_is_the_largest() -> None:
    x = torch.randn(20, 8)
    model = imported(Several(), x[:4])
    evaluation = Evaluation(Runner(model), collect(x, model))

    def changed(name: str, factor: float) -> float:
        return evaluation.of(lambda feeds: {n: y * factor if n == name else y for n, y in original(feeds).items()})

    def original(feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return Several()(torch.tensor(feeds["x"]))

    for name in ("large", "small", "masked"):
        assert changed(name, 1.1) == pytest.approx(0.1, rel=1e-4)
    assert changed("best", 3) == 0  # no number that is rounded
    assert changed("small", math.inf) == math.inf


def test_of_a_linear_model_follows_from_the_metric() -> None:
    """One layer: the output error is the local error. Two: errors of a later layer are those of the output."""
    torch.manual_seed(0)
    x = torch.randn(300, 40) @ torch.diag(torch.linspace(0.05, 2, 40)) + 0.3
    module = nn.Sequential(nn.Linear(40, 60, bias=False), nn.ReLU(), nn.Linear(60, 30, bias=False))
    model = imported(module, x[:4])
    sites, runner, data = sites_of(separate(model)), Runner(model), collect(x, model)
    known = moments(sites, runner, data)
    found = sensitivities(sites, Evaluation(runner, data), known)
    assert found.sites["2.weight"].factor == pytest.approx(1, rel=1e-3)
    assert [p[0] for p in found.sites["0.weight"].points] == pytest.approx([0.05, 0.2], rel=1e-4)
    assert 0.3 < found.sites["0.weight"].factor < 2
    assert found.additivity == pytest.approx(1, abs=0.15)
    local = {"0.weight": 0.03, "2.weight": 0.04}
    weights = {k: v for s in sites for k, v in noise(s, known, local[s.name], seed=5).items()}
    assert Evaluation(runner, data).of_weights(weights) == pytest.approx(found.predicted(local), rel=0.2)


def test_given_perturbations_and_no_moments() -> None:
    module, x = mlp(), torch.randn(60, 48)
    model = imported(module, x[:4])
    sites, runner, data = sites_of(separate(model)), Runner(model), collect(x, model)
    changed = {"2.weight": module[2].weight.detach().numpy() * np.float32(1.1)}
    assert site_error(sites[1], changed, {}) == pytest.approx(0.1, rel=1e-4)
    found = sensitivities(sites, Evaluation(runner, data), {}, {"2.weight": [changed]})
    ((local, output),) = found.sites["2.weight"].points
    assert local == pytest.approx(0.1, rel=1e-4)
    assert output == pytest.approx(Evaluation(runner, data).of_weights(changed), rel=1e-6)


def test_short_of_time_the_rest_is_estimated_from_like_layers() -> None:
    module, x = mlp((32, 64, 48, 48, 48, 32)), torch.randn(60, 32)
    model = imported(module, x[:4])
    sites = sites_of(separate(model))
    evaluation = Evaluation(Runner(model), collect(x, model))
    ticks = itertools.count()
    seen: list[tuple[int, int]] = []
    found = sensitivities(
        sites, evaluation, {}, seconds=2.2, clock=lambda: next(ticks), progress=lambda *p: seen.append(p)
    )
    measured = [name for name, s in found.sites.items() if s.points]
    assert len(measured) == 3 and seen[-1] == (3, 5) and {*found.sites} == {s.name for s in sites}
    assert "2 of 5 weights is estimated" in found.notes[-1]
    assert found.sites["6.weight"].like == "4.weight"
    assert found.sites["6.weight"].factor == found.sites["4.weight"].factor
    assert found.sites["8.weight"].like == "" and found.sites["8.weight"].factor > 0


def test_a_slow_model_is_measured_on_fewer_samples() -> None:
    """Rather than not at all: each weight is measured, in as many passes as there is time for."""
    module, x = mlp((32, 64, 48, 32)), torch.randn(64, 32)
    model = imported(module, x[:4])
    sites, data = sites_of(separate(model)), collect([*x.split(4)], model)
    assert len(data) == 16
    now = 0.0

    class Slow(Runner):
        def run(self, *args: Any, **kwargs: Any) -> Ran:
            nonlocal now
            now += 0.3 if kwargs.get("known") else 1  # from where it changes
            return super().run(*args, **kwargs)

    found = sensitivities(sites, Evaluation(Slow(model), data), {}, seconds=40, clock=lambda: now)
    assert all(one.points for one in found.sites.values()) and now <= 2 * 40
    assert found.notes == ("how much each weight matters was measured on 36 samples: there was no time for more",)
    whole = sensitivities(sites, Evaluation(Runner(model), data), {}, seconds=1e9)
    assert not whole.notes
    for name, one in found.sites.items():
        assert one.factor == pytest.approx(whole.sites[name].factor, rel=0.3)


def test_joint_sites_are_measured_beside_their_parts() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.q(x).tanh(), self.k(x).tanh()], 1)

    x = torch.randn(60, 32)
    model = imported(Heads(), x[:4])
    sites = sites_of(separate(model))
    known = moments(sites, Runner(model), collect(x, model))
    found = sensitivities([*joint_sites(sites), *sites], Evaluation(Runner(model), collect(x, model)), known)
    assert {*found.sites} == {"q.weight+k.weight", "q.weight", "k.weight"}
    assert found.additivity == pytest.approx(1, abs=0.1)
