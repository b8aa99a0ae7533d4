"""The pipeline: options on the command line, the verifier around every pass, reports and progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.helpers import program_of
from tncompile.errors import TNCompileError, VerificationError
from tncompile.ir import Program, Tensor, Term, verify
from tncompile.passes import (
    DEFAULT,
    Change,
    Clean,
    Context,
    Fold,
    Layout,
    Limit,
    MergeCores,
    Order,
    Pass,
    PassReport,
    Pipeline,
    parse_passes,
)

TEXT = """
program
  input x: float32[batch, 4]
  network y: float32[batch, 5], layer fc
    indices b=batch, o=5, i=4
    term
      0 operand x[b, i]
      1 core fc.weight[i, o]
    -> y[b, o]
  output y = y
"""


# ------------------------------------------------------------------------------------ parse_passes


EVERY = (
    "clean stacks gathers fold clean trim fold steps join stacks fold clean "
    "merge_cores tables blocks clean order layout"
)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (EVERY.replace(" ", ","), DEFAULT),
        ("clean", (Clean(),)),
        ("order", (Order(),)),
        (" clean , fold ", (Clean(), Fold())),
        ("fold{max_tensors=8},order", (Fold(max_tensors=8), Order())),
        ("order{max_trials=64,margin=0.25}", (Order(max_trials=64, margin=0.25),)),
        ("order{max_trials=64 keep=2}", (Order(max_trials=64, keep=2),)),
        ("fold{},order", (Fold(), Order())),
        ("fold{apart=True}", (Fold(apart=True),)),
        ("merge_cores", (MergeCores(),)),
        ("clean,order,limit{max_slices=8}", (Clean(), Order(), Limit(max_slices=8))),
    ],
)
def test_passes_of_a_text(text: str, passes: tuple[Pass, ...]) -> None:
    assert parse_passes(text) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cleen", "no pass 'cleen'; the passes are clean, stacks, gathers, trim, fold, join, steps, merge_cores"),
        ("clean,order,magic{x=1}", "no pass 'magic'"),
        ("order{speed=9}", "order has no option 'speed'; it has max_trials"),
        ("clean{x=1}", "clean has no option 'x'; it has none"),
        ("order{max_trials=many}", "order: max_trials takes int, not 'many'"),
        ("fold{apart=1}", "fold: apart takes bool, not '1'"),
        ("fold{max_tensors=1.5}", "fold: max_tensors takes int, not '1.5'"),
        ("order{margin=}", "order: margin takes float, not ''"),
        ("order{max_trials=8", "no pass 'max_trials=8'"),
        ("order,clean", "order must be the last pass, but for layout and limit"),
        ("clean,order,limit,fold", "order must be the last pass, but for layout and limit"),
        ("order,order", "order must be the last pass, but for layout and limit"),
    ],
)
def test_what_is_wrong_with_a_text(text: str, message: str) -> None:
    with pytest.raises(TNCompileError) as error:
        parse_passes(text)
    assert str(error.value).startswith(message)


def test_names_are_spelled_as_on_the_command_line() -> None:
    assert [p.name() for p in DEFAULT] == EVERY.split()


# ------------------------------------------------------------------------------------ the verifier


@dataclass(frozen=True)
class Breaks(Pass):
    """A pass with a fault."""

    fault: str

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        network = program.networks[0]
        x, core = network.terms[0].tensors
        assert core.data is not None
        broken: dict[str, Term] = {
            "size": Term((x, Tensor(core.name, core.axes, core.data[:-1]))),
            "dtype": Term((x, Tensor(core.name, core.axes, core.data.astype(np.float64)))),
            "order": Term((x, core), order=(0, 0)),
            "name": Term((Tensor("z", x.axes), core)),
        }
        return replace(program, nodes=(replace(network, terms=(broken[self.fault],)),)), ()


@pytest.mark.parametrize("fault", ["size", "dtype", "order", "name"])
def test_the_fault_of_a_pass_is_found_behind_it_and_named(fault: str) -> None:
    """The message has the pass, the node and the node's text, so that one can start looking."""
    seen: list[str] = []
    with pytest.raises(VerificationError) as error:
        Pipeline((Clean(), Breaks(fault), Order())).run(program_of(TEXT), Context(), lambda name, _: seen.append(name))
    assert seen == ["clean"]  # no pass ran behind it
    message = str(error.value)
    assert "network y: float32[batch, 5], layer fc" in message
    assert "breaks" in message


def test_a_program_that_is_broken_already_is_not_blamed_on_a_pass() -> None:
    program, _ = Breaks("size").run(program_of(TEXT), Context())
    with pytest.raises(VerificationError, match="fc"):
        Pipeline().run(program, Context())


@dataclass(frozen=True)
class Unschedules(Pass):
    """Takes the schedules away again."""

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        network = program.networks[0]
        terms = tuple(replace(t, steps=None) for t in network.terms)
        return replace(program, nodes=(replace(network, terms=terms),)), ()


def test_what_comes_out_is_scheduled() -> None:
    """Order runs at the end where no such pass was asked for, or where another follows it."""
    for passes in ((), (Clean(),), (Order(), Clean()), (Order(), Unschedules())):
        program, reports = Pipeline(passes).run(program_of(TEXT), Context())
        verify(program, "scheduled")
        assert reports[-1].name == "order"
        assert len(reports) == len(passes) + 1
    for passes in ((Layout(),), (Layout(), Clean()), (Order(), Layout())):
        program, reports = Pipeline(passes).run(program_of(TEXT), Context())
        verify(program, "scheduled")
        assert [r.name for r in reports[-2:]] == ["order", "layout"]
    program, reports = Pipeline((Clean(),), scheduled=False).run(program_of(TEXT), Context())
    assert [r.name for r in reports] == ["clean"]
    assert program.networks[0].terms[0].steps is None


# ------------------------------------------------------------------------------------ reports


def test_reports_and_progress() -> None:
    seen: list[tuple[str, Program]] = []
    program, reports = Pipeline().run(program_of(TEXT), Context(), lambda name, p: seen.append((name, p)))
    assert [name for name, _ in seen] == [r.name for r in reports] == [p.name() for p in DEFAULT]
    assert seen[-1][1] is program
    assert all(isinstance(r, PassReport) and r.seconds >= 0 for r in reports)
    assert [c.network for r in reports if r.name == "order" for c in r.changes] == ["y"]


def test_a_change_reads_as_a_line() -> None:
    assert str(Change("y", "A and B are one core", "8 elements fewer")) == "y: A and B are one core (8 elements fewer)"
    assert str(Change("y", "h stays", "it is shared", declined=True)) == "y: left alone, h stays (it is shared)"
    assert str(Change("y", "done")) == "y: done"


# ------------------------------------------------------------------------------------ contexts


def test_sizes_of_symbols() -> None:
    """`batch` is the batch size, others come from the context; a symbol nobody knows counts as a batch size."""
    text = """
program
  input x: float32[batch, 2*seq, other]
  network y: float32[batch, other]
    indices b=batch, o=other, s=seq, two=2
    term
      0 operand x[b, (two s), o]
    -> y[b, o]
  output y = y
"""
    (network,) = program_of(text).networks
    assert Context(sizes={"seq": 5}).index_sizes(network, 7) == {"b": 7, "o": 7, "s": 5, "two": 2}
    assert Context(sizes={"seq": 5, "other": 3}).index_sizes(network, 7) == {"b": 7, "o": 3, "s": 5, "two": 2}
