"""Plans made real: every weight gets the bits that its plan wants, or it is said that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tncompile.compiler import compile_exported
from tncompile.decomp import SVD, Ranks
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.passes import Context, join
from tncompile.runtime.quantize import BITS, STORED
from tncompile.runtime.session import Session
from tncompile.tensorizer.cost import Predictor
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.moments import moments
from tncompile.tensorizer.options import Rounding, Statistics
from tncompile.tensorizer.realize import Realized, realize, replacements, substituted
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.search import Option, Plan
from tncompile.tensorizer.shared import shared_candidates, shared_sites
from tncompile.tensorizer.sites import Replacement, Site, composed, joint_sites, sites_of
from tncompile.tensorizer.ways import _bytes, _possible


class Attention(nn.Module):
    """Four projections of one input, which are computed at once, and one of what comes of them."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.g = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.q(x)) * torch.relu(self.k(x)) + torch.sigmoid(self.v(x)) * torch.sin(self.g(x))


class Chain(nn.Module):
    """Two weights with nothing between them: one network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(96, 32, bias=False), nn.Linear(32, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)))


class Deep(nn.Module):
    """Layers of different inputs whose weights have one left factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.Linear(64, 64)
        basis = torch.randn(8, 64)
        for layer in self.layers:
            layer.weight.data = torch.randn(64, 8) @ basis / 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


def test_layers_at_different_depths_share_a_factor() -> None:
    module = Deep().eval()
    exported = trace(module, (torch.randn(4, 64),), None, "batch")
    sites = sites_of(composed(import_exported(exported)))
    (pair,) = shared_sites(sites)
    assert (pair.name, pair.apart, pair.matrix.shape) == ("layers.0.weight&layers.1.weight", True, (64, 128))
    made = Replacement(pair, SVD.from_dense(pair.matrix, ((64,), (128,)), Ranks(given=8)))
    student = substituted(exported, [made])
    found = compile_exported(student, batch=(1, 16))
    shapes = [tuple(t.dims) for t in onnx.load_from_string(found.onnx).graph.initializer if len(t.dims) == 2]
    assert sorted(shapes) == [(8, 64), (8, 64), (64, 8), (64, 64)]
    x = torch.randn(9, 64)
    with torch.no_grad():
        expected = module.double()(x.double()).numpy()
    np.testing.assert_allclose(found.run(x), expected, rtol=0, atol=1e-5)


def test_neither_of_two_layers_pays_for_the_other() -> None:
    """One is of rank 8 and large, the other of full rank and small: the error is that of the small one's outputs."""
    module = Deep()
    module.layers[1].weight.data = torch.randn(64, 64) / 100
    x = torch.randn(200, 64)
    model = import_exported(trace(module.eval(), (x,), None, "batch"))
    sites = sites_of(composed(model))
    (pair,) = shared_sites(sites)
    known = moments(sites, Runner(model), collect(x, model))
    inputs = [known[part.name] for part in pair.parts]
    found = shared_candidates(pair, inputs, Predictor(composed(model), Context((1, 16))))
    assert len(found) > 3
    hidden = torch.tanh(module.layers[0](x)).detach().double().numpy()
    for candidate in found:
        dense = candidate.replacement.dense()
        wrong = []
        for part, read in zip(pair.parts, (x.double().numpy(), hidden), strict=True):
            exact, other = read @ part.array.T, read @ dense[part.name].T
            wrong.append(np.linalg.norm(exact - other) / np.linalg.norm(exact))
        assert candidate.error == pytest.approx(max(wrong), rel=1e-3, abs=1e-6)


def test_rounding_is_that_of_each_layer_where_two_share_a_factor() -> None:
    module = Deep().eval()
    x = 5 * torch.randn(160, 64)
    model = import_exported(trace(module, (x,), None, "batch"))
    sites = sites_of(composed(model))
    (pair,) = shared_sites(sites)
    known = moments(sites, Runner(model), collect(x, model))
    each = [Statistics(known[part.name], step) for part, step in zip(pair.parts, (0.15, 0.008), strict=True)]
    alone = [Rounding(s, None, [one]).error("int8") for s, one in zip(sites, each, strict=False)]
    made = Replacement(pair, SVD.from_dense(pair.matrix, ((64,), (128,)), Ranks(given=8)))
    together = Rounding(pair, made, each).error("int8")
    assert max(alone) < together < 2 * max(alone)  # two cores, each with activations of its own


