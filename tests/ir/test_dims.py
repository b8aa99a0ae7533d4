"""Sizes: integers, symbols and their products."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tncompile.ir import Dim, dims

VALUES = {"batch": 7, "seq": 5, "n": 1}
factors: st.SearchStrategy[Dim] = st.one_of(
    st.integers(0, 12), st.integers(1, 12), st.sampled_from(["batch", "seq", "n", "(seq + 1)", "(batch//2 - n)"])
)
sizes = st.lists(factors, max_size=4).map(dims.product)


@given(st.lists(sizes, max_size=4))
def test_product_is_the_product_whatever_the_symbols_are(parts: list[Dim]) -> None:
    assert dims.evaluate(dims.product(parts), VALUES) == math.prod(dims.evaluate(p, VALUES) for p in parts)


@given(st.lists(sizes, max_size=4), st.randoms())
def test_product_is_canonical(parts: list[Dim], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    total = dims.product(parts)
    assert dims.product(shuffled) == total
    assert dims.product([total]) == total
    assert dims.product([dims.product(parts[:2]), *parts[2:]]) == total


@given(sizes, sizes)
def test_divide_undoes_product(a: Dim, b: Dim) -> None:
    quotient = dims.divide(dims.product([a, b]), b)
    # nothing says that a symbol is not zero, so 0 is divided by numbers only
    assert quotient == (None if b == 0 or (a == 0 and dims.symbols(b)) else a)


@given(sizes, sizes)
def test_a_quotient_times_the_divisor_is_the_dividend(a: Dim, b: Dim) -> None:
    quotient = dims.divide(a, b)
    if quotient is None:
        assert b == 0 or dims.symbols(a) or dims.symbols(b) or dims.evaluate(a, VALUES) % dims.evaluate(b, VALUES)
    else:
        assert dims.product([quotient, b]) == a


@given(sizes)
def test_a_size_is_static_or_has_symbols(dim: Dim) -> None:
    assert dims.is_static(dim) == (not dims.symbols(dim))
    assert dims.symbols(dim) <= {*VALUES}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], 1),
        ([2, 3], 6),
        (["batch"], "batch"),
        (["batch", 13], "13*batch"),
        (["seq", 2, "batch", 3], "6*batch*seq"),
        (["batch", "batch"], "batch*batch"),
        (["2*batch", "(seq + 1)*3"], "6*(seq + 1)*batch"),
        (["batch", 0], 0),
    ],
)
def test_product(parts: list[Dim], expected: Dim) -> None:
    assert dims.product(parts) == expected


@pytest.mark.parametrize(
    ("dim", "by", "expected"),
    [
        (6, 2, 3),
        (6, 4, None),
        (6, 0, None),
        ("batch", "batch", 1),
        ("12*batch", 4, "3*batch"),
        ("12*batch", "4*batch", 3),
        ("12*batch", "8*batch", None),
        ("batch", "seq", None),
        (4, "batch", None),
        ("batch*batch*seq", "batch", "batch*seq"),
        ("2*(seq + 1)", "(seq + 1)", 2),
        ("(2*seq + 2)", 2, None),
    ],
)
def test_divide(dim: Dim, by: Dim, expected: Dim | None) -> None:
    assert dims.divide(dim, by) == expected


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (3, 3),
        ("batch", 7),
        ("13*batch", 91),
        ("(seq + 1)*batch", 42),
        ("((seq - 1)//2)", 2),
        ("(-seq + 6)", 1),
        ("(seq % 3)", 2),
        ("(batch**2)", 49),
        ("(batch / 2)", 3),
    ],
)
def test_evaluate(dim: Dim, expected: int) -> None:
    assert dims.evaluate(dim, VALUES) == expected


@pytest.mark.parametrize("dim", ["heads", "2*heads", "(Max(1, seq))", "(seq + 1.5)"])
def test_evaluate_refuses_what_it_does_not_know(dim: Dim) -> None:
    with pytest.raises(KeyError):
        dims.evaluate(dim, VALUES)


def test_symbols() -> None:
    assert dims.symbols("6*(seq + 1)*batch") == {"seq", "batch"}
    assert dims.symbols(6) == set()
