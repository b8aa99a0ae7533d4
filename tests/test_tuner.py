"""The tuner with races that are not run: what is timed, what is chosen by it, and what is stored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import apply_pass, program_of
from tests.passes.test_order import tt_matrix
from tncompile.ir import Network, Program, Step, Switch
from tncompile.ir import text as ir_text
from tncompile.passes import Change, Context, Order
from tncompile.passes.plans import Candidate
from tncompile.runtime import tuner as tuner_module
from tncompile.runtime.timing import Race
from tncompile.runtime.tuner import CACHE, Tuner


@dataclass
class Races:
    """Stands for `race`: an entrant takes the milliseconds that `rule` gives its number, whoever else takes part."""

    rule: Callable[[int], float]
    numbers: set[int] = field(default_factory=set)
    budget: float = 0.0

    def __call__(self, entrants: Mapping[str, Callable[[], object]], *, rounds: int, budget_s: float) -> Race:
        self.budget += budget_s
        self.numbers |= set(map(number_of, entrants))
        for call in entrants.values():
            call()  # every entrant can be run
        return Race({name: np.full(3, self.rule(number_of(name))) for name in entrants})


def number_of(entrant: str) -> int:
    """Which candidate an entrant is; a finalist takes part in several sessions, ``3.0`` and ``3.1``."""
    return int(entrant.partition(".")[0])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the times of these tests are stored."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    """Races in which later entrants are faster, unless the test sets another rule."""
    fake = Races(lambda number: 100.0 - number)
    monkeypatch.setattr(tuner_module, "race", fake)
    return fake


PROGRAM = tt_matrix((24, 24), (24, 24), 3)


def tuned(program: Program, tuner: Tuner, *batches: int) -> tuple[Program, tuple[Change, ...]]:
    """What `order` makes of a program with a tuner."""
    context = Context(batches=batches or (1, 8), timer=tuner, outputs=frozenset({"y0", "y1"}))
    return apply_pass(Order(), program, tolerance=1e-5, context=context)


def steps_of(program: Program) -> list[tuple[Step, ...] | None]:
    return [network.terms[0].steps for network in program.networks]


# --- what is chosen --------------------------------------------------------------------------------------------


def test_measured_times_decide(races: Races) -> None:
    """Whichever entrant is the fastest is what comes out, though its prediction is the worst."""
    chosen = []
    for fastest in range(3):
        races.rule = lambda number, fastest=fastest: 1.0 if number == fastest else 3.0  # type: ignore[misc]
        program, (change,) = tuned(PROGRAM, Tuner(1.0, stored=False))
        (network,) = program.nodes
        assert isinstance(network, Network)
        chosen.append((network.terms[0].tensors, network.terms[0].steps))
        assert "measured" in change.why or not change.why
        assert min(t for times in change.details["measured"].values() for t in times) == 1000.0  # µs
        assert change.details["microseconds"].keys() == change.details["measured"].keys()
    assert len({steps for _, steps in chosen}) == 3


def test_measured_times_may_differ_by_batch(races: Races) -> None:
    """The fastest changes from one batch size to the other: a switch, if an If costs less than it saves."""

    class ByBatch(Tuner):
        def times(self, networks: Sequence[Network], symbols: Mapping[str, int], shown: bool) -> list[float]:
            best = 1 if symbols["batch"] == 1 else 2
            races.rule = lambda number: 1.0 if number == best else 3.0
            return super().times(networks, symbols, shown)

    program, _ = tuned(PROGRAM, ByBatch(1.0, stored=False))
    (switch,) = program.nodes
    assert isinstance(switch, Switch)
    assert 1 <= switch.limits[0] < 8


def test_a_candidate_that_cannot_run_is_not_chosen(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuner_module.Session
    loaded: list[int] = []

    class Fragile(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **options: object) -> None:
            loaded.append(1)
            if len(loaded) in (1, 3):
                raise RuntimeError("no kernel")
            super().__init__(*args, **options)

    monkeypatch.setattr(tuner_module, "Session", Fragile)
    tuner = Tuner(1.0, stored=False)
    networks = candidates()
    found = tuner.times(networks, {"batch": 4}, True)
    assert [math.isinf(seconds) for seconds in found] == [k % 2 == 0 for k in range(len(networks))]
    assert races.numbers == {1, 3}
    program, _ = tuned(PROGRAM, tuner)
    assert all(steps is not None for steps in steps_of(program))


def test_a_network_that_cannot_be_written_is_not_chosen(races: Races) -> None:
    good, other, *_ = candidates()
    broken = unwritable(other)
    assert tuner_times(good, broken) == [0.1, math.inf]


def test_nothing_that_can_run_is_no_error(races: Races) -> None:
    other = candidates()[0]
    broken = unwritable(other)
    assert tuner_times(broken) == [math.inf]


@cache
def candidates() -> list[Network]:
    """The network of the program as some of its candidates compute it."""
    seen: list[Network] = []

    class Keeps:
        def start(self, jobs: int) -> None:
            pass

        def times(self, networks: list[Network], symbols: Mapping[str, int], shown: bool) -> list[float]:
            seen[:] = networks
            return [1.0] * len(networks)

    Order().run(PROGRAM, Context(batches=(8,), timer=Keeps()))  # type: ignore[arg-type]
    assert len(seen) >= 4
    return seen[:4]


def unwritable(network: Network) -> Network:
    """The network with a step that reads what is not there."""
    steps = tuple(replace(step, left=99) for step in network.terms[0].steps or ())
    return replace(network, terms=(replace(network.terms[0], steps=steps),))


def tuner_times(*networks: Network) -> list[float]:
    return Tuner(1.0, stored=False).times(networks, {"batch": 4}, True)


# --- what is timed ---------------------------------------------------------------------------------------------


def test_equal_networks_are_timed_once(races: Races) -> None:
    """Two layers that differ in their numbers only are timed as one is."""
    one, both = Tuner(1.0, stored=False), Tuner(1.0, stored=False)
    tuned(PROGRAM, one)
    after, _ = tuned(tt_matrix((24, 24), (24, 24), 3, copies=2), both)
    assert both.timed == one.timed
    first, second = steps_of(after)
    assert first == second


def test_what_leaves_no_choice_is_not_timed(races: Races) -> None:
    text = "program\ninput x: float32[batch, 4]\nnetwork y: float32[batch, 4]\nindices b=batch, i=4\nterm\n"
    tuned(ir_text.parse(text + "0 operand x[b, i]\n-> y[b, i]\noutput y = y\n"), Tuner(1.0, stored=False))
    assert not races.numbers


def test_the_budget_is_shared_by_what_is_left(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time stands still, 12 s for three jobs are 4, then 6, then 12; where all is spent, a tenth is left."""
    clock = [0.0]
    monkeypatch.setattr(tuner_module.time, "perf_counter", lambda: clock[0])
    tuner = Tuner(12.0, stored=False)

    def budget() -> float:
        races.budget = 0.0
        tuner.times(candidates(), {"batch": 4}, True)
        return races.budget

    def slow(number: int) -> float:
        clock[0] += 100.0
        return 1.0

    tuner.start(3)
    assert [budget(), budget(), budget()] == [4.0, 6.0, 12.0]
    races.rule = slow
    budget()
    assert budget() == pytest.approx(1.2)