def test_weights_that_read_one_value_are_no_pair_of_depths() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.heads[0](x)) * torch.relu(self.heads[1](x))  # type: ignore[no-any-return]

    sites = sites_of(composed(import_exported(trace(Heads().eval(), (torch.randn(4, 64),), None, "batch"))))
    joint = joint_sites(sites)
    assert [site.name for site in joint] == ["heads.0.weight+heads.1.weight"]
    assert shared_sites(sites, joint) == ()


def test_a_search_lets_them_share_it() -> None:
    module = Deep().eval()
    x = torch.randn(160, 64)
    made = tncompile.tensorize(
        module, x, max_error=0.01, prefer="size", bits=("fp32",), formats=("svd",), batch=(1, 16), threads=1
    )
    (pair,) = (w for w in made.report.weights if w.name == "layers.0.weight&layers.1.weight")
    assert pair.kept.startswith("SVD r1=8")
    assert pair.size == (2 * 64 * 64 * 4, 3 * 64 * 8 * 4)


class Table(nn.Module):
    """Rows of a table, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(200, 64), nn.Linear(64, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.table(ids)))  # type: ignore[no-any-return]


INPUTS: dict[type[nn.Module], Callable[[], torch.Tensor]] = {
    Attention: lambda: torch.randn(3, 5, 64),
    Chain: lambda: torch.randn(3, 96),
    Table: lambda: torch.randint(0, 200, (3, 7)),
}


def traced(kind: type[nn.Module]) -> tuple[torch.export.ExportedProgram, dict[str, Site], list[Site]]:
    """A model, its sites by name, and those that take the place of several."""
    exported = trace(kind().eval(), (INPUTS[kind](),))
    sites = sites_of(composed(import_exported(exported)))
    return exported, {site.name: site for site in sites}, [*joint_sites(sites)]


def option(site: Site, bits: str, rank: int | None = None) -> Option:
    made = None if rank is None else Replacement(site, SVD.from_dense(site.matrix, ranks=Ranks(given=rank)))
    return Option(site, made, bits, 0.0, 0.0, 0)


def made(
    exported: torch.export.ExportedProgram, *options: Option, batch: tuple[int, ...] = (1, 16), **given: Any
) -> Realized:
    plan = Plan(options)
    return realize(substituted(exported, replacements(plan)), plan, (), {"batch": batch}, **given)


def floats(data: bytes) -> int:
    """Float32 numbers in the file's largest initializer of that type."""
    initializers = onnx.ModelProto.FromString(data).graph.initializer
    found = [int(np.prod(t.dims)) for t in initializers if t.data_type == onnx.TensorProto.FLOAT]
    return max(found, default=0)


