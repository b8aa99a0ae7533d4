"""Layout: transposes between layers go, numbers stay, and what may not be touched is not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import onnx_ir
import pytest
import torch

import tncompile
from tests.helpers import assert_close, assert_exact, feeds_for, operators, program_of, reference, session_of
from tests.test_property import RUNS, several
from tncompile.compiler import to_bytes
from tncompile.cost.datasheet import from_datasheet
from tncompile.emit.program import to_onnx
from tncompile.frontend.importer import TracedModel, import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Network, Opaque, Program, Switch, Value, dims, verify
from tncompile.ir import text as ir_text
from tncompile.ir.edit import CannotEdit
from tncompile.passes import Change, Context, Layout, Order, Pass, Pipeline, parse_passes
from tncompile.passes.layout import _Work
from tncompile.passes.pointwise import POINTWISE, joined
from tncompile.passes.regions import modes_of, regions, relaid

WITHOUT = parse_passes("clean,fold,clean,merge_cores,order")
TOLERANCE = 2e-6  # float32 against float64, a few layers deep
Module = Callable[[torch.Tensor], torch.Tensor]

PROFILE = from_datasheet("a test", 200e9, 20e9, launch=0.5e-6, tile=8)
"""What these tests plan for, so that they do not change with the shipped profile: transposes are dear."""


class Train(torch.nn.Module):
    """m² -> m² as a tensor train of two cores; in flat order, one step needs a transpose."""

    def __init__(self, m: int = 64, rank: int = 4) -> None:
        super().__init__()
        self.m = m
        self.first = torch.nn.Parameter(torch.randn(m, m, rank) / m**0.5)
        self.second = torch.nn.Parameter(torch.randn(rank, m, m) / (m * rank) ** 0.5)
        self.bias = torch.nn.Parameter(torch.randn(m * m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bij,ior,rjp->bop", x.unflatten(-1, (self.m, self.m)), self.first, self.second)
        return y.flatten(-2) + self.bias


class Monarch(torch.nn.Module):
    """Blocks, a permutation, blocks: their modes are batch modes of the matmuls, best in front of the batch."""

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.k = k
        self.first, self.second = (torch.nn.Parameter(torch.randn(k, k, k) / k**0.5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bki,kir,rkp->brp", x.unflatten(-1, (self.k, self.k)), self.first, self.second)
        return y.flatten(-2)


class Through(torch.nn.Module):
    """Layers with some function between."""

    def __init__(self, between: Module, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.between = between
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self.layers
        x = first(x)
        for layer in rest:
            x = layer(self.between(x))
        return x


def compiled(
    module: torch.nn.Module, size: int, batch: tuple[int, ...] = (1, 32)
) -> tuple[tncompile.CompiledModel, tuple[Change, ...]]:
    """A module by the default passes, compared with torch in float64 at two batch sizes, and what `layout` did."""
    module.eval()
    result = tncompile.compile(module, (torch.randn(2, size),), batch=batch, check=False, profile=PROFILE)
    wide = module.double()
    for rows in (1, 5):
        x = torch.randn(rows, size)
        with torch.no_grad():
            expected = wide(x.double())
        found = result.run(x)
        found = list(found.values()) if isinstance(found, dict) else [found]
        for ours, theirs in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
            assert_close(ours, theirs.numpy(), tolerance=TOLERANCE)
    module.float()
    (report,) = (p for p in result.report.passes if p.name == "layout")
    return result, report.changes


def transposes(module: torch.nn.Module, size: int, passes: Sequence[Pass] = WITHOUT) -> int:
    """How many a module takes by some passes."""
    example = (torch.randn(2, size),)
    result = tncompile.compile(module.eval(), example, batch=(32, 256), check=False, profile=PROFILE, passes=passes)
    return operators(result.onnx).count("Transpose")


# ------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("layers", [2, 3])
def test_fewer_transposes_around_a_relu(layers: int) -> None:
    torch.manual_seed(0)
    model = Through(torch.relu, *(Monarch() for _ in range(layers)))
    result, changes = compiled(model, 1024, (32, 256))
    assert operators(result.onnx).count("Transpose") < transposes(model, 1024)
    assert changes
    assert not any(c.declined for c in changes)


@pytest.mark.parametrize(
    "between",
    [
        torch.nn.functional.gelu,
        torch.sigmoid,
        lambda x: torch.clamp(x, -0.5, 2.0),
        torch.nn.functional.silu,
        lambda x: torch.nn.functional.leaky_relu(torch.tanh(x), 0.1),
        torch.nn.functional.softsign,  # x / (1 + |x|): three values and a network that must agree
    ],
)
def test_operations_on_each_element_are_passed_through(between: Module) -> None:
    torch.manual_seed(0)
    model = Through(between, Monarch(), Monarch())
    result, changes = compiled(model, 1024, (32, 256))
    assert [c.declined for c in changes] == [False]
    assert operators(result.onnx).count("Transpose") < transposes(model, 1024)


def test_a_batch_may_move_behind_other_modes() -> None:
    """The value has the batch last then, a shape that was not traced."""
    torch.manual_seed(0)
    model = Through(torch.relu, Monarch(), Monarch())
    result, changes = compiled(model, 1024, (32, 256))
    assert len(changes) == 1
    shapes = [n.output.shape for n in result.program.nodes if isinstance(n, Opaque)]
    assert shapes != [("batch", 1024)]
    assert all("batch" in (shape or ()) for shape in shapes)
    assert changes[0].details["microseconds"] < changes[0].details["before"]


def test_the_report_shows_traced_shapes_and_the_decision() -> None:
    torch.manual_seed(0)
    result, changes = compiled(Through(torch.relu, Monarch(), Monarch()), 1024, (32, 256))
    first, _ = result.report.networks
    assert first.output == "[batch 1024]"
    assert any(changes[0].what in line for line in first.decisions)


def test_a_margin_that_nothing_reaches() -> None:
    program, context = scheduled(Through(torch.relu, Monarch(), Monarch()), 1024, (32, 256))
    after, changes = Layout(margin=0.99).run(program.program, context)
    assert after is program.program
    assert changes == ()


# ------------------------------------------------------------------------------------ what it leaves alone


class Branches(torch.nn.Module):
    """Two layers, and something else that reads what is between."""

    def __init__(self, other: Module) -> None:
        super().__init__()
        self.first, self.second, self.other = Monarch(), Monarch(), other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(self.first(x))
        return self.second(h), self.other(h)


@pytest.mark.parametrize(
    "other",
    [
        lambda h: h,
        lambda h: torch.softmax(h, -1),
        lambda h: torch.cat([h, h], -1),
        lambda h: torch.nn.functional.layer_norm(h, (1024,)),
        lambda h: torch.cumsum(h, -1),
    ],
)
def test_what_others_read_in_its_order_stays(other: Module) -> None:
    torch.manual_seed(0)
    _, changes = compiled(Branches(other), 1024, (32, 256))
    assert changes == ()


def test_another_elementwise_reader_that_ends_in_a_network_does_not_matter() -> None:
    torch.manual_seed(0)
    model = Branches(Through(torch.sigmoid, torch.nn.Sigmoid(), Monarch()))
    _, changes = compiled(model, 1024, (32, 256))
    assert len(changes) == 1


def scheduled(model: torch.nn.Module, size: int, batches: tuple[int, ...]) -> tuple[TracedModel, Context]:
    """A traced model with the program that the passes before `layout` make of it, and the context."""
    traced = import_exported(trace(model.eval(), (torch.randn(2, size),), None, "batch"))
    context = Context(batches=batches, outputs=frozenset(name for _, name in traced.program.outputs))
    program, _ = Pipeline(WITHOUT).run(traced.program, context)
    return TracedModel(traced.exported, program, traced.sizes, traced.symbols), context


def test_unscheduled_programs_are_left_alone() -> None:
    traced = import_exported(
        trace(Through(torch.relu, Monarch(), Monarch()).eval(), (torch.randn(2, 1024),), None, "batch")
    )
    after, changes = Layout().run(traced.program, Context())
    assert after is traced.program
    assert changes == ()


SUM = """
program
  input x: float32[batch, 12]
  network h: float32[batch, 12]
    indices b=batch, o=12, i=12
    term
      0 operand x[b, i]
      1 core A[i, o]
      steps
        2 = matmul(0, 1) -> [b, o]
    -> h[b, o]
  network y: float32[batch, 12]
    indices b=batch, o=12, i=12
    term
      0 operand h[b, o]
      steps
    term
      0 operand h[b, i]
      1 core B[i, o]
      steps
        2 = matmul(0, 1) -> [b, o]
    -> y[b, o]
  opaque r: float32[batch, 12] = aten.relu.default(%y)
  opaque s: float32[batch, 12] = aten.pow.Tensor_Scalar(%r, 2.0)
  network z: float32[batch, 12]
    indices b=batch, o1=3, o2=4
    term
      0 operand s[b, (o1 o2)]
      steps
    -> z[b, (o1 o2)]
  output z = z