# --- what is stored --------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_store_and_times_nothing(races: Races, folder: Path) -> None:
    first = Tuner(1.0)
    program, changes = tuned(PROGRAM, first)
    assert first.timed and not first.known
    races.numbers.clear()
    second = Tuner(1.0)
    again, told = tuned(PROGRAM, second)
    assert not races.numbers
    assert (second.timed, second.known) == (0, first.timed)
    assert (again, told) == (program, changes)
    assert [p.name for p in folder.iterdir()] == ["times.json"]


def test_the_names_and_numbers_of_a_network_do_not_matter_but_its_sizes_do(races: Races) -> None:
    first = Tuner(1.0)
    tuned(PROGRAM, first)
    printed = ir_text.dump(PROGRAM).replace("fc0", "other").replace("i0", "k").replace("y0", "z").replace("x", "w")
    renamed = ir_text.parse(printed)

    def asked(program: Program, output: str | None, *batches: int) -> tuple[bool, bool]:
        """Whether times were known, and whether some were taken."""
        tuner = Tuner(1.0)
        outputs = frozenset({output} if output else ())
        Order().run(program, Context(batches=batches, timer=tuner, outputs=outputs))
        return tuner.known > 0, tuner.timed > 0

    assert asked(renamed, "z", 1, 8) == (True, False)
    assert asked(renamed, "z", 1, 9) == (True, True)  # a new batch size
    assert asked(renamed, None, 1, 8) == (False, True)  # something reads the value
    assert asked(tt_matrix((24, 24), (24, 24), 4), "y0", 1, 8) == (False, True)  # another rank


