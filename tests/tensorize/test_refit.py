from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.tensorize.small import imported, mlp, nn
from tncompile.decomp import SVD, BlockTrain, Ranks, TensorTrain, Tucker
from tncompile.decomp.base import Factorized
from tncompile.frontend.importer import TracedModel
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.evaluation import Evaluation
from tncompile.tensorizer.moments import Moments, moments
from tncompile.tensorizer.refit import bias_of, dense, refit, same_format
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sites import Replacement, joint_sites, separate, sites_of

DEEP = (32, 48, 48, 48, 48, 10)


def low_rank_inputs(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Samples near a subspace, with a mean: what layers see in practice."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((12, size))
    rows = generator.standard_normal((count, 12)) @ mixing + 0.1 * generator.standard_normal((count, size)) + 0.5
    return torch.tensor(rows, dtype=torch.float32)


class Fixture:
    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        self.model: TracedModel = imported(module, x[:4])
        self.runner = Runner(self.model)
        self.fit, self.held = collect(x, self.model).split()
        self.sites = sites_of(separate(self.model), minimum=256)

    def truncated(self, rank: int, weighed: bool = True) -> list[Replacement]:
        known = moments(self.sites, self.runner, self.fit)
        found = []
        for site in self.sites:
            metric = known[site.parts[0].name].metric() if weighed else None
            ranks = Ranks(given=rank, larger=True)
            found.append(Replacement(site, SVD.from_dense(site.matrix, None, ranks, metric=metric)))
        return found

    def errors(self, *choices: Sequence[Replacement]) -> list[float]:
        held = Evaluation(self.runner, self.held)
        return [held.of_weights(dense(choice)) for choice in choices]


def test_reduces_the_error_of_a_deep_model() -> None:
    deep = Fixture(mlp(DEEP), low_rank_inputs(600))
    plain, weighed = deep.truncated(12, weighed=False), deep.truncated(12)
    before, after = deep.errors(plain, weighed)
    assert after < 0.8 * before
    seen: list[tuple[int, int]] = []
    found = refit(weighed, deep.runner, deep.fit, deep.held, progress=lambda k, n, _: seen.append((k, n)))
    assert found.before == pytest.approx(after) and found.after < 0.93 * after
    assert Evaluation(deep.runner, deep.held).of_weights(found.weights()) == pytest.approx(found.after)
    assert seen == [(k, 5) for k in range(1, 6)]
    assert {*found.biases} <= {f"{k}.bias" for k in range(0, 9, 2)} and found.biases
    for old, new in zip(weighed, found.replacements, strict=True):
        assert new.factorized.ranks == old.factorized.ranks and new.site is old.site
    without = refit(weighed, deep.runner, deep.fit, deep.held, biases=False)
    assert not without.biases and found.after < without.after < after


def test_is_exact_where_nothing_is_truncated() -> None:
    deep = Fixture(mlp(DEEP), low_rank_inputs(300))
    whole = [Replacement(s, SVD.from_dense(s.matrix, None, Ranks(larger=True))) for s in deep.sites]
    found = refit(whole, deep.runner, deep.fit, deep.held)
    assert found.after <= found.before < 1e-5


def test_is_never_worse_and_stops_in_time() -> None:
    deep = Fixture(mlp(DEEP), torch.randn(40, 32))  # too few samples to fit anything to
    start = deep.truncated(4)
    found = refit(start, deep.runner, deep.fit, deep.held)
    assert found.after <= found.before
    ticks = itertools.count()
    cut = refit(start, deep.runner, deep.fit, deep.held, seconds=1.5, clock=lambda: next(ticks))
    assert "the time was up" in cut.notes[0] and cut.replacements[2:] == tuple(start[2:])


class Block(nn.Module):
    """Attention with a joint site, a convolution, a grouped one, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.grouped = nn.Conv1d(32, 32, 3, groups=2)
        self.head = nn.Linear(32, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = torch.softmax(self.q(x) @ self.k(x).mT / 6, -1) @ self.v(x)
        x = torch.relu(self.grouped(torch.relu(self.conv(x.mT))))
        return self.head(x.mean(-1))


def test_of_attention_convolutions_and_tables() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (200, 8))
    block = Fixture(Block(), ids)
    single = {site.name: site for site in block.sites}
    (joint,) = joint_sites(block.sites)
    sites = [joint, *(single[f"{name}.weight"] for name in ("table", "conv", "grouped", "head"))]
    made = [Replacement(s, SVD.from_dense(s.matrix, None, Ranks(given=10, larger=True))) for s in sites]
    found = refit(made, block.runner, block.fit, block.held)
    assert found.after < 0.9 * found.before
    old, new = ({r.site.name: r.factorized for r in side} for side in (made, found.replacements))
    assert new["table.weight"] is old["table.weight"] and new["grouped.weight"] is old["grouped.weight"]
    assert {*found.biases} <= {"q.bias", "k.bias", "v.bias", "conv.bias"}
    program = separate(block.model)
    assert [bias_of(program, single[f"{n}.weight"].parts[0]) for n in ("q", "conv", "head")] == [
        "q.bias",
        "conv.bias",
        None,
    ]


FORMATS = {
    "svd": lambda w: SVD.from_dense(w, ((4, 6), (30,)), Ranks(given=5)),
    "train": lambda w: TensorTrain.from_dense(w, ((4, 6), (5, 6)), Ranks(parameters=300)),
    "tucker": lambda w: Tucker.from_dense(w, ((4, 6), (30,)), Ranks(parameters=300), factored=(0, 2)),
    "blocks": lambda w: BlockTrain.from_dense(w, ((4, 6), (5, 6)), Ranks(parameters=400)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_keeps_the_format(kind: str) -> None:
    generator = np.random.default_rng(0)
    w, x = generator.standard_normal((24, 30)), generator.standard_normal((200, 24)) * np.linspace(0.1, 2, 24)
    known = Moments((x.T @ x / 200,), x.mean(0), 200)
    old: Factorized = FORMATS[kind](w)
    new = same_format(old, old.dense() * 2, known.metric)
    assert (type(new), new.axes, new.ranks, new.labels) == (type(old), old.axes, old.ranks, old.labels)
    np.testing.assert_allclose(new.dense(), old.dense() * 2, atol=1e-9)
