"""Which plan serves which batch sizes: the choice among given times, and what `order` makes of a layer that flips."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import apply_pass, program_of
from tests.passes.test_order import tt_matrix
from tncompile.cost.datasheet import from_datasheet
from tncompile.cost.profile import DeviceProfile
from tncompile.ir import Network, Program, Switch, text
from tncompile.passes import Change, Context, Order
from tncompile.passes.choice import MAX_SWITCHED, PLAN_PENALTY, TOLD, BatchPlans, choose, crossing
from tncompile.passes.plans import DENSE, Candidate, cost_of

NEVER = math.inf
FLIPS: DeviceProfile = from_datasheet("cpu", flops=1e12, bandwidth=1e10, launch=1e-6, tile=1)
"""Arithmetic is nearly free and bytes are dear, so that small cores win at batch 1 and one dense core at 4096."""


def way(name: str, *seconds: float) -> Candidate:
    return Candidate(name, (name,), (), seconds)


# --- the choice ------------------------------------------------------------------------------------------------


@st.composite
def races(draw: st.DrawFn) -> tuple[list[Candidate], list[int]]:
    """A dense candidate and some others with times at some batch sizes."""
    batches = sorted(draw(st.sets(st.integers(1, 3000), min_size=1, max_size=5)))
    seconds = st.floats(1e-6, 1e-1)
    times = st.tuples(*[seconds] * len(batches))
    others = draw(st.lists(times, max_size=5))
    return [way(DENSE, *draw(times)), *(way(f"way {k}", *t) for k, t in enumerate(others))], batches


@settings(max_examples=200, deadline=None)
@given(race=races(), branch=st.sampled_from([0.0, 5e-6, 1e-3, NEVER]), margin=st.sampled_from([0.0, 0.1, 0.5]))
def test_what_every_choice_owes(race: tuple[list[Candidate], list[int]], branch: float, margin: float) -> None:
    """Faster than dense by the margin at every size, limits between the sizes of neighbours, no plan without use."""
    candidates, batches = race
    choice = choose(candidates, batches, branch, margin)
    assert len(choice.limits) == len(choice.plans) - 1
    if math.isinf(branch):
        assert not choice.limits
    for k, batch in enumerate(batches):
        plan = choice.plan_for(batch)
        assert plan in candidates
        assert plan.label == DENSE or plan.times[k] * (1 + margin) <= candidates[0].times[k]
    assert {choice.plan_for(b) for b in batches} == {*choice.plans}
    assert choice.plan_for(None) is choice.plans[-1]
    assert all(a < b for a, b in itertools.pairwise(choice.limits))
    for limit, (first, second) in zip(choice.limits, itertools.pairwise(choice.plans), strict=True):
        assert first is not second
        low = max(b for b in batches if b <= limit)
        high = min(b for b in batches if b > limit)
        assert low <= limit < high
        assert (choice.plan_for(low), choice.plan_for(high)) == (first, second)


@settings(max_examples=100, deadline=None)
@given(race=races(), branch=st.sampled_from([0.0, 5e-6]))
def test_no_single_plan_is_better_by_more_than_its_penalty(
    race: tuple[list[Candidate], list[int]], branch: float
) -> None:
    """Worst ratio to the fastest of each size, an If and a penalty for each further plan included."""
    candidates, batches = race
    choice = choose(candidates, batches, branch, 0.0)
    sizes = range(len(batches))
    fastest = [min(c.times[k] for c in candidates if c.times[k] <= candidates[0].times[k]) for k in sizes]
    extra = branch * (len(choice.plans) > 1)
    worst = max((choice.plan_for(b).times[k] + extra) / fastest[k] for k, b in enumerate(batches))
    for one in candidates:
        if all(one.times[k] <= candidates[0].times[k] for k in sizes):
            alone = max(one.times[k] / fastest[k] for k in sizes)
            assert worst + PLAN_PENALTY * (len(choice.plans) - 1) <= alone * (1 + 1e-9)


def test_one_plan_where_it_costs_little() -> None:
    """2 % slower at each end than the best of each: one plan; 20 %, which is over the margin: two."""
    dense = way(DENSE, 1.0, 1.0)
    fair = way("fair", 0.102, 0.102)
    fast = [way("small", 0.1, 0.5), way("large", 0.5, 0.1)]
    assert choose([dense, fair, *fast], (1, 64), 0.0, 0.1).plans == (fair,)
    slow = replace(fair, seconds=(0.12, 0.12))
    assert choose([dense, slow, *fast], (1, 64), 0.0, 0.1).plans == tuple(fast)


def test_an_if_must_pay_at_the_smallest_batch_too() -> None:
    """5 µs for a branch is nothing to a plan of a millisecond and everything to one of a microsecond."""
    for scale, switched in ((1e-3, True), (1e-6, False)):
        ways = [way(DENSE, 2 * scale, scale * 5), way("cores", scale, scale * 9)]
        assert bool(choose(ways, (1, 64), 5e-6, 0.1).limits) == switched


def test_a_plan_may_serve_two_ranges() -> None:
    dense = way(DENSE, 1.0, 1.0, 1.0)
    ends, middle = way("ends", 0.1, 0.9, 0.1), way("middle", 0.9, 0.1, 0.9)
    choice = choose([dense, ends, middle], (1, 16, 256), 0.0, 0.1)
    assert choice.plans == (ends, middle, ends)
    assert 1 <= choice.limits[0] < 16 <= choice.limits[1] < 256


def test_what_cannot_run_at_a_size_does_not_serve_it() -> None:
    dense = way(DENSE, 1.0, 1.0)
    for times, served in (((0.1, math.inf), 1), ((math.inf, 0.1), 64)):
        fragile = way("fragile", *times)
        choice = choose([dense, fragile], (1, 64), 0.0, 0.0)
        assert (choice.plan_for(served), choice.plan_for(65 - served)) == (fragile, dense)


def test_measured_times_count_and_not_predictions() -> None:
    dense = replace(way(DENSE, 1.0, 1.0), measured=(1.0, 1.0))
    other = replace(way("other", 9.0, 9.0), measured=(0.5, 0.5))
    assert choose([dense, other], (1, 64), 5e-6, 0.0).plans == (other,)


def test_what_measurements_do_not_tell_apart_predictions_do() -> None:
    dense = replace(way(DENSE, 5.0), measured=(4.0,))
    best = replace(way("best", 1.0), measured=(1.01 + 0.9 * (TOLD - 0.01),))
    worse = replace(way("worse", 1.5), measured=(1.0,))
    assert choose([dense, best, worse], (1,), 0.0, 0.0).plans == (best,)
    told = replace(best, measured=(1.01 + TOLD,))
    assert choose([dense, told, worse], (1,), 0.0, 0.0).plans == (worse,)


@pytest.mark.parametrize("count", [MAX_SWITCHED, MAX_SWITCHED + 1, 12, 40])
def test_many_batch_sizes_have_few_plans(count: int) -> None:
    """However many sizes are named, and each with a plan of its own that is the best."""
    ways = [way(DENSE, *[1.0] * count)]
    ways += [way(f"best at {k}", *(0.1 if k == j else 0.9 for j in range(count))) for k in range(count)]
    choice = choose(ways, [2**k for k in range(count)], 0.0, 0.1)
    assert len(choice.plans) <= MAX_SWITCHED


@given(low=st.integers(1, 1000), width=st.integers(1, 3000), place=st.floats(0.0, 1.0), steep=st.floats(0.1, 10.0))
def test_crossing_finds_where_lines_meet(low: int, width: int, place: float, steep: float) -> None:
    high, meet = low + width, low + place * width
    found = crossing(low, high, lambda n: n * steep, lambda n: meet * steep)
    assert low <= found < high
    assert found == low or found <= meet
    assert found == high - 1 or found + 1 > meet


def test_a_choice_serves_every_size() -> None:
    a, b, c = (way(name, 1.0) for name in "abc")
    choice = BatchPlans((a, b, c), (4, 9))
    assert [choice.plan_for(n) for n in (1, 4, 5, 9, 10, None)] == [a, a, b, b, c, c]


# --- order -----------------------------------------------------------------------------------------------------


def ordered(program: Program, *batches: int, profile: DeviceProfile = FLIPS) -> tuple[Network | Switch, Change]:
    context = Context(batches=batches, profile=profile)
    after, (change,) = apply_pass(Order(), program, tolerance=1e-5, context=context)
    (node,) = after.nodes
    assert isinstance(node, Network | Switch)
    return node, change


def test_a_layer_that_flips_with_the_batch_becomes_a_switch() -> None:
    switch, change = ordered(tt_matrix((16, 16), (16, 16), 8), 1, 4096)
    assert isinstance(switch, Switch)
    (limit,) = switch.limits
    assert 1 <= limit < 4096
    assert switch.symbol == "batch"
    assert [len(case.cores) for case in switch.cases] == [2, 1]
    assert change.what.startswith(f"up to batch {limit}: order (")
    assert change.what.endswith("; beyond: folded to dense: 2 cores are one")
    assert "at batch 4096" in change.why


def test_three_sizes_three_plans() -> None:
    """None, some and all cores merged, as the batch grows; each is faster than the others where it serves."""
    batches = (1, 32, 4096)
    switch, change = ordered(tt_matrix((8, 8, 12), (16, 12, 16), 8), *batches)
    assert isinstance(switch, Switch)
    assert [len(case.cores) for case in switch.cases] == [3, 2, 1]
    first, second = switch.limits
    assert 1 <= first < 32 <= second < 4096
    assert f"up to batch {first}: " in change.what and f"; up to batch {second}: " in change.what
    context = Context(batches=batches, profile=FLIPS)
    for batch in batches:
        seconds = [cost_of(case, case.terms[0], None, context, batch).seconds for case in switch.cases]
        assert switch.cases[seconds.index(min(seconds))] is switch.case(batch)


def test_a_plan_that_serves_two_ranges_is_named_for_both() -> None:
    program = tt_matrix((16, 16), (16, 16), 8)
    order = Order()
    network, context = program.networks[0], Context(batches=(1, 16, 256), profile=FLIPS)
    ways = order._ways(network, network.terms[0], context, {})
    dense = next(w for w in ways if w.label == DENSE)
    other = next(w for w in ways if w.label != DENSE)
    measured = [
        replace(dense, measured=(1.0, 0.1, 1.0)),
        replace(other, measured=(0.1, 1.0, 0.1)),
    ]
    known = {key: (names, measured) for key, (names, _) in _known(order, program, context).items()}
    changes: list[Change] = []
    node = order._network(network, context, known, changes, 0.0)
    assert isinstance(node, Switch)
    assert [len(case.cores) for case in node.cases] == [2, 1, 2]
    assert changes[0].what.count("order (") == 2 and changes[0].what.count("folded to dense") == 1


def _known(order: Order, program: Program, context: Context) -> dict[object, tuple[tuple[str, ...], list[Candidate]]]:
    known: dict[object, tuple[tuple[str, ...], list[Candidate]]] = {}
    network = program.networks[0]
    order._ways(network, network.terms[0], context, known)
    return known


def test_two_terms_that_flip_at_different_sizes() -> None:
    """From where one of them is dense, the other goes into its core: no third case of the same form, no second copy."""
    source = text.dump(tt_matrix((16, 16), (16, 16), 8)).splitlines()
    other = text.dump(tt_matrix((16, 16), (16, 16), 20)).splitlines()
    start, end = (next(k for k, line in enumerate(source) if line.strip().startswith(w)) for w in ("term", "->"))
    second = [line.replace("core_", "other_").replace("r1", "q1") for line in other[start:end]]
    lines = [line.replace("r1=8", "r1=8, q1=20") for line in source[:end]] + second + source[end:]
    switch, changes = _switch_of(program_of("\n".join(lines)))
    *plans, merged = changes
    limits = [int(c.what.partition("up to batch ")[2].partition(":")[0]) for c in plans]
    assert len({*limits}) == 2
    assert switch.limits == (min(limits),)
    assert [len(case.terms) for case in switch.cases] == [2, 1]
    assert merged.what == "fc0.other_0*other_1 added into fc0.core_0*core_1"


def test_terms_of_other_operands_keep_their_own_limits() -> None:
    """The ranges of both are cut where either flips."""
    text_of = [text.dump(tt_matrix((16, 16), (16, 16), rank), sources=False).splitlines() for rank in (8, 20)]
    start, end = (next(k for k, line in enumerate(text_of[0]) if line.strip().startswith(w)) for w in ("term", "->"))
    second = [line.replace("core_", "other_").replace("r1", "q1").replace(" x[", " z[") for line in text_of[1]]
    lines = [line.replace("r1=8", "r1=8, q1=20") for line in text_of[0]]
    lines = [lines[0], lines[1].replace(" x:", " z:"), *lines[1:end], *second[start:end], *lines[end:]]
    switch, changes = _switch_of(program_of("\n".join(lines)))
    limits = [int(c.what.partition("up to batch ")[2].partition(":")[0]) for c in changes]
    assert switch.limits == tuple(sorted(limits)) and len({*limits}) == 2
    assert [[len(term.cores) for term in case.terms] for case in switch.cases] == [[2, 2], [2, 1], [1, 1]]


def _switch_of(program: Program) -> tuple[Switch, tuple[Change, ...]]:
    after, changes = apply_pass(Order(), program, tolerance=1e-5, context=Context(batches=(1, 4096), profile=FLIPS))
    (switch,) = after.nodes
    assert isinstance(switch, Switch)
    return switch, changes


@pytest.mark.parametrize("shape", ["64", "(batch + 1)", "batch*seq"])
def test_no_switch_where_the_batch_is_fixed_or_cannot_be_seen(shape: str) -> None:
    program = tt_matrix((16, 16), (16, 16), 8)
    source = text.dump(program, sources=False).replace("[batch,", f"[{shape},").replace("b=batch", f"b={shape}")
    (node,) = Order().run(program_of(source), Context(batches=(1, 4096), sizes={"seq": 2}, profile=FLIPS))[0].nodes
    assert isinstance(node, Network)


def test_a_multiple_of_the_batch_is_seen() -> None:
    program = tt_matrix((16, 16), (16, 16), 8)
    source = text.dump(program, sources=False).replace("[batch,", "[4*batch,").replace("b=batch", 'b="4*batch"')
    (node,) = Order().run(program_of(source), Context(batches=(1, 4096), profile=FLIPS))[0].nodes
    assert isinstance(node, Switch)


def test_no_switch_on_a_gpu() -> None:
    """A recorded graph of kernels allows no If."""
    profile = replace(FLIPS, device="cuda: some GPU")
    node, _ = ordered(tt_matrix((16, 16), (16, 16), 8), 1, 4096, profile=profile)
    assert isinstance(node, Network)


def test_one_batch_size_has_one_plan() -> None:
    for batch in (1, 4096):
        node, _ = ordered(tt_matrix((16, 16), (16, 16), 8), batch)
        assert isinstance(node, Network)
