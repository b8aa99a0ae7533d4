"""Order: what it chooses where the choice is plain, and what it owes everywhere."""

from __future__ import annotations

import random

import pytest

from tests.helpers import apply_pass, assert_close, compile_program, feeds_for, program_of, reference
from tncompile.ir import Network, Program, Switch, Term
from tncompile.passes import Change, Context, Fold, MergeCores, Order
from tncompile.passes import plans as plans_module
from tncompile.passes.plans import cost_of


def tt_matrix(inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, copies: int = 1) -> Program:
    """A TT-matrix layer, or several that differ in their numbers only."""
    size = 1
    for n in inputs:
        size *= n
    lines = ["program", f"  input x: float32[batch, {size}]"]
    sites = range(len(inputs))
    for copy in range(copies):
        i, o = [f"i{k}={n}" for k, n in enumerate(inputs)], [f"o{k}={n}" for k, n in enumerate(outputs)]
        bonds = [f"r{k}={rank}" for k in sites[1:]]
        width = 1
        for n in outputs:
            width *= n
        lines += [
            f"  network y{copy}: float32[batch, {width}], layer fc{copy}",
            f"    indices b=batch, {', '.join([*o, *i, *bonds])}",
            "    term",
            f"      0 operand x[b, ({' '.join(f'i{k}' for k in sites)})]",
        ]
        for k in sites:
            modes = [f"r{k}"] * (k > 0) + [f"i{k}", f"o{k}"] + [f"r{k + 1}"] * (k + 1 < len(inputs))
            lines.append(f"      {k + 1} core fc{copy}.core_{k}[{', '.join(modes)}]")
        lines.append(f"    -> y{copy}[b, ({' '.join(f'o{k}' for k in sites)})]")
    return program_of("\n".join([*lines, *(f"  output y{c} = y{c}" for c in range(copies))]))


def chosen(program: Program, *batches: int) -> tuple[Network, Term, Change]:
    """What Order makes of a program of one network, for some batch sizes."""
    after, changes = apply_pass(Order(), program, tolerance=1e-5, context=Context(batches=batches))
    (network,), (change,) = after.networks, changes
    return network, network.terms[0], change


def test_a_large_rank_is_folded_to_dense() -> None:
    """Of full rank: two cores of 4 million elements where the dense layer has 1 million."""
    program = tt_matrix((32, 32), (32, 32), 1024)
    _, term, change = chosen(program, 1, 64)
    assert len(term.cores) == 1
    assert change.what == "folded to dense: 2 cores are one"
    assert change.why
    assert not change.declined


def test_a_small_rank_of_a_large_layer_is_kept() -> None:
    """4096 to 4096 of rank 2: a thousandth of the dense layer's numbers."""
    program = tt_matrix((64, 64), (64, 64), 2)
    _, term, _ = chosen(program, 1, 64)
    assert len(term.cores) == 2
    assert term.steps is not None
    assert len(term.steps) == 2


def test_some_cores_are_merged_and_some_are_not() -> None:
    """Two sites of full rank between a bond of rank 1: each side is folded, the two are not."""
    text = """
program
  input x: float32[batch, 4096]
  network y: float32[batch, 4096]
    indices b=batch, o0=8, o1=8, o2=8, o3=8, i0=8, i1=8, i2=8, i3=8, r=64, s=1, t=64
    term
      0 operand x[b, (i0 i1 i2 i3)]
      1 core A[i0, o0, r]
      2 core B[r, i1, o1, s]
      3 core C[s, i2, o2, t]
      4 core D[t, i3, o3]
    -> y[b, (o0 o1 o2 o3)]
  output y = y
"""
    _, term, change = chosen(program_of(text), 1, 64)
    assert [c.name for c in term.cores] == ["A*B", "C*D"]
    assert change.what.endswith("4 cores are 2")


