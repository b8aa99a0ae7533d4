"""What there is to choose from for each site: which bits, how large, and how long."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tncompile.errors import TNCompileError
from tncompile.frontend.trace import trace
from tncompile.runtime.quantize import BITS, STORED, stored_bytes
from tncompile.tensorizer import ways
from tncompile.tensorizer.budget import FORMATS
from tncompile.tensorizer.prepare import Prepared, prepare
from tncompile.tensorizer.search import Option, Sites

BATCHES = (1, 8)
HALF = dict.fromkeys(BITS, 0.5) | {"fp32": 1.0}


class Words(nn.Module):
    """A table, a convolution along the words, two weights that read the same, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(96, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.query, self.key = nn.Linear(32, 64), nn.Linear(32, 64)
        self.head = nn.Linear(64, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.relu(self.query(x)) * self.key(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made() -> Prepared:
    loaded = trace(Words().eval(), (torch.randint(0, 96, (3, 6)),), None, "batch")
    return prepare(loaded, None, tuple(FORMATS), {"batch": BATCHES}, lambda message: None)


Timed = Callable[..., dict[str, float]]


def timed(seconds: Mapping[str, float]) -> Timed:
    """In the place of measurements."""

    def answer(model: bytes, names: Sequence[str], feeds: object, **options: Any) -> dict[str, float]:
        return {name: seconds[name] for name in names}

    return answer


def fronts(made: Prepared, answer: Timed, bits: Sequence[str] = BITS) -> Sites:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "timed", answer)
        return ways.fronts(made, bits, dict.fromkeys(BATCHES, 5.0), lambda message: None)


@pytest.fixture(scope="module")
def found(made: Prepared) -> Sites:
    """What there is where all other bits take half the time."""
    return fronts(made, timed(HALF))


def by_name(sites: Sites) -> dict[str, tuple[Option, ...]]:
    return {options[0].site.name: options for options in (*sites.alone, *sites.joint)}


def test_every_site_has_its_front(made: Prepared, found: Sites) -> None:
    assert {*by_name(found)} == {
        *("table.weight", "conv.weight", "query.weight", "key.weight", "head.weight"),
        "query.weight+key.weight",
    }
    assert len(found.joint) == 1 and found.rest_size == made.rest_size
    for options in by_name(found).values():
        for a, b in itertools.permutations(options, 2):
            assert not (a.error <= b.error and a.seconds <= b.seconds and a.size <= b.size)
    for options in found.alone:
        exact = options[0]
        assert (exact.replacement, exact.bits, exact.error) == (None, "fp32", 0.0)
        assert exact.size == exact.site.parts[0].array.nbytes
        assert {o.bits for o in options} - {"fp32"} and any(o.replacement is not None for o in options)
    assert all(option.replacement is not None for option in found.joint[0])


def test_sizes_are_those_of_the_file(found: Sites) -> None:
    for options in by_name(found).values():
        for option in options:
            if option.replacement is None:
                (part,) = option.site.parts
                expected = stored_bytes(part.matrix.shape, option.bits, 0 if part.gathered else 1)
            else:
                expected = sum(stored_bytes(core.shape, option.bits) for core in option.replacement.factorized.cores)
            assert option.size == expected


def test_bits_are_those_asked_that_the_kind_has(made: Prepared) -> None:
    sites = {site.name: site for site in made.sites}
    table, conv, head = (sites[f"{name}.weight"] for name in ("table", "conv", "head"))
    assert {*ways._possible(head, BITS)} == {*BITS}
    assert "int8-static" not in ways._possible(table, BITS) and "int4" in ways._possible(table, BITS)
    assert {"int8", "int4"}.isdisjoint(ways._possible(conv, BITS)) and "int8-static" in ways._possible(conv, BITS)
    assert ways._possible(conv, ("int8",)) == ("fp32",)
    assert ways._possible(head, ("int8", "fp16")) == ("fp16", "int8")
    only = by_name(fronts(made, timed(HALF), ("fp32",)))
    assert all(option.bits == "fp32" for options in only.values() for option in options)


def test_a_network_that_cannot_be_timed_is_in_no_such_bits(made: Prepared) -> None:
    def fails(*arguments: object, **options: object) -> dict[str, float]:
        raise TNCompileError("no kernel")

    found = by_name(fronts(made, fails))
    for name in ("head.weight", "conv.weight", "query.weight"):
        kept = {option.bits for option in found[name]}
        assert kept <= {"fp32", *STORED} and len(kept) > 1
    never = by_name(fronts(made, timed(HALF | {"int8": math.inf}), ("fp32", "int8")))
    assert all(option.bits == "fp32" for option in never["head.weight"])
    assert all(math.isfinite(o.seconds) for options in (*found.values(), *never.values()) for o in options)


def test_ratios_are_measured_at_each_batch_size(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: bytes, names: Sequence[str], feeds: Mapping[str, Any], **options: Any) -> dict[str, float]:
        batch = max(math.prod(array.shape) for array in feeds.values()) // (6 * 64)
        return {name: 1.0 if name == "fp32" else 0.25 if batch == BATCHES[0] else 0.5 for name in names}

    monkeypatch.setattr(ways, "timed", answer)
    sites = {site.name: site for site in made.sites}
    clock = ways._Clock(made, math.inf)
    found = clock.ratios(sites["head.weight"], None, ("fp32", "fp16", "int8", "int8-weights"))
    assert found["fp32"] == found["fp16"] == found["int8-weights"] == (1.0, 1.0)  # they differ in the file alone
    assert found["int8"] == (0.25, 0.5)
    assert clock.ratios(sites["table.weight"], None, ("fp32", "int8"))["int8"] == (1.0, 1.0)


def test_once_time_is_up_ratios_are_those_of_the_dense_layer(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def answer(model: bytes, names: Sequence[str], feeds: object, **options: Any) -> dict[str, float]:
        asked.append(model)
        return {name: HALF[name] for name in names}

    monkeypatch.setattr(ways, "timed", answer)
    site = next(site for site in made.sites if site.name == "head.weight")
    clock = ways._Clock(made, -math.inf)
    dense = clock.ratios(site, None, ("int8",))
    models = [*asked]
    assert clock.ratios(site, made.candidates[site.name][0].replacement, ("int8",)) == dense == {"int8": (0.5, 0.5)}
    assert asked == 2 * models


@pytest.mark.parametrize(("slower", "fits"), [(4.0, True), (0.5, False)])
def test_the_dense_model_weighs_what_it_was_measured_to_take(made: Prepared, slower: float, fits: bool) -> None:
    predicted = np.sum([made.predictor.seconds(site) for site in made.sites], axis=0)
    ms = dict(zip(BATCHES, 1e3 * slower * predicted, strict=True))
    weigh = ways._Weighing(made, ms)
    mean = math.sqrt(ms[BATCHES[0]] * ms[BATCHES[1]]) / 1e3
    assert weigh(predicted) + weigh.rest == pytest.approx(mean, rel=1e-9)
    share = 1 / slower if fits else 0.95  # predictions beyond what was measured are scaled
    assert weigh(predicted) == pytest.approx(share * mean, rel=1e-9)
