"""Tables of which rows are gathered: rows of cores instead, and which cores to merge into tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import assert_close, evaluate_program, operators
from tests.test_adapters import largest_array
from tncompile.commands.bench import DENSE_PASSES
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Network, Opaque, Program
from tncompile.passes import Context, Pipeline, parse_passes
from tncompile.passes.positions import EMBEDDING, Position, read

BATCHES = Context(batches=(1, 8))
BEFORE_ORDER = "clean,stacks,gathers,fold,clean,merge_cores,tables{},clean"


class Train(nn.Module):
    """A tensor-train embedding of any modes, read in one of the ways people write it."""

    def __init__(self, rows: list[int], columns: list[int], rank: int, way: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(len(rows) + rank)
        self.rows, self.columns, self.way = rows, columns, way
        ranks = [1, *[rank] * (len(rows) - 1), 1]
        self.cores = nn.ParameterList(
            torch.randn(ranks[k], rows[k], columns[k], ranks[k + 1], generator=generator) for k in range(len(rows))
        )

    def table(self) -> torch.Tensor:
        full = self.cores[0][0]
        for core in list(self.cores)[1:]:
            full = torch.einsum("aer,rifs->aiefs", full, core).reshape(
                full.shape[0] * core.shape[1], full.shape[1] * core.shape[2], core.shape[3]
            )
        return full[..., 0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.way == "embedding":
            return F.embedding(ids, self.table())
        if self.way == "index":
            return self.table()[ids]
        if self.way == "select":
            return self.table().index_select(0, ids.reshape(-1))
        if self.way == "columns":
            return self.table().T[:, ids]
        rest, chosen = ids, []
        for size in reversed(self.rows):
            chosen.insert(0, rest % size)
            rest = rest // size
        if self.way == "several":
            full = self.table().reshape(*self.rows, -1)
            return full[tuple(chosen)]
        result = self.cores[0][0, chosen[0]]
        for core, place in zip(list(self.cores)[1:], chosen[1:], strict=True):
            result = torch.einsum("...er,r...fs->...efs", result, core[:, place]).flatten(-3, -2)
        return result[..., 0]


WAYS = ["embedding", "index", "select", "columns", "several", "cores"]


def planned(
    module: nn.Module, ids: torch.Tensor, options: str = "{whole=0}", context: Context = BATCHES
) -> tuple[Program, Program, list[str]]:
    """The program as traced and before it is ordered, and what was done; `options` are those of `tables`, by default
    without one table of all."""
    program = import_exported(trace(module, (ids,))).program
    passes = parse_passes(BEFORE_ORDER.format(options))
    after, reports = Pipeline(passes, scheduled=False).run(program, context)
    return program, after, [str(c) for r in reports if r.name in ("gathers", "tables") for c in r.changes]


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from(WAYS),
    st.sampled_from(["{whole=0}", ""]),
    st.integers(0, 100),
)
def test_every_way_to_write_a_train(modes: list[tuple[int, int]], rank: int, way: str, options: str, seed: int) -> None:
    rows, columns = [i for i, _ in modes], [e for _, e in modes]
    module, size = Train(rows, columns, rank, way), math.prod(rows)
    ids = torch.randint(0, size, (3, 4), generator=torch.Generator().manual_seed(seed))
    _, after, _ = planned(module, ids, options)
    name = after.inputs[0].name
    for given_ids in (ids, torch.full((2, 4), size - 1)):
        expected = module.double()(given_ids).detach().numpy()
        found = evaluate_program(after, {name: given_ids.numpy()}, {"batch": len(given_ids)})["output"]
        assert_close(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_table_serves_where_it_is_faster(way: str) -> None:
    module = Train([10, 12, 9], [4, 4, 6], 4, way)
    ids = torch.randint(0, 1080, (4, 5), generator=torch.Generator().manual_seed(0))
    for store, least, most in (("folded", 1080 * 96 * 4, math.inf), ("cores", 0, 1080 * 96)):
        compiled = tncompile.compile(module, (ids,), batch=(1, 32), store=store)
        assert {"Gather"} <= {*operators(compiled.onnx)}
        assert not {"Div", "Einsum"} & {*operators(compiled.onnx)}  # some ways wrap ids that are too large: a Mod
        assert least < compiled.report.size < most
        assert_close(compiled.run(ids), module.double()(ids).detach().numpy(), tolerance=1e-5)
        module.float()


@pytest.mark.parametrize("way", WAYS)
def test_the_table_is_never_there_where_the_file_must_not_grow(way: str) -> None:
    module = Train([10, 12, 9], [4, 4, 6], 4, way)
    ids = torch.randint(0, 1080, (4, 5), generator=torch.Generator().manual_seed(0))
    compiled = tncompile.compile(module, (ids,), batch=(1, 32), compact=True)
    assert largest_array(compiled.onnx) < 1080 * 96 / 4
    assert {"Gather", "Mod"} <= {*operators(compiled.onnx)}
    assert not {"GatherND", "Einsum"} & {*operators(compiled.onnx)}
    assert_close(compiled.run(ids), module.double()(ids).detach().numpy(), tolerance=1e-5)


def test_one_table_is_refused_where_it_is_too_large() -> None:
    module = Train([10, 12, 9], [4, 4, 6], 4, "cores")
    ids = torch.randint(0, 1080, (4, 5), generator=torch.Generator().manual_seed(0))

    def gathers(options: str, context: Context) -> int:
        _, after, _ = planned(module, ids, options, context)
        return sum(isinstance(n, Opaque) and n.target == EMBEDDING for n in after.nodes)

    size = 1080 * 96
    assert gathers(f"{{whole={size}}}", BATCHES) == 1
    assert gathers(f"{{whole={size - 1}}}", BATCHES) > 1
    assert gathers("", Context(batches=(1, 8), max_memory=4 * size)) == 1
    assert gathers("", Context(batches=(1, 8), max_memory=4 * size - 1)) > 1


@pytest.mark.parametrize("way", WAYS)
def test_the_dense_way_has_one_table(way: str) -> None:
    module = Train([10, 12, 9], [4, 4, 6], 4, way)
    ids = torch.randint(0, 1080, (4, 5), generator=torch.Generator().manual_seed(0))
    compiled = tncompile.compile(module, (ids,), batch=(1, 32), passes=parse_passes(DENSE_PASSES), store="folded")
    assert not {"Div", "MatMul", "Mul"} & {*operators(compiled.onnx)}
    assert_close(compiled.run(ids), module.double()(ids).detach().numpy(), tolerance=1e-5)


def test_negative_ids_count_from_the_end_where_torch_lets_them() -> None:
    module = Train([4, 5, 6], [2, 3, 2], 3, "index")
    ids = torch.arange(-120, 120).reshape(4, 60)
    compiled = tncompile.compile(module, (ids,), batch=(4,))
    assert_close(compiled.run(ids), module.double()(ids).detach().numpy(), tolerance=1e-5)
    with pytest.raises(Exception, match="out of data bounds"):
        compiled.run(torch.full((4, 60), 120))


def test_a_small_table_is_computed() -> None:
    module = Train([3, 2], [2, 2], 4, "embedding")
    ids = torch.tensor([[0, 5], [3, 1]])
    _, after, told = planned(module, ids)
    assert [n for n in after.nodes if isinstance(n, Network)] == []
    assert "as a whole" in told[0]


def test_a_scale_of_rows_is_gathered_too() -> None:
    class Scaled(Train):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.table() * torch.arange(1.0, 121.0)[:, None] + self.cores[0][0, 0, 0, 0])[ids]

    module, ids = Scaled([4, 5, 6], [2, 3, 2], 3, ""), torch.tensor([[119, 0, 60], [3, 118, 7]])
    program, after, _ = planned(module, ids)
    expected = evaluate_program(program, {"ids": ids.numpy()}, {"batch": 2})["output"]
    assert_close(evaluate_program(after, {"ids": ids.numpy()}, {"batch": 2})["output"], expected, tolerance=1e-5)
    assert sum(isinstance(n, Opaque) and n.target == EMBEDDING for n in after.nodes) >= 2


def test_a_diagonal_is_not_taken_apart() -> None:
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
            self.b = nn.Parameter(torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.diag(self.a @ self.b)[ids] * torch.diag_embed(self.a @ self.b)[ids, ids].sum(-1)

    module, ids = Diagonal(), torch.tensor([[0, 5, 2], [3, 1, 4]])
    _, after, _ = planned(module, ids)
    found = evaluate_program(after, {"ids": ids.numpy()}, {"batch": 2})["output"]
    assert_close(found, module.double()(ids).detach().numpy(), tolerance=1e-5)


def test_a_projection_goes_into_the_table_where_that_is_smaller() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 8))
    ids = torch.randint(0, 50, (4, 6))
    _, after, told = planned(model, ids)
    (gather,) = [n for n in after.nodes if isinstance(n, Opaque)]
    assert gather.output.shape == ("batch", 6, 8)
    assert "are one table" in told[-1]
    assert_close(
        evaluate_program(after, {"input": ids.numpy()}, {"batch": 4})["output"],
        model.double()(ids).detach().numpy(),
        tolerance=1e-5,
    )
    wide = nn.Sequential(nn.Embedding(50_000, 4), nn.Linear(4, 64))
    _, after, _ = planned(wide, ids)
    (gather,) = [n for n in after.nodes if isinstance(n, Opaque)]
    assert gather.output.shape == ("batch", 6, 4)


def test_tables_that_meet_in_a_core_alone_are_merged_too() -> None:
    """Rows of a Tucker table: its factors share the ids, and no bond."""

    class Tucker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.factors = nn.ParameterList(torch.randn(n, 4, generator=generator) for n in (12, 15, 20))
            self.core = nn.Parameter(torch.randn(4, 4, 4, 64, generator=generator))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            table = torch.einsum("ia,jb,kc,abce->ijke", *self.factors, self.core)
            return F.embedding(ids, table.reshape(3600, 64))

    module, ids = Tucker(), torch.arange(3600).reshape(36, 100)
    _, after, told = planned(module, ids)
    gathers = [n for n in after.nodes if isinstance(n, Opaque) and n.target == EMBEDDING]
    assert sorted(n.output.shape[-1] for n in gathers) == [4, 16]
    assert any("factors.0 and factors.1 are one table" in line for line in told)
    found = evaluate_program(after, {"ids": ids.numpy()}, {"batch": 36})["output"]
    assert_close(found, module.double()(ids).detach().numpy(), tolerance=1e-5)


def test_tables_that_others_read_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(50, 64), nn.Linear(64, 8)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = self.embedding(ids)
            return self.out(rows), rows.relu()

    _, after, _ = planned(Twice(), torch.randint(0, 50, (4, 6)))
    (gather,) = [n for n in after.nodes if isinstance(n, Opaque) and n.target == EMBEDDING]
    assert gather.output.shape == ("batch", 6, 64)


def test_the_report_counts_the_tables() -> None:
    module = Train([10, 12, 9], [4, 4, 6], 4, "cores")
    compiled = tncompile.compile(module, (torch.randint(0, 1080, (4, 5)),), batch=(1, 32), check=False)
    (network,) = compiled.report.networks
    assert network.parameters == sum(p.numel() for p in module.parameters())
    assert network.dense_parameters == 1080 * 96
    assert any("one table" in line for line in network.decisions)


def test_positions_are_read_through_successive_divisions() -> None:
    class Successive(nn.Module):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = ids // 6
            return rest // 5, rest % 5, ids % 30 // 6, ids % 7 // 2, ids % 12 % 4

    program = import_exported(trace(Successive(), (torch.arange(8).reshape(2, 4),))).program
    nodes = {n.value.name: n for n in program.nodes}
    a, b, c, d, e = (read(name, nodes) for _, name in program.outputs)
    assert (a, b, c) == (Position("ids", 30), Position("ids", 6, 5), Position("ids", 6, 5))
    assert d.ids != "ids"  # ids % 7 // 2 is no mode of any shape
    assert e == Position("ids", 1, 4)
    assert a.before(b, 5) == Position("ids", 6)
    assert b.before(a, 3) is None
    assert np.array_equal(np.arange(120) // 6 % 5, np.arange(120) % 30 // 6)