"""


def test_regions_and_their_unions() -> None:
    """What elementwise operations join is one region; a sum of whole networks joins two of them for one more try."""
    found = {region.values for region in regions(program_of(SUM))}
    assert found == {frozenset({"h"}), frozenset({"y", "r", "s"}), frozenset({"h", "y", "r", "s"})}
    assert regions(program_of(SUM.replace("output z = z", "output z = z\n  output r = r")))[0].values == {"h"}


def test_modes_that_do_not_nest_are_declined_with_the_reason() -> None:
    text = """
program
  input x: float32[batch, 24]
  network h: float32[batch, 24]
    indices b=batch, o1=4, o2=6, i=24
    term
      0 operand x[b, i]
      1 core A[i, o1, o2]
      steps
        2 = matmul(0, 1) -> [b, o1, o2]
    -> h[b, (o1 o2)]
  opaque r: float32[batch, 24] = aten.relu.default(%h)
  network z: float32[3, batch, 8]
    indices b=batch, i1=3, i2=8
    term
      0 operand r[b, (i1 i2)]
      steps
    -> z[i1, b, i2]
  output z = z
"""
    _, changes = Layout().run(program_of(text), Context())
    assert [(c.network, c.declined) for c in changes] == [("h", True)]
    assert "do not nest" in changes[0].why


# ------------------------------------------------------------------------------------ the table


def test_the_table_agrees_with_torch() -> None:
    untagged = set()
    for target in POINTWISE:
        _, packet, overload = target.split(".")
        if torch.Tag.pointwise not in getattr(getattr(torch.ops.aten, packet), overload).tags:
            untagged.add(packet)
    assert untagged == {"_to_copy", "hardswish", "log_sigmoid"}


def test_what_is_not_for_each_element_alone() -> None:
    program = program_of(SUM)
    relu = next(n for n in program.nodes if isinstance(n, Opaque))
    assert joined(relu, program.values) == ("y",)
    assert joined(relu, {**program.values, "y": Value("y", "float32", (12,))}) == ()  # broadcast
    copy = ir_text.parse(
        SUM.replace("aten.relu.default(%y)", "aten.clone.default(%y, memory_format=torch.channels_last)")
    )
    assert joined(next(n for n in copy.nodes if isinstance(n, Opaque)), program.values) == ()


# ------------------------------------------------------------------------------------ any order at all


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_a_traced_model(seed: int) -> None:
    """Whatever the cost model says: another order, at random, of every region, through torch's exporter."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Through(torch.nn.functional.gelu, Train(6, 2), Train(6, 2), Monarch(6) if seed % 2 else Train(6, 3))
    traced, context = scheduled(model, 36, (1, 256))
    program = traced.program
    work = _Work(context)
    for region in regions(program):
        modes = modes_of(program, region)
        order = rng.choice(modes.orders(8) or [])
        program = relaid(modes, region, order, work.rescheduled)
        verify(program, "scheduled")
    source = import_exported(trace(model, (torch.randn(2, 36),), None, "batch"))
    session = session_of(to_bytes(program, source))
    wide = model.double()
    for rows in (1, 4):
        x = torch.randn(rows, 36)
        with torch.no_grad():
            expected = wide(x.double()).numpy()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(found, expected, tolerance=TOLERANCE)


