"""Predicted times of replacements: those of the plans that the compiler makes of the substituted model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tensorize.replaced import Images, Words, exact_formats, exported, imported, low_rank, sites
from tncompile.compiler import compile_exported, planning_context, run_passes
from tncompile.cost.devices import default_profile
from tncompile.decomp import MatrixTrain, Ranks, TensorTrain, Tucker
from tncompile.frontend.factors import substitute
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Program, Switch
from tncompile.passes import Context
from tncompile.passes.images import images
from tncompile.passes.plans import cost_of
from tncompile.tensorizer.cost import Predictor
from tncompile.tensorizer.sites import Replacement, Site, composed, sites_of

BATCHES = (1, 64)


def context_of(kind: type[nn.Module]) -> Context:
    return planning_context(imported(kind), BATCHES, {}, default_profile())


def planned(program: Program, context: Context, cores: str) -> list[float]:
    """Seconds of the networks of a scheduled program that hold such cores, at each batch size."""
    context = replace(context, images=images(program))
    total = [0.0] * len(context.batches)
    for node in program.nodes:
        networks = getattr(node, "cases", (node,))
        if not any(core.name.startswith(cores) for n in networks for core in getattr(n, "cores", ())):
            continue
        for k, batch in enumerate(context.batches):
            network = node.case(batch) if isinstance(node, Switch) else networks[0]
            moving = [term for term in network.terms if not term.is_constant]
            total[k] += sum(cost_of(network, term, None, context, batch).seconds for term in moving)
            total[k] += context.profile.branch * isinstance(node, Switch)
    return total


def smaller(site: Site, number: int) -> Replacement:
    """One of several formats, at a third of the size."""
    rows, columns = site.matrix.shape
    size = Ranks(parameters=site.size // 3)
    ins = tuple(n for n in site.in_sizes if n > 1)
    kernel = (ins if len(ins) > 1 else ((rows,))), (columns,)
    if number == 0:
        return low_rank(site, max(1, site.size // 3 // (rows + columns)))
    kind = (TensorTrain, Tucker)[number % 2]
    return Replacement(site, kind.from_dense(site.matrix, kernel, size))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_predictions_are_those_of_the_compiled_whole(number: int) -> None:
    context = context_of(Images)
    predictor = Predictor(composed(imported(Images), context), context)
    chosen = {name: smaller(site, number) for name, site in sites(Images).items()}
    new = import_exported(substitute(exported(Images), [f for r in chosen.values() for f in r.factors()]))
    stages, _ = run_passes(new, context)
    for name, replacement in chosen.items():
        expected = planned(stages["order"], context, f"{name}.core_")
        assert predictor.seconds(sites(Images)[name], replacement) == pytest.approx(expected, rel=0.02)


def test_rows_of_a_factored_table_cost_a_product_and_those_of_a_dense_one_nothing() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(500, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.table(ids))

    model = import_exported(trace(Table().eval(), (torch.randint(0, 500, (2, 7)),), None, "batch"))
    program = composed(model)
    (site,) = sites_of(program)
    predictor = Predictor(program, Context(batches=BATCHES))
    assert predictor.seconds(site) == (0.0, 0.0)
    times = predictor.seconds(site, low_rank(site, 8))
    assert 0 < times[0] < times[1]
    train = Replacement(site, MatrixTrain.from_dense(site.matrix, ((20, 25), (8, 8)), Ranks(given=4)))
    assert predictor.seconds(site, train) == (0.0, 0.0)  # its cores are the one table again when it is loaded
    compact = Predictor(program, Context(batches=BATCHES, compact=True))
    assert compact.seconds(site, train)[1] > 0
    for chosen in (predictor, compact):
        assert 4 * train.factorized.parameters <= chosen.cost(site, train).bytes < site.matrix.nbytes


def test_what_is_as_fast_dense_is_predicted_so() -> None:
    context = context_of(Images)
    predictor = Predictor(composed(imported(Images), context), context)
    site = sites(Images)["fc.weight"]
    full = Replacement(site, exact_formats(Images, "fc.weight")[0])
    assert predictor.seconds(site, full) == pytest.approx(predictor.seconds(site))
    assert predictor.cost(site).bytes == 4 * site.size
    assert predictor.cost(site, low_rank(site, 2)).bytes == 4 * 2 * sum(site.matrix.shape)


@pytest.mark.parametrize("kind", [Words, Images])
def test_bytes_are_those_of_the_file(kind: type[nn.Module]) -> None:
    """But for names, nodes and the few numbers that are no weights; the table is shared by two networks."""
    context = context_of(kind)
    predictor = Predictor(composed(imported(kind), context), context)
    total, chosen = 0, []
    for site in sites(kind).values():
        chosen += low_rank(site, 3).factors()
        total += predictor.cost(site, low_rank(site, 3)).bytes
    compiled = compile_exported(substitute(exported(kind), chosen), batch=BATCHES, profile="default", store="cores")
    assert total < len(compiled.onnx) < total + 60_000


def test_modes_that_do_not_nest_leave_the_layer_dense() -> None:
    context = context_of(Words)
    predictor = Predictor(composed(imported(Words), context), context)
    site = sites(Words)["query.weight"]  # 24 out of it are 3 heads of 8
    awkward = Replacement(site, TensorTrain.from_dense(site.matrix, ((4, 5), (2, 12)), Ranks(given=1)))
    assert all(t >= 0 for t in predictor.seconds(site, awkward))
