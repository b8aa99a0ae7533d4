"""Large trees: windows, and walks without recursion."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from benchmarks.networks import SHAPES
from tests.helpers import apply_pass
from tncompile.cost.devices import default_profile
from tncompile.cost.refine import Refiner
from tncompile.cost.search import MAX_CORE_ELEMENTS
from tncompile.ir import Program, Tree
from tncompile.ir.tree import flatten, fold_tree, left_to_right, map_tree
from tncompile.passes import Clean, Context, MergeCores, Order
from tncompile.passes.plans import tree_search

CONTEXT = Context(batches=(16,), profile=default_profile())


def trees(positions: tuple[int, ...]) -> Iterator[Tree]:
    """Every tree, each pair in one order."""
    if len(positions) == 1:
        yield positions[0]
    first, rest = positions[0], positions[1:]
    for size in range(len(rest)):
        for others in itertools.combinations(rest, size):
            left = (first, *others)
            right = tuple(p for p in rest if p not in others)
            yield from itertools.product(trees(left), trees(right))


def refiner(program: Program) -> Refiner:
    (network,) = program.networks
    search = tree_search(network, network.terms[0], CONTEXT, 16)
    args = (search.inputs, search.core, search.output, search.sizes, search.profile, MAX_CORE_ELEMENTS)
    return Refiner(*args)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_window_is_the_whole_of_a_small_network(shape: str) -> None:
    program = SHAPES[shape](3).program()
    search = refiner(program)
    count = len(program.networks[0].terms[0].tensors)
    assert count <= 6
    start = left_to_right(range(count))
    best = min(search.seconds(tree) for tree in trees(tuple(range(count))))
    assert search.seconds(search.improve(start)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operands", [None, 3])
def test_never_slower_and_all_there(shape: str, operands: int | None) -> None:
    program = SHAPES[shape](24).program(operands)
    search = refiner(program)
    count = len(program.networks[0].terms[0].tensors)
    start = left_to_right(range(count))
    tree = search.improve(start)
    assert sorted(flatten(tree)) == list(range(count))
    assert search.seconds(tree) < search.seconds(start)


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_large_networks(shape: str) -> None:
    program = SHAPES[shape](26).program()
    for step in (Clean(), MergeCores(), Order()):
        context = Context(batches=(1, 64), outputs=frozenset({"y"})) if not isinstance(step, Order) else CONTEXT
        program, _ = apply_pass(step, program, tolerance=1e-4, context=context)


def test_windows_grow_with_the_network_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    window = Refiner._window

    def counted(self: Refiner, *args: object) -> object:
        nonlocal calls
        calls += 1
        return window(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Refiner, "_window", counted)
    taken = []
    for cores in (20, 40):
        calls = 0
        program = SHAPES["chain"](cores).program()
        refiner(program).improve(left_to_right(range(2 * cores)), sweeps=1)
        taken.append(calls)
    assert taken[0] > 0
    assert taken[1] < 2.5 * taken[0]


def test_the_same_network_gives_the_same_plan() -> None:
    first, second = (Order().run(SHAPES["hyper"](16).program(), CONTEXT)[0] for _ in range(2))
    assert str(first) == str(second)


def test_deep_orders_need_no_recursion() -> None:
    deep = left_to_right(range(5000))
    assert flatten(deep) == tuple(range(5000))
    assert flatten(map_tree(deep, lambda p: 4999 - p)) == tuple(range(4999, -1, -1))
    assert fold_tree(deep, lambda p: 1, lambda a, b: a + b) == 5000