def anywhere(program: Program, context: Context, rng: random.Random) -> tuple[Program, int]:
    """Every region whose modes nest in another order, at random, and how many these are."""
    work, count = _Work(context), 0
    for region in regions(program):
        try:
            modes = modes_of(program, region)
        except CannotEdit:
            continue
        orders = modes.orders(6)
        if orders:
            program = relaid(modes, region, rng.choice(orders), work.rescheduled)
            verify(program, "scheduled")
            count += 1
    return program, count


def test_any_order_of_random_chains() -> None:
    """Networks that read each other in all kinds of groups, some chosen by the batch size at run time."""
    total = 0
    for seed in range(40):
        rng = random.Random(seed)
        program = several(seed)
        context = Context(batches=(1, 7))
        ordered, _ = Order().run(program, context)
        if any("batch" in dims.symbols(d) for v in program.inputs for d in v.shape or ()):
            nodes = [Switch("batch", (2,), (n, n)) if isinstance(n, Network) else n for n in ordered.nodes]
            ordered = Program(ordered.inputs, tuple(nodes), ordered.outputs)
        after, count = anywhere(ordered, context, rng)
        total += count
        if not count:
            continue
        model = onnx_ir.to_proto(to_onnx(after, TracedModel(None, after, {})))  # type: ignore[arg-type]
        session = session_of(model.SerializeToString())
        for symbols in RUNS:
            feeds = feeds_for(program, symbols)
            expected = reference(program, feeds, symbols)
            magnitude = reference(program, feeds, symbols, absolute=True)
            for (public, name), found in zip(program.outputs, session.run(None, feeds), strict=True):
                what = f"seed {seed}: {public} at {symbols}\n{ir_text.dump(after)}"
                assert_exact(found, expected[name], magnitude[name], "float32", roundings=200, what=what)
    assert total > 20
