"""Cores in the place of weights of an exported program: the same numbers, names and metadata, and no leftovers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import assert_close
from tests.tensorize.replaced import EXACT, INPUTS, Images, Words, exact_formats, exported, low_rank, sites
from tncompile.compiler import compile_exported
from tncompile.decomp import SVD
from tncompile.errors import TNCompileError
from tncompile.frontend.factors import Core, Factors, substitute
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.tensorizer.sites import Replacement, Site, composed, joint_sites, sites_of

FLOAT32 = 1e-5
"""Relative to the largest output: the rounding of cores of full rank, through a few layers."""


def run(program: torch.export.ExportedProgram, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(program.module()(x).numpy())


def svd(site: Site) -> SVD:
    return SVD.from_dense(site.matrix, ranks=EXACT)


@pytest.mark.parametrize("kind", [Words, Images])
@settings(max_examples=10, deadline=None)
@given(draws=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_full_rank_cores_compute_the_same(kind: type[nn.Module], draws: list[int]) -> None:
    chosen = []
    for name, number in zip(sites(kind), draws, strict=True):
        ways = exact_formats(kind, name)
        chosen.append(Replacement(sites(kind)[name], ways[number % len(ways)]))
    new = substitute(exported(kind), [f for r in chosen for f in r.factors()])
    x = INPUTS[kind]()
    assert_close(run(new, x), run(exported(kind), x), tolerance=FLOAT32, what="with full ranks")  # type: ignore[arg-type]
    for replacement in chosen:
        (weight,) = replacement.dense().values()
        assert weight.shape == replacement.site.parts[0].array.shape


def test_sites_of_all_kinds_are_found() -> None:
    assert {*sites(Words)} == {"conv.weight", "query.weight", "key.weight", "head.weight"}
    assert {*sites(Images)} == {"one.weight", "two.weight", "three.weight", "fc.weight"}


def test_everything_else_stays_as_it_was() -> None:
    before = exported(Words)
    new = substitute(before, [f for s in sites(Words).values() for f in low_rank(s, 4).factors()])
    old_nodes = [n.name for n in before.graph.nodes if n.op != "placeholder"]
    nodes = [n for n in new.graph.nodes if n.op != "placeholder"]
    rebuilt = [n for n in nodes if n.name.startswith("p_")]
    assert [n.name for n in nodes if n not in rebuilt] == old_nodes
    assert rebuilt and all("val" in n.meta and n.meta.get("nn_module_stack") for n in rebuilt)
    assert not {"conv.weight", "query.weight", "key.weight", "head.weight", "table.weight"} & {*new.state_dict}
    assert {"conv.weight.core_0", "head.weight.core_1", "query.bias"} <= {*new.state_dict}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in new.state_dict.values())
    assert before.state_dict.keys() == exported(Words).state_dict.keys()  # the one that came in is untouched
    assert new.state_dict["query.bias"] is before.state_dict["query.bias"]


def test_a_gradient_is_required_as_the_weight_did() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40)).eval()
    model[0].weight.requires_grad_(False)
    program = trace(model, (torch.randn(2, 40),), None, "batch")
    found = sites_of(composed(import_exported(program)), 100)
    new = substitute(program, [f for s in found for f in low_rank(s, 4).factors()])
    assert {n: p.requires_grad for n, p in new.state_dict.items() if "core" in n} == {
        "0.weight.core_0": False,
        "0.weight.core_1": False,
        "2.weight.core_0": True,
        "2.weight.core_1": True,
    }
    module = tncompile.to_torch(new)
    module(torch.randn(3, 40)).square().sum().backward()
    grads = {name: p.grad is not None for name, p in module.named_parameters() if "core" in name}
    assert grads == {name: name.startswith("2") for name in grads} and len(grads) == 4


def test_saved_loaded_and_compiled(tmp_path: Path) -> None:
    new = substitute(exported(Words), [f for s in sites(Words).values() for f in low_rank(s, 4).factors()])
    torch.export.save(new, tmp_path / "model.pt")
    compiled = tncompile.compile_file(tmp_path / "model.pt", batch=(1, 4))  # checked against the substituted one
    x = INPUTS[Words]()
    assert_close(compiled.run(x), run(new, x), tolerance=FLOAT32, what="compiled")
    names = {core.name for n in compiled.traced.program.networks for core in n.cores}
    assert {"query.weight.core_0", "conv.weight.core_1"} <= names
    # rows are gathered from a core: no table of 120 x 24 is read at run time
    assert all(array.size < 120 * 24 for array in compiled.program.weights.values())


def test_low_ranks_run_factored_where_that_is_faster_and_dense_where_not() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).eval()
    program = trace(model, (torch.randn(2, 1024),), None, "batch")
    small, large = sites_of(composed(import_exported(program)))
    new = substitute(program, [*low_rank(small, 16).factors(), *low_rank(large, 500).factors()])
    compiled = compile_exported(new, batch=32, check=False)
    shapes = {core.shape for n in compiled.program.networks for core in n.cores if len(core.shape) == 2}
    assert (1024, 16) in shapes or (16, 1024) in shapes
    assert (1024, 1024) in shapes


def test_several_weights_share_a_factor() -> None:
    (joint,) = joint_sites([*sites(Words).values()])
    assert joint.name == "query.weight+key.weight"
    new = substitute(exported(Words), Replacement(joint, svd(joint)).factors())
    cores = {name: tuple(p.shape) for name, p in new.state_dict.items() if "core" in name}
    assert cores == {
        "query.weight.core_0": (20, 20),
        "query.weight.core_1": (20, 24),
        "key.weight.core_1": (20, 24),
    }
    x = INPUTS[Words]()
    assert_close(run(new, x), run(exported(Words), x), tolerance=FLOAT32, what="shared")


def test_weights_that_are_computed_from_others() -> None:
    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(40, 40)), nn.Parameter(torch.randn(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.relu(x), torch.tril(self.weight) + 1, self.bias)

    program = trace(Lower().eval(), (torch.randn(2, 40),), None, "batch")
    (site,) = sites_of(composed(import_exported(program)), 100)
    assert site.name == "tril.weight"
    new = substitute(program, Replacement(site, svd(site)).factors())
    assert {*new.state_dict} == {"bias", "tril.weight.core_0", "tril.weight.core_1"}
    x = torch.randn(3, 40)
    assert_close(run(new, x), run(program, x), tolerance=FLOAT32, what="computed")


def test_a_layer_with_an_adapter_is_a_site_of_its_own() -> None:
    """The compiler adds the adapter into the layer; what is tensorized is the weight that the model has."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 48)
            self.a, self.b = nn.Parameter(torch.randn(40, 2)), nn.Parameter(torch.randn(2, 48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(x)) + torch.relu(x) @ self.a @ self.b

    program = trace(Adapted().eval(), (torch.randn(2, 40),), None, "batch")
    (site,) = sites_of(composed(import_exported(program)), 100)
    assert site.name == "layer.weight"
    new = substitute(program, Replacement(site, svd(site)).factors())
    assert {*new.state_dict} == {"layer.weight.core_0", "layer.weight.core_1", "layer.bias", "a", "b"}
    x = torch.randn(3, 40)
    assert_close(run(new, x), run(program, x), tolerance=FLOAT32, what="adapted")


def test_a_weight_called_like_a_value_and_a_buffer() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.Parameter(torch.randn(40, 40))
            self.register_buffer("fixed", torch.randn(40, 40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.relu) @ self.fixed  # type: ignore[operator]

    program = trace(Clash().eval(), (torch.randn(2, 40),), None, "batch")
    found = sites_of(composed(import_exported(program)), 100)
    assert {s.name for s in found} == {"relu.weight", "fixed"}
    new = substitute(program, [f for s in found for f in Replacement(s, svd(s)).factors()])
    x = torch.randn(3, 40)
    assert_close(run(new, x), run(program, x), tolerance=FLOAT32, what="renamed")
    assert not new.state_dict["fixed.core_0"].requires_grad and new.state_dict["relu.weight.core_0"].requires_grad


def test_a_weight_that_the_model_shows_and_one_of_half_precision() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(40, 40).half()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.fc(x), self.fc.weight

    program = trace(Shows().eval(), (torch.randn(2, 40).half(),), None, "batch")
    (site,) = sites_of(composed(import_exported(program)), 100)
    new = substitute(program, Replacement(site, svd(site)).factors())
    _, shown = new.module()(torch.randn(2, 40).half())
    assert shown.dtype == torch.float16
    old = site.parts[0].array
    assert_close(shown.detach().numpy(), old, tolerance=5e-3, what="the weight shown")


def test_no_step_of_the_rebuilding_is_larger_than_the_weight_must_be() -> None:
    generator = np.random.default_rng(0)
    names = ("a", "b", "c", "d")
    cores = [Core(f"w.{n}", generator.standard_normal((8, 6)), (n, "r")) for n in names]
    factors = Factors("w", (Core("w.weights", generator.standard_normal(6), ("r",)), *cores), names, (64, 64), (1, 0))
    values = [core.array for core in factors.cores]
    for step in factors.rebuilding.steps:
        values.append(np.einsum(step.equation, *(values[k] for k in step.inputs)))
        assert values[-1].size <= 64 * 64
    dense = np.einsum("r,ar,br,cr,dr->cdab", *(core.array for core in factors.cores)).reshape(64, 64)
    assert factors.rebuilding.order is None and factors.rebuilding.shape == (64, 64)
    np.testing.assert_allclose(values[-1].reshape(64, 64), dense, rtol=1e-10)


def factors_of(weight: str, shape: tuple[int, int] = (24, 20)) -> Factors:
    left, right = np.zeros((shape[0], 2)), np.zeros((2, shape[1]))
    cores = (Core(f"{weight}.core_0", left, ("o", "r")), Core(f"{weight}.core_1", right, ("r", "i")))
    return Factors(weight, cores, ("o", "i"), shape, (0, 1))


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ([factors_of("nothing")], "no weight nothing"),
        ([factors_of("query.weight", (24, 21))], r"query.weight is float32\[24, 20\]"),
        ([factors_of("query.weight"), factors_of("query.weight")], "query.weight is replaced twice"),
        ([factors_of("ids")], "no weight ids"),
        ([factors_of("linear", (4, 24))], "depends on the input|no weight|its cores make"),
    ],
)
def test_what_cannot_be_replaced_is_refused(factors: list[Factors], says: str) -> None:
    with pytest.raises(TNCompileError, match=says):
        substitute(exported(Words), factors)


def test_a_weight_that_the_model_writes_to_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(24, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state.mul_(0.5)  # type: ignore[operator]
            return x @ self.state  # type: ignore[operator, no-any-return]

    program = torch.export.export(Writes(), (torch.randn(2, 24),)).run_decompositions({})
    with pytest.raises(TNCompileError, match="state cannot be replaced: the model writes to it"):
        substitute(program, [factors_of("state")])


def test_cores_that_disagree_are_refused() -> None:
    with pytest.raises(TNCompileError, match="disagree: r is 2 and 3"):
        Factors(
            "w",
            (Core("a", np.zeros((4, 2)), ("o", "r")), Core("b", np.zeros((3, 5)), ("r", "i"))),
            ("o", "i"),
            (4, 5),
            (0, 1),
        )
    with pytest.raises(TNCompileError, match="have not the modes"):
        Factors("w", (Core("a", np.zeros((4, 2)), ("o", "r")),), ("o",), (4, 5), (0, 1))