def test_the_batch_size_is_part_of_the_question() -> None:
    """What is best for one sample need not be best for a thousand, and the reported choice says for which."""
    program = tt_matrix((32, 32), (32, 32), 16)
    few, many = (chosen(program, batch) for batch in (1, 4096))
    assert len(few[1].cores) > len(many[1].cores)
    assert "at batch 4096" in many[2].why
    assert many[2].details["batches"] == (4096,)


def test_never_slower_than_dense_at_any_batch() -> None:
    """By its own cost, on layers of random modes and rank: what is not dense is faster at every batch size."""
    context = Context(batches=(1, 16, 512))
    dense = 0
    for seed in range(30):
        rng = random.Random(seed)
        sites = rng.randint(2, 4)
        modes = [tuple(rng.choice([2, 4, 6, 8, 12]) for _ in range(sites)) for _ in range(2)]
        program = tt_matrix(*modes, rank=rng.choice([1, 2, 4, 8, 16]))
        after, (change,) = apply_pass(Order(), program, tolerance=1e-5, context=context)
        (node,) = after.nodes
        assert isinstance(node, Network | Switch)
        tried = change.details["microseconds"]
        assert all(len(times) == len(context.batches) for times in tried.values())
        dense += all(len(n.cores) == 1 for n in after.networks)
        for batch, limit in zip(context.batches, tried["dense"], strict=True):
            network = node.case(batch) if isinstance(node, Switch) else node
            if len(network.cores) > 1:
                assert cost_of(network, network.terms[0], None, context, batch).seconds * 1e6 <= limit + 1e-3, seed
    assert 5 <= dense <= 25


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_never_slower_than_dense_on_layers(rank: int) -> None:
    """And within a little of the best that was tried at one batch size alone."""
    for batch in (1, 32, 512):
        context = Context(batches=(batch,))
        program = tt_matrix((8, 8, 8), (8, 8, 8), rank)
        after, (change,) = apply_pass(Order(), program, tolerance=1e-5, context=context)
        seconds = cost_of(after.networks[0], after.networks[0].terms[0], None, context, batch).seconds
        best = min(times[0] for times in change.details["microseconds"].values())
        dense = change.details["microseconds"]["dense"][0]
        assert seconds * 1e6 <= dense + 1e-3
        assert seconds * 1e6 <= best * 1.1 + 1e-3  # the margin that a factored form must be faster by


def test_the_margin_is_an_option() -> None:
    """With an absurd margin nothing but dense is fast enough."""
    program = tt_matrix((64, 64), (64, 64), 2)
    after, _ = Order(margin=1e6).run(program, Context(batches=(1,)))
    assert len(after.networks[0].cores) == 1


def test_equal_networks_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    real = plans_module.TreeSearch

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object) -> None:
            searched.append(1)
            super().__init__(*args)

    monkeypatch.setattr(plans_module, "TreeSearch", Counted)

    def searches(program: Program) -> int:
        searched.clear()
        Order().run(program, Context())
        return len(searched)

    once = searches(tt_matrix((4, 4, 4), (4, 4, 4), 3))
    assert once > 0
    assert searches(tt_matrix((4, 4, 4), (4, 4, 4), 3, copies=3)) == once
    assert searches(tt_matrix((4, 4, 4), (4, 4, 4), 4)) == once


def test_equal_networks_are_scheduled_alike_with_their_own_numbers() -> None:
    after, _ = apply_pass(Order(), tt_matrix((4, 4, 4), (4, 4, 4), 3, copies=2), tolerance=1e-5)
    first, second = after.networks
    assert first.terms[0].steps == second.terms[0].steps
    assert not any(a.data is b.data for a, b in zip(first.cores, second.cores, strict=True))