CONVOLUTION = """\
program
  input x: float32[batch, 16, 900]
  network y: float32[batch, 16, {out}]
    indices b=batch, c=16, i=900, k=3, h={out}, o=16
    term
      0 operand x[b, c, i]
      1 core w[o, c, k]
      window i, k -> h, stride={stride}, dilation=1, padding={padding}
    -> y[b, o, h]
  output out = y
"""


def test_convolutions_that_differ_in_their_windows_are_told_apart() -> None:
    forms = []
    for out, stride, padding in ((900, 1, "1 1"), (900, 1, "2 0"), (450, 2, "1 1")):
        text = CONVOLUTION.format(out=out, stride=stride, padding=padding)
        program, _ = Order().run(program_of(text), Context())
        (network,) = program.nodes
        assert isinstance(network, Network)
        forms.append(tuner_module.canonical(network))
    assert len({repr(form) for form in forms}) == 3


def test_times_that_could_not_be_taken_are_not_stored(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other, *_ = candidates()
    broken = unwritable(other)
    assert Tuner(1.0).times([good, broken], {"batch": 4}, True) == [0.1, math.inf]
    assert Tuner(1.0).times([good, broken], {"batch": 4}, True) == [0.1, math.inf]
    again = Tuner(1.0)
    again.times([good, broken], {"batch": 4}, True)
    assert (again.timed, again.known) == (2, 0)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", '{"key": "many"}', '{"key": null}', '{"key": [1]}', "\x00\xff"]
)
def test_a_damaged_store_is_no_error(races: Races, folder: Path, content: str) -> None:
    folder.mkdir()
    path = folder / "times.json"
    path.write_text(content, encoding="latin-1")
    networks = candidates()
    tuner = Tuner(1.0)
    times = tuner.times(networks, {"batch": 4}, True)
    assert tuner.timed == len(networks)
    assert sorted(json.loads(path.read_text()).values()) == sorted(times)  # it is whole again
    again = Tuner(1.0)
    assert again.times(networks, {"batch": 4}, True) == times
    assert again.timed == 0


@pytest.mark.skipif(os.name != "posix", reason="folders are made unwritable as on Unix")
def test_an_unwritable_store_is_no_error(races: Races, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the place of the folder; that stops root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    networks = candidates()
    assert Tuner(1.0).times(networks, {"batch": 4}, True) == [0.1, 0.099, 0.098, 0.097]
    assert (tmp_path / "file").read_text() == ""


def test_nothing_is_stored_where_it_is_not_asked_for(races: Races, folder: Path) -> None:
    tuner_times(*candidates())
    assert not folder.exists()


def test_candidates_are_told_by_their_times() -> None:
    way = Candidate("", 0, (), (1.0, 2.0))
    assert way.times == (1.0, 2.0)
    assert replace(way, measured=(3.0, 4.0)).times == (3.0, 4.0)


# --- for real --------------------------------------------------------------------------------------------------


def test_onnx_runtime_is_timed() -> None:
    """No order is asked of the clock, but that it ran: positive seconds, far from a minute, for each."""
    found = Tuner(0.2, stored=False).times(candidates(), {"batch": 4}, False)
    assert all(0 < seconds < 60 for seconds in found)
