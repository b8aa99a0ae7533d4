"""MergeCores, where a golden file would not show it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import apply_pass, program_of, reasons
from tests.test_property import single
from tncompile.passes import Context, MergeCores


@pytest.mark.parametrize("first", [0, 20, 40])
def test_random_networks(first: int) -> None:
    """Never more elements, never fewer cores than none, and nothing left that would merge."""
    merged = 0
    for seed in range(first, first + 20):
        program = single(seed, "float64")
        after, changes = apply_pass(MergeCores(), program, tolerance=1e-9)
        before_size, after_size = (
            sum(c.data.size for c in p.networks[0].cores if c.data is not None) for p in (program, after)
        )
        assert after_size <= before_size
        assert len(reasons(changes)) == len(program.networks[0].cores) - len(after.networks[0].cores)
        again, more = apply_pass(MergeCores(), after, tolerance=1e-9)
        assert not reasons(more)
        assert again == after
        merged += bool(reasons(changes))
    assert merged >= 5


def test_a_merged_core_is_rounded_once() -> None:
    """Three float32 cores in one merge chain are as exact as one float64 product that is rounded."""
    text = """
program
  input x: float32[batch, 4]
  network y: float32[batch, 4]
    indices b=batch, o=4, i=4, r=50
    term
      0 operand x[b, i]
      1 core A[i, r]
      2 core B[r, o]
    -> y[b, o]
  output y = y
"""
    program = program_of(text)
    after, _ = MergeCores().run(program, Context())
    a, b = (program.arrays[name].astype(np.float64) for name in "AB")
    (core,) = after.networks[0].cores
    np.testing.assert_array_equal(core.array(), (a @ b).astype(np.float32))


def test_names_tell_what_a_core_is_made_of() -> None:
    text = """
program
  input x: float32[batch, 2]
  network y: float32[batch, 2]
    indices b=batch, o=2, i=2, r=8, s=8
    term
      0 operand x[b, i]
      1 core net.fc.factor_0[i, r]
      2 core net.fc.factor_1[r, s]
      3 core net.out.factor_0[s, o]
    -> y[b, o]
  output y = y
"""
    after, _ = apply_pass(MergeCores(), program_of(text), tolerance=1e-6)
    assert [c.name for c in after.networks[0].cores] == ["net.fc.factor_0*factor_1*net.out.factor_0"]


def test_tied_cores_that_merge_differently_are_told_apart() -> None:
    """A weight of two networks merges with another core in each: two names for two arrays."""
    text = """
program
  input x: float32[batch, 2]
  network y: float32[batch, 2]
    indices b=batch, o=2, i=2, r=4
    term
      0 operand x[b, i]
      1 core W[i, r]
      2 core V[r, o]
    -> y[b, o]
  network z: float32[batch, 2]
    indices b=batch, o=2, i=2, r=4
    term
      0 operand x[b, i]
      1 core W[i, r]
      2 core V[r, o]
      3 core s[o]
    -> z[b, o]
  output y = y
  output z = z
"""
    after, _ = apply_pass(MergeCores(), program_of(text), tolerance=1e-6)
    names = [c.name for c in after.networks[0].cores + after.networks[1].cores]
    assert len({*names}) == len(names) == 2


def test_a_batch_mode_is_declined_with_its_reason() -> None:
    text = """
program
  input x: float32[batch, 2, 3]
  network y: float32[batch, 2, 2]
    indices b=batch, g=2, o=2, i=3, r=20
    term
      0 operand x[b, g, i]
      1 core A[g, i, r]
      2 core B[g, r, o]
    -> y[b, g, o]
  output y = y
"""
    after, changes = apply_pass(MergeCores(), program_of(text), tolerance=0)
    assert len(after.networks[0].cores) == 2
    assert len(reasons(changes, declined=True)) == 1
    assert "A and B" in reasons(changes, declined=True)[0]


def test_float16_products_that_do_not_fit_are_declined() -> None:
    text = """
program
  input x: float16[batch, 2]
  network y: float16[batch, 2]
    indices b=batch, o=2, i=2, r=4
    term
      0 operand x[b, i]
      1 core A[i, r]
      2 core B[r, o]
    -> y[b, o]
  output y = y
"""
    after, changes = apply_pass(MergeCores(), program_of(text, A=300, B=300), tolerance=0)
    assert len(after.networks[0].cores) == 2
    assert "does not fit" in reasons(changes, declined=True)[0]


def test_sites_with_operands_of_their_own_stay_apart() -> None:
    """The product of two sites is no larger, but each operand would meet the other's mode as well."""
    text = """
program
  input x: float32[batch, 2]
  input z: float32[batch, 2]
  network y: float32[batch, 4]
    indices b=batch, o=4, i=2, j=2, r=4, s=4
    term
      0 operand x[b, i]
      1 operand z[b, j]
      2 core A[i, s, r]
      3 core B[j, r, o]
      4 core C[s, s]
    -> y[b, o]
  output y = y
"""
    after, changes = apply_pass(MergeCores(), program_of(text), tolerance=1e-6)
    assert [c.name for c in after.networks[0].cores] == ["A*C", "B"]
    assert any("an operand of its own" in c.why for c in changes if c.declined)
