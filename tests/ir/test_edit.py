"""Edits of networks: the value stays what it was."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from tests.strategies import SYMBOLS, Builder, draw_network, feeds, networks, order_of, readable_dims, values_of
from tncompile.ir import Array, Axis, Dim, Index, Network, Program, Tensor, Term, Value, dims, edit, evaluate, verify
from tncompile.ir.edit import CannotEdit
from tncompile.ir.tree import flatten

Pair = tuple[tuple[Value, ...], Network, Network]


def close(a: Array, b: Array) -> bool:
    """Equal within 1e-9 of the largest element."""
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=1e-9 * max(1e-30, float(np.abs(b).max(initial=0))))


def index(name: str, size: Dim) -> Index:
    return Index(name, size)


i2, j2, k3, a4, b2, c2 = (Index(n, s) for n, s in [("i", 2), ("j", 2), ("k", 3), ("a", 4), ("b", 2), ("c", 2)])
batch = Index("batch", "batch")


def core(name: str, *axes: Axis) -> Tensor:
    shape = [math.prod(int(i.size) for i in axis) for axis in axes]
    return Tensor(name, axes, np.random.default_rng(len(name)).integers(-8, 9, shape) / 8)


def network(output: Tensor, *terms: tuple[Tensor, ...]) -> Network:
    return Network(output.name, tuple(Term(t) for t in terms), output, "float64")


def check_inline(consumer: Network, producer: Network, values: tuple[Value, ...], max_terms: int = 64) -> Network:
    """Inline, verify the result, and compare it with one after the other."""
    result = edit.inline(consumer, producer, max_terms)
    given_values = feeds(values)
    middle = evaluate(producer, given_values, SYMBOLS)
    expected = evaluate(consumer, {**given_values, producer.output.name: middle}, SYMBOLS)
    assert close(evaluate(result, given_values, SYMBOLS), expected)
    assert producer.output.name not in result.inputs
    verify(edit.unique_cores(Program(values, (result,), (("y", "y"),))))
    return result


# --- inline ------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw: DrawFn, uses: int = 1) -> Pair:
    """Inputs, a producer of `h`, and a consumer `y` that reads `h` at least so often."""
    values = draw(values_of("float64"))
    builder = Builder(draw, "float64", {"h", "y", "x", "z"})
    producer = draw_network(builder, values, "h", max_tensors=4, max_terms=2)
    again = Builder(draw, "float64", builder.taken, builder.known)
    h = producer.value
    consumer = draw_network(again, [*values, h], "y", [h] * uses, max_tensors=4, max_terms=2)
    return values, producer, consumer


def nest(a: Axis, b: Axis) -> bool:
    """Whether the modes of two groups have a common refinement, by another way than `edit.refine`."""

    def places(axis: Axis) -> set[int]:
        primes = {"batch": 101, "seq": 103, "(seq + 1)": 107}
        factors = [dims._factors(i.size) for i in axis]
        numbers = (integer * math.prod(primes[s] for s in symbols.elements()) for integer, symbols in factors)
        return {*itertools.accumulate(numbers, lambda x, y: x * y)}

    cuts = sorted(places(a) | places(b))
    return all(after % before == 0 for before, after in itertools.pairwise(cuts))


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_inline_computes_what_the_two_networks_do(pair: Pair) -> None:
    values, producer, consumer = pair
    try:
        check_inline(consumer, producer, values)
        event("inlined")
    except CannotEdit as reason:
        event(str(reason).partition(" of ")[0])
        uses = [t for t in consumer.operands if t.name == "h"]
        if "do not nest" in str(reason) and len(uses) == 1:
            assert not all(nest(*axes) for axes in zip(uses[0].axes, producer.output.axes, strict=True))
        assert "do not nest" in str(reason) or "symbolic size" in str(reason)


@settings(max_examples=150, deadline=None)
@given(pairs(uses=2))
def test_inline_a_producer_that_is_used_twice(pair: Pair) -> None:
    values, producer, consumer = pair
    try:
        check_inline(consumer, producer, values)
        event("inlined")
    except CannotEdit as reason:
        event(str(reason).partition(" of ")[0])


X = Value("x", "float64", ("batch", 8))
x_operand = Tensor("x", ((batch,), (a4, b2)))
p4, q2 = Index("p", 4), Index("q", 2)

INLINE = {
    "same modes": (
        network(Tensor("h", ((batch,), (p4,))), (x_operand, core("w", (a4,), (b2,), (p4,)))),
        network(Tensor("y", ((batch,), (i2,))), (Tensor("h", ((batch,), (a4,))), core("v", (a4,), (i2,)))),
    ),
    "the consumer splits a mode of the producer": (
        network(Tensor("h", ((batch,), (p4,))), (x_operand, core("w", (a4,), (b2,), (p4,)))),
        network(Tensor("y", ((batch,), (i2,))), (Tensor("h", ((batch,), (i2, j2))), core("v", (j2,)))),
    ),
    "the producer splits a mode of the consumer": (
        network(Tensor("h", ((batch,), (i2, q2))), (x_operand, core("w", (a4,), (b2,), (i2,), (q2,)))),
        network(Tensor("y", ((batch,), (i2,))), (Tensor("h", ((batch,), (a4,))), core("v", (a4,), (i2,)))),
    ),
    "modes that interleave": (
        network(Tensor("h", ((batch, i2), (j2, a4))), (x_operand, core("w", (b2,), (i2,), (j2,)))),
        network(Tensor("y", ((batch,), (a4,))), (Tensor("h", ((batch, c2), (a4, b2))), core("v", (b2,)))),
    ),
    "a bias on both sides": (
        network(Tensor("h", ((batch,), (a4, b2))), (x_operand,), (core("bias", (a4, b2)),)),
        network(
            Tensor("y", ((batch,), (k3,))),
            (Tensor("h", ((batch,), (a4, b2))), core("v", (a4,), (b2,), (k3,))),
            (core("c", (k3,)),),
        ),
    ),
    "a square of a sum": (
        network(Tensor("h", ((batch,), (a4, b2))), (x_operand,), (core("bias", (a4, b2)),)),
        network(
            Tensor("y", ((batch,), (a4,))),
            (Tensor("h", ((batch,), (a4, b2))), Tensor("h", ((batch,), (a4, c2)))),
        ),
    ),
    "a diagonal of the producer": (
        network(Tensor("h", ((i2,), (j2, k3))), (core("w", (j2,), (i2,)), core("u", (k3,), (i2,)))),
        network(Tensor("y", ((k3,),)), (Tensor("h", ((i2,), (i2, k3))),)),
    ),
    "size-1 indices against empty groups": (
        network(Tensor("h", ((), (batch,), (a4, Index("one", 1)))), (Tensor("x", ((batch,), (a4, b2))),)),
        network(
            Tensor("y", ((batch,), (Index("u", 1),))),
            (Tensor("h", ((Index("u", 1),), (batch, Index("e", 1)), (a4,))), core("v", (a4,))),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INLINE)
def test_inline_examples(name: str) -> None:
    producer, consumer = INLINE[name]
    check_inline(consumer, producer, (X,))


def test_inline_gives_the_documented_network() -> None:
    producer, consumer = INLINE["the consumer splits a mode of the producer"]
    (term,) = check_inline(consumer, producer, (X,)).terms
    assert [t.name for t in term.tensors] == ["x", "w", "v"]
    assert term.tensors[1].axes[2] == (i2, j2)
    assert term.order == ((0, 1), 2)


def test_inline_multiplies_sums_out() -> None:
    producer, consumer = INLINE["a square of a sum"]
    assert len(check_inline(consumer, producer, (X,)).terms) == 4
    with pytest.raises(CannotEdit, match="more than 3 terms"):
        edit.inline(consumer, producer, max_terms=3)


def test_a_sum_that_is_lost_becomes_its_size() -> None:
    producer = network(Tensor("h", ((batch,), (k3, a4))), (Tensor("x", ((batch,), (a4, b2))),))
    consumer = network(Tensor("y", ((batch,),)), (Tensor("h", ((batch,), (k3, a4))),))
    (term,) = check_inline(consumer, producer, (X,)).terms
    assert [t.name for t in term.tensors] == ["x", "size_3"]
    assert term.tensors[1].data == 3


def test_a_lost_sum_over_one_needs_no_factor() -> None:
    one = Index("one", 1)
    producer = network(Tensor("h", ((batch,), (one, a4))), (Tensor("x", ((batch,), (a4, b2))),))
    consumer = network(Tensor("y", ((batch,),)), (Tensor("h", ((batch,), (one, a4))),))
    (term,) = check_inline(consumer, producer, (X,)).terms
    assert [t.name for t in term.tensors] == ["x"]


def test_a_broadcast_that_is_not_summed_stays_a_broadcast() -> None:
    producer = network(Tensor("h", ((batch,), (k3, a4))), (Tensor("x", ((batch,), (a4, b2))),))
    consumer = network(Tensor("y", ((batch,), (k3,))), (Tensor("h", ((batch,), (k3, a4))),))
    (term,) = check_inline(consumer, producer, (X,)).terms
    assert [t.name for t in term.tensors] == ["x"]


def test_a_lost_sum_over_a_symbolic_size_is_refused() -> None:
    producer = network(Tensor("h", ((batch,), (a4, b2))), (x_operand,), (core("bias", (a4, b2)),))
    consumer = network(Tensor("y", ((a4, b2),)), (Tensor("h", ((batch,), (a4, b2))),))
    with pytest.raises(CannotEdit, match="a sum over the symbolic size batch"):
        edit.inline(consumer, producer)


def test_modes_that_do_not_nest_are_refused() -> None:
    producer = network(Tensor("h", ((k3, i2),)), (core("w", (k3, i2)),))
    consumer = network(Tensor("y", ()), (Tensor("h", ((i2, k3),)),))
    with pytest.raises(CannotEdit, match="modes of sizes 2·3 and 3·2 do not nest"):
        edit.inline(consumer, producer)


# --- refine, rename ----------------------------------------------------------------------------------------


def resolved(axis: Axis, splits: dict[str, Axis]) -> Axis:
    return tuple(new for i in axis for new in splits.get(i.name, (i,)))


@settings(max_examples=150, deadline=None)
@given(readable_dims, st.data())
def test_refine_makes_groups_agree(dim: Dim, data: st.DataObject) -> None:
    axes = []
    for _ in range(2):
        builder = Builder(data.draw, "float64")
        axes.append(tuple(i for axis in builder.axes_of([dim]) for i in axis))
    a, b = axes
    taken = {"q"}
    try:
        splits_a, splits_b = edit.refine(a, b, taken)
    except CannotEdit:
        assert not nest(a, b)
        return
    assert nest(a, b)
    for axis, splits in ((a, splits_a), (b, splits_b)):
        for i in axis:
            parts = splits.get(i.name, (i,))
            assert dims.product(p.size for p in parts) == i.size
            assert parts == (i,) or not {p.name for p in parts} & taken
    if len({i.name for i in a}) == len(a) and len({i.name for i in b}) == len(b):
        assert [i.size for i in resolved(a, splits_a)] == [i.size for i in resolved(b, splits_b)]


@pytest.mark.parametrize(
    ("a", "b", "parts_a", "parts_b"),
    [
        ([6], [2, 3], [[2, 3]], None),
        ([2, 12], [8, 3], [None, [4, 3]], [[2, 4], None]),
        (["batch", 4], ["4*batch"], None, [["batch", 4]]),
        (["2*batch", 3], [2, "3*batch"], [[2, "batch"], None], [None, ["batch", 3]]),
        ([2, 1], [2], [None, []], None),
        ([1, 2], [2], [[], None], None),
        ([1], [], [[]], None),
        ([], [1, 1], None, [[], []]),
        ([1, 1], [1], [None, []], None),
        ([], [], None, None),
    ],
)  # fmt: skip
def test_refine_examples(
    a: list[Dim], b: list[Dim], parts_a: list[list[Dim] | None] | None, parts_b: list[list[Dim] | None] | None
) -> None:
    axis_a, axis_b = (tuple(Index(f"{n}{k}", s) for k, s in enumerate(x)) for n, x in (("a", a), ("b", b)))
    for axis, splits, parts in zip(
        (axis_a, axis_b), edit.refine(axis_a, axis_b, set()), (parts_a, parts_b), strict=True
    ):
        wanted = {axis[k].name: p for k, p in enumerate(parts or []) if p is not None}
        assert {name: [i.size for i in group] for name, group in splits.items()} == wanted


@pytest.mark.parametrize(
    ("a", "b", "sizes"),
    [([4, 6], [3, 8], "4·6 and 3·8"), ([2], [3], "2 and 3"), ([2, 2], [2], "2·2 and 2"), ([], [2], "1 and 2"),
     (["batch"], [2], "batch and 2"), (["batch", 2], [2, "batch"], "batch·2 and 2·batch")],
)  # fmt: skip
def test_refine_refuses_what_does_not_nest(a: list[Dim], b: list[Dim], sizes: str) -> None:
    with pytest.raises(CannotEdit, match=f"modes of sizes {sizes} do not nest"):
        edit.refine(
            tuple(Index(f"a{k}", s) for k, s in enumerate(a)), tuple(Index(f"b{k}", s) for k, s in enumerate(b)), set()
        )


@settings(max_examples=150, deadline=None)
@given(
    networks(max_tensors=4),
    st.sets(st.sampled_from("abcdefgh") | st.from_regex(r"[a-d][12]?", fullmatch=True)),
    st.data(),
)
def test_fresh_indices_renames_without_clashes(
    drawn: tuple[tuple[Value, ...], Network], taken: set[str], data: st.DataObject
) -> None:
    values, before = drawn
    if before.indices:
        taken |= data.draw(st.sets(st.sampled_from(sorted(before.indices))))
    after = edit.fresh_indices(before, taken)
    assert not taken & after.indices.keys()
    assert [i.size for i in after.indices.values()] == [i.size for i in before.indices.values()]
    kept = {*before.indices} - taken
    assert kept <= {*after.indices}
    fed = feeds(values)
    assert close(evaluate(after, fed, SYMBOLS), evaluate(before, fed, SYMBOLS))


def test_fresh_indices_swaps_names_that_collide() -> None:
    before = network(Tensor("y", ((Index("a", 2),),)), (core("w", (Index("a", 2),), (Index("a1", 3),)),))
    after = edit.fresh_indices(before, {"a"})
    assert after.output.indices == (Index("a1", 2),)
    assert after.cores[0].indices == (Index("a1", 2), Index("a2", 3))
    assert edit.fresh_indices(before, {"b"}) is before


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("i", "", "i"),
        ("i", "i", "i1"),
        ("i", "i i1", "i2"),
        ("i3", "i3", "i1"),
        ("x_9", "x_9", "x1"),
        ("7", "7", "7_1"),
    ],
)
def test_fresh(name: str, taken: str, expected: str) -> None:
    assert edit.fresh(name, taken.split()) == expected


# --- tensors of a term -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(networks(max_terms=2), st.data())
def test_merging_cores_keeps_the_value(drawn: tuple[tuple[Value, ...], Network], data: st.DataObject) -> None:
    values, before = drawn
    term = before.terms[0]
    cores = [p for p, t in enumerate(term.tensors) if t.is_core]
    if not cores:
        return
    chosen = data.draw(st.sets(st.sampled_from(cores), min_size=1, max_size=5))
    merged = edit.merge_tensors(term, chosen, before.output.indices, "float64")
    assert len(merged.tensors) == len(term.tensors) - len(chosen) + 1
    assert merged.operands == term.operands
    kept = {i.name for i in before.output.indices}
    assert {*merged.indices} & kept == {*term.indices} & kept
    after = Network("y", (merged, *before.terms[1:]), before.output, "float64")
    verify(edit.unique_cores(Program(values, (after,), ())))
    fed = feeds(values)
    assert close(evaluate(after, fed, SYMBOLS), evaluate(before, fed, SYMBOLS))


def test_merge_tensors_example() -> None:
    term = Term(
        (
            Tensor("x", ((i2,),)),
            core("fc.a", (i2,), (j2,)),
            core("fc.b", (j2,), (k3,), (c2,)),
            core("fc.c", (k3,), (b2,)),
        ),
        (0, (3, (1, 2))),
    )
    merged = edit.merge_tensors(term, {3, 1}, (c2, b2), "float32")
    assert [t.name for t in merged.tensors] == ["x", "fc.a*c", "fc.b"]
    assert merged.tensors[1].indices == (i2, j2, k3, b2)
    assert merged.tensors[1].data is not None
    assert merged.tensors[1].data.dtype == "float32"
    assert merged.order == (0, (1, 2))


def test_merging_one_core_sums_what_only_it_has() -> None:
    term = Term((core("w", (i2,), (i2,), (k3,), (c2,)),))
    merged = edit.merge_tensors(term, {0}, (c2,), "float64")
    (tensor,) = merged.tensors
    assert tensor.axes == ((c2,),)
    assert term.tensors[0].data is not None
    np.testing.assert_allclose(tensor.array(), np.einsum("iikc->c", term.tensors[0].data))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.data())
def test_dropping_tensors_keeps_the_order_of_the_rest(count: int, data: st.DataObject) -> None:
    tensors = tuple(Tensor(f"t{k}", ()) for k in range(count))
    term = Term(tensors, order_of(data.draw, count))
    gone = data.draw(st.sets(st.sampled_from(range(count))))
    rest = edit.drop_tensors(term, gone)
    assert rest.tensors == tuple(t for p, t in enumerate(tensors) if p not in gone)
    before = [tensors[p].name for p in flatten(term.order) if p not in gone]
    assert [rest.tensors[p].name for p in flatten(rest.order)] == before

    def sets(tree: object) -> set[frozenset[int]]:
        """The sets of tensors that a tree contracts."""
        inner = [sets(b) for b in tree] if isinstance(tree, tuple) else []
        here = frozenset(flatten(tree)) if tree != () else frozenset()  # type: ignore[arg-type]
        return {here}.union(*inner)

    number = {old: new for new, old in enumerate(p for p in range(count) if p not in gone)}
    pruned = {frozenset(number[p] for p in s if p in number) for s in sets(term.order)}
    assert sets(rest.order) - {frozenset()} == pruned - {frozenset()}


def test_outside_and_merged_axes() -> None:
    term = Term((core("w", (i2,), (j2,)), core("v", (j2,), (k3,)), Tensor("x", ((i2,),))))
    assert edit.outside(term, {0, 1}, (k3,)) == {"i", "k"}
    assert edit.merged_axes(term, {1, 0}, (k3,)) == (i2, k3)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], "a"),
        (["fc.factor_0", "fc.factor_1"], "fc.factor_0*factor_1"),
        (["fc.factor_0*factor_1", "fc.factor_2"], "fc.factor_0*factor_1*factor_2"),
        (["fc1.w", "fc2.w"], "fc1.w*fc2.w"),
        (["fc1.w*fc2.w", "fc1.v"], "fc1.w*fc2.w*v"),
        (["w", "w"], "w"),
        ([f"tt.core{k}" for k in range(8)], "tt.core0*...6...*core7"),
    ],
)
def test_merged_name(names: list[str], expected: str) -> None:
    assert edit.merged_name(names) == expected


# --- one name, one array -----------------------------------------------------------------------------------


def test_unique_cores_gives_every_array_one_name() -> None:
    first, second, third = (np.full((2,), float(k)) for k in range(3))
    weight = np.zeros(2)

    def node(output: str, *data: Array) -> Network:
        return network(Tensor(output, ((i2,),)), tuple(Tensor("w", ((i2,),), d) for d in data))

    program = Program(
        (), (node("y", first, second), node("z", second, third, first), node("u", weight)), (), {"c": weight}
    )
    with pytest.raises(Exception, match="stands for two arrays"):
        verify(program)
    unique = edit.unique_cores(program)
    verify(unique)
    assert [[t.name for t in n.cores] for n in unique.networks] == [["w", "w.2"], ["w.2", "w.3", "w"], ["c"]]
    assert edit.unique_cores(unique) == unique


def test_substitute_renames_and_splits_everywhere() -> None:
    before = network(Tensor("y", ((a4, k3),)), (core("w", (a4,), (k3,)),), (core("v", (a4, k3)),))
    after = edit.substitute(before, {"a": (i2, j2)})
    assert after.output.axes == ((i2, j2, k3),)
    assert [t.axes for t in after.cores] == [((i2, j2), (k3,)), ((i2, j2, k3),)]
    assert close(evaluate(after, {}), evaluate(before, {}))
    assert edit.substitute(before, {}) is before