def test_equal_networks_may_call_their_indices_otherwise() -> None:
    """The schedule that is found once is told to each network in its own names."""
    text = """
program
  input x: float32[batch, 64]
  network y: float32[batch, 48], layer first
    indices b=batch, o=48, i=64, r=2
    term
      0 operand x[b, i]
      1 core A[i, r]
      2 core B[r, o]
    -> y[b, o]
  network z: float32[batch, 48], layer second
    indices i=batch, r=48, o=64, b=2
    term
      0 operand x[i, o]
      1 core C[o, b]
      2 core D[b, r]
    -> z[i, r]
  output y = y
  output z = z
"""
    after, _ = apply_pass(Order(), program_of(text), tolerance=1e-6)
    first, second = (n.terms[0].steps for n in after.networks)
    assert first is not None
    assert second is not None
    names = {"b": "i", "o": "r", "i": "o", "r": "b"}
    assert [tuple(names[n] for n in step.order) for step in first] == [step.order for step in second]
    compiled = compile_program(program_of(text))
    feeds = feeds_for(program_of(text))
    for name, array in reference(program_of(text), feeds, {"batch": 3}).items():
        if name != "x":
            assert_close(compiled.run(feeds)[name], array, tolerance=1e-6)


def test_two_runs_choose_the_same() -> None:
    """cotengra draws at random; the same program must give the same file."""
    program = tt_matrix((2, 3, 2, 3, 2, 3), (3, 2, 3, 2, 3, 2), 3)
    first, second = (Order().run(program, Context())[0] for _ in range(2))
    assert first == second


def test_constant_terms_have_no_schedule() -> None:
    text = """
program
  input x: float32[batch, 4]
  network y: float32[batch, 4]
    indices b=batch, i=4, r=2
    term
      0 operand x[b, i]
    term
      0 core A[r]
      1 core B[r, i]
    -> y[b, i]
  output y = y
"""
    after, changes = apply_pass(Order(), program_of(text), tolerance=1e-6)
    moving, constant = sorted(after.networks[0].terms, key=lambda t: t.is_constant)
    assert (moving.steps, constant.steps, changes) == ((), None, ())


def test_dense_layers_over_one_operand_become_one() -> None:
    """x A B + x C D, both folded to dense, is one layer of one weight."""
    text = """
program
  input x: float32[batch, 4]
  network y: float32[batch, 4]
    indices b=batch, o=4, i=4, r=3, q=3
    term
      0 operand x[b, i]
      1 core A[i, r]
      2 core B[r, o]
    term
      0 operand x[b, i]
      1 core C[i, q]
      2 core D[q, o]
    -> y[b, o]
  output y = y
"""
    after, _ = apply_pass(Order(), program_of(text), tolerance=1e-6)
    assert [len(t.tensors) for t in after.networks[0].terms] == [2]


def test_the_pass_schedules_what_the_others_leave() -> None:
    """Order alone, and behind the other passes: the same numbers, every term with its steps."""
    program = tt_matrix((4, 6), (6, 4), 5)
    context = Context(batches=(1, 8))
    alone, _ = apply_pass(Order(), program, tolerance=1e-5, context=context)
    folded, _ = apply_pass(Fold(), program, tolerance=1e-5)
    merged, _ = apply_pass(MergeCores(), folded, tolerance=1e-5)
    behind, _ = apply_pass(Order(), merged, tolerance=1e-5, context=context)
    assert all(t.steps is not None for p in (alone, behind) for t in p.networks[0].terms)


def test_one_core_that_several_operands_meet_is_no_dense_layer() -> None:
    """Nothing is folded: no way of it has dense's precedence over the others."""
    program = program_of("""\
program
  input x: float32[batch, 8]
  input y: float32[batch, 4]
  network z: float32[batch, 6]
    indices b=batch, i=8, j=4, o=6
    term
      0 operand x[b, i]
      1 operand y[b, j]
      2 core c[i, j, o]
    -> z[b, o]
  output out = z
""")
    (network,) = program.networks
    ways = plans_module.candidates(network, network.terms[0], Context(batches=(1, 64)), plans_module.Limits(4, 4))
    assert len(ways) > 1 and plans_module.DENSE not in {way.label for way in ways}
