"""Candidates: what they claim of error, size and time, which of them are dropped, and what moments do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.tensorize.replaced import Images, Words, imported, sites
from tncompile.decomp import CP, SVD, BlockTrain, Metric, Ranks, TensorTrain
from tncompile.errors import TNCompileError
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Array
from tncompile.passes import Context
from tncompile.tensorizer.candidates import Candidate, candidates
from tncompile.tensorizer.cost import Predictor
from tncompile.tensorizer.sites import Part, Site, composed, joint_sites, sites_of

GRAM = 1e-6
"""Relative errors may be off by so much: eigenvalues of a Gram matrix stand for squares of singular values."""


def site_of(matrix: Array) -> Site:
    """A matrix as a weight that no network uses."""
    return Site((Part("w", matrix.astype(np.float32), (0,), (1,)),))


def truth(candidate: Candidate, moments: Array | None) -> float:
    """The relative error, directly: of the weight, or of the output for inputs of such second moments."""
    replacement = candidate.replacement
    exact = np.asarray(replacement.site.matrix, np.float64)
    wrong = exact - replacement.factorized.dense()
    if moments is None:
        return float(np.linalg.norm(wrong) / np.linalg.norm(exact))
    return math.sqrt(np.trace(wrong.T @ moments @ wrong) / np.trace(exact.T @ moments @ exact))


def moments_of(size: int) -> Array:
    inputs = np.random.default_rng(5).standard_normal((4 * size, size)) * np.arange(1, size + 1) ** -1.0
    return np.asarray(inputs.T @ inputs / len(inputs))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(Words, "conv.weight"), (Images, "one.weight"), (Images, "fc.weight")])
def test_errors_and_sizes_are_as_said(kind: type[nn.Module], name: str, weighed: bool) -> None:
    site = sites(kind)[name]
    moments = moments_of(site.matrix.shape[0]) if weighed else None
    found = candidates(site, moments)
    assert found
    for candidate in found:
        # the metric adds 1e-6 of the mean moment, so it is a little off the moments given
        assert candidate.error == pytest.approx(truth(candidate, moments), abs=1e-4)
        assert candidate.bytes == 4 * candidate.replacement.parameters < 4 * site.size
        assert candidate.error < 1
    assert not any(a.beats(b) for a in found for b in found)


def test_the_svd_is_the_best_of_its_rank_in_the_metric() -> None:
    site = site_of(np.random.default_rng(0).standard_normal((48, 64)))
    moments = moments_of(48)
    metric = Metric.of_moments(moments)
    for candidate in candidates(site, moments):
        found = candidate.replacement.factorized
        assert isinstance(found, SVD)
        best = SVD.from_dense(site.matrix, ranks=Ranks(given=found.ranks["r1"], larger=True), metric=metric)
        assert candidate.error == pytest.approx(best.error(site.matrix, metric), abs=GRAM)
    plain = {c.bytes: c for c in candidates(site)}
    weighed = candidates(site, moments)
    assert all(c.error < truth(plain[c.bytes], moments) for c in weighed)


def test_a_matrix_with_structure_gets_its_own_format() -> None:
    generator = np.random.default_rng(1)
    cores = (generator.standard_normal((8, 8, 8, 1)), generator.standard_normal((1, 8, 8, 8)))
    monarch = BlockTrain(cores, ((8, 8), (8, 8))).dense()
    found = candidates(site_of(monarch + 0.01 * generator.standard_normal(monarch.shape)))
    best = min((c for c in found if c.bytes <= 4096 * 4 // 3), key=lambda c: c.error)
    assert isinstance(best.replacement.factorized, BlockTrain) and best.error < 0.02
    unstructured = candidates(site_of(generator.standard_normal((64, 64))))
    assert {type(c.replacement.factorized) for c in unstructured} == {SVD}


def test_a_separable_kernel_is_split_in_space() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)  # of some kernels the train is behind the split at every size
            self.conv = nn.Conv2d(16, 24, 5, padding=2, bias=False)
            across, down = torch.randn(24, 4, 1, 5), torch.randn(4, 16, 5, 1)
            self.conv.weight = nn.Parameter(torch.einsum("orxk,rcly->oclk", across, down))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(torch.relu(x)))

    program = composed(import_exported(trace(Net().eval(), (torch.randn(2, 16, 12, 12),), None, "batch")))
    (site,) = sites_of(program)
    predictor = Predictor(program, Context(batches=(1, 8)))
    found = candidates(site, predictor=predictor)
    exact = min((c for c in found if c.error < 1e-3), key=lambda c: c.bytes)
    assert exact.replacement.factorized.labels == (("i1", "i2", "r1"), ("r1", "i3", "o1"))
    assert all(new < old for new, old in zip(exact.seconds, predictor.seconds(site), strict=True))
    assert any(isinstance(c.replacement.factorized, (CP, TensorTrain)) for c in candidates(site))


def test_moments_of_each_axis_of_a_kernel() -> None:
    site = sites(Images)["one.weight"]
    parts = [moments_of(n) + np.eye(n) for n in site.in_sizes]
    whole = np.kron(np.kron(parts[0], parts[1]), parts[2])
    for ours in (candidates(site, parts), candidates(site, whole)):
        assert all(c.error == pytest.approx(truth(c, whole), abs=1e-4) for c in ours)
    with pytest.raises(TNCompileError, match="do not fit"):
        candidates(site, parts[:1])


def test_rows_of_a_table_count_as_often_as_they_are_read() -> None:
    table = np.random.default_rng(2).standard_normal((200, 32)).astype(np.float32)
    site = Site((Part("table", table, (0,), (1,), gathered=True),))
    counts = np.where(np.arange(200) < 20, 100.0, 0.0)
    for candidate in candidates(site, counts):
        rank = candidate.replacement.factorized.ranks["r1"]
        wrong = np.linalg.norm(table - candidate.replacement.factorized.dense(), axis=1)
        if rank >= 20:  # the rows that are read at all are of that rank
            assert wrong[:20].max() < 0.2 * wrong[20:].min()
    with pytest.raises(TNCompileError, match="200 rows"):
        candidates(site, counts[:10])


def test_ranks_are_multiples_of_eight_and_sizes_bounded() -> None:
    site = site_of(np.random.default_rng(3).standard_normal((128, 256)))
    ranks = [c.replacement.factorized.ranks["r1"] for c in candidates(site)]
    assert ranks == sorted(ranks, reverse=True) and all(r % 8 == 0 for r in ranks if r >= 16)
    shares = [c.bytes / (4 * site.size) for c in candidates(site, shares=(0.5, 0.25))]
    assert len(shares) == 2 and max(shares) <= 0.5


def test_several_weights_get_the_svd_only() -> None:
    (joint,) = joint_sites([*sites(Words).values()])
    predictor = Predictor(composed(imported(Words)), Context(batches=(1, 4)))
    found = candidates(joint, predictor=predictor)
    assert found and all(isinstance(c.replacement.factorized, SVD) for c in found)


def test_the_same_twice() -> None:
    site = sites(Images)["one.weight"]
    first, second = candidates(site), candidates(site)
    assert [(c.error, c.bytes) for c in first] == [(c.error, c.bytes) for c in second]
    for a, b in zip(first, second, strict=True):
        for mine, theirs in zip(a.replacement.factorized.cores, b.replacement.factorized.cores, strict=True):
            np.testing.assert_array_equal(mine, theirs)