def test_ways_are_ordered_from_the_most_exact_on() -> None:
    assert [int(b.removeprefix("fp").removeprefix("int").split("-")[0]) for b in BITS] == [32, 16, 8, 8, 8, 4, 4]
    assert BITS.index("int8-weights") < BITS.index("int8")  # activations are exact


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal networks are computed at once, whatever is predicted."""
    monkeypatch.setattr(join, "gains", lambda *_: True)
    monkeypatch.setattr(join, "ratio", lambda *_: 0.5)


@pytest.mark.parametrize("bits", ["fp16", "int8-weights", "int8", "int4-weights", "int4"])
def test_joined_weights_are_in_their_bits(joined: None, bits: str) -> None:
    exported, sites, _ = traced(Attention)
    found = made(exported, *(option(site, bits) for site in sites.values()))
    (network,) = (n for n in found.compiled.program.networks if n.cores)
    assert {*network.cores[0].sources} == {*sites}  # of which the name has two
    assert found.written == dict.fromkeys(sites, bits)
    assert found.notes == ()
    assert floats(found.data) <= 64 * 64 // 8  # scales


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("bits", ["int8-weights", "int8"])
def test_cores_of_joined_weights_are_in_their_bits(joined: None, bits: str, together: bool) -> None:
    exported, sites, joint = traced(Attention)
    # of so small a rank that the factors stay two
    options = [option(joint[0], bits, 12)] if together else [option(site, bits, 4) for site in sites.values()]
    found = made(exported, *options)
    assert any(len(core.sources) == 4 for network in found.compiled.program.networks for core in network.cores)
    assert found.written == dict.fromkeys(sites, bits)
    assert found.notes == ()
    assert floats(found.data) <= 64 * 64 // 8


def test_what_one_of_two_factors_cannot_be_in_neither_is(joined: None) -> None:
    """ONNX Runtime has no four bits for a matmul of several matrices at once, which the second factors become."""
    exported, sites, _ = traced(Attention)
    options = [option(site, "int4", 4) for site in sites.values()]
    found = made(exported, *options, batch=(16,), allowed=("fp32", "int8", "int4"))
    assert found.written == dict.fromkeys(sites, "int8")
    assert all("kept in int8, not int4" in note for note in found.notes)
    assert len(found.notes) == 4


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("int8", "int8-weights", "int8-weights"),
        ("int4", "int8", "int8"),
        ("int4", "int4-weights", "int4-weights"),
        ("fp32", "int8", "fp32"),
    ],
)
def test_of_two_weights_in_one_network_the_most_exact_bits(first: str, second: str, both: str) -> None:
    exported, sites, _ = traced(Chain)
    wanted = {"first.weight": first, "second.weight": second}
    found = made(exported, *(option(sites[name], bits) for name, bits in wanted.items()))
    assert len([n for n in found.compiled.program.networks if n.cores]) == 1
    assert found.written == dict.fromkeys(wanted, both)
    ((name, other),) = ((n, o) for n, o in (wanted.keys(), [*wanted][::-1]) if wanted[n] != both)
    assert found.notes == (f"{name} is kept in {both}, not {wanted[name]}: {other} is in the same network",)


def test_what_cannot_be_had_becomes_more_exact_within_what_is_allowed() -> None:
    exported, sites, _ = traced(Table)
    table = option(sites["table.weight"], "int8-static")  # which no table has
    found = [made(exported, table, allowed=allowed) for allowed in (BITS, ("fp32", "int8-weights"), ("fp32", "int4"))]
    assert [one.written["table.weight"] for one in found] == ["int8", "int8-weights", "fp32"]
    assert all(len(one.notes) == 1 and "not int8-static" in one.notes[0] for one in found)
    layer = option(sites["fc.weight"], "int8-static")  # without data for its ranges
    assert made(exported, layer).written == {"fc.weight": "int8"}


@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize("bits", ["fp16", "int8-weights", "int8", "int4"])
def test_a_table_is_in_its_bits(bits: str, rank: int | None) -> None:
    exported, sites, _ = traced(Table)
    found = made(exported, option(sites["table.weight"], bits, rank), option(sites["fc.weight"], "fp32"))
    assert found.written == {"table.weight": bits, "fc.weight": "fp32"}
    assert found.notes == ()
    assert floats(found.data) == 64 * 48  # those of fc
    ids = INPUTS[Table]()
    (output,) = Session(found.data).run({"ids": ids.numpy()}).values()
    (exact,) = Session(found.compiled.onnx).run({"ids": ids.numpy()}).values()
    assert np.linalg.norm(output - exact) < (0.2 if bits == "int4" else 0.02) * np.linalg.norm(exact)


def test_a_weight_that_nothing_reads_is_told() -> None:
    exported, sites, _ = traced(Chain)
    gone = traced(Table)[1]["fc.weight"]
    found = made(
        exported, option(sites["first.weight"], "int8"), option(sites["second.weight"], "int8"), option(gone, "int8")
    )
    assert found.written == {"first.weight": "int8", "second.weight": "int8", "fc.weight": "fp32"}
    assert found.notes == (
        "fc.weight is kept in fp32, not int8: no network of the file reads it as a weight of its own",
    )


def test_without_fewer_bits_all_is_float32() -> None:
    exported, sites, _ = traced(Chain)
    found = made(exported, option(sites["first.weight"], "fp32"))
    assert (found.written, found.notes, found.data) == ({"first.weight": "fp32"}, (), found.compiled.onnx)


def test_bytes_are_those_of_the_dtype() -> None:
    exported = trace(Chain().double().eval(), (INPUTS[Chain]().double(),))
    (site,) = (s for s in sites_of(composed(import_exported(exported))) if s.name == "first.weight")
    assert _possible(site, BITS) == ("fp32",)  # only float32 is rounded
    assert _bytes(site, None, "fp32") == 8 * 96 * 32
    half = option(site, "fp32", 4).replacement
    assert _bytes(site, half, "fp32") == 8 * 4 * (96 + 32)
    single = traced(Chain)[1]["first.weight"]
    assert {*STORED} < {*_possible(single, BITS)}
    assert _bytes(single, None, "fp16") == 2 * 96 * 32
