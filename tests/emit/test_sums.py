"""Biases, and sums of several terms."""

from __future__ import annotations

import pytest

from tests.emit.programs import count, emit, network


@pytest.mark.parametrize(
    ("bias", "output", "shape"),
    [
        ("c[p]", "y[b, p, q]", "batch, 3, 4"),
        ("c[q]", "y[b, p, q]", "batch, 3, 4"),
        ("c[p, q]", "y[b, p, q]", "batch, 3, 4"),
        ("c[q, p]", "y[b, (p q)]", "batch, 12"),
        ("c[p]", "y[b, (p q)]", "batch, 12"),
        ("c[q]", "y[(p q), b]", "12, batch"),
        ("c[q]", "y[(b p), q]", "3*batch, 4"),
        ("c[p]", "y[(b p), q]", "3*batch, 4"),
        ("c[]", "y[b, p, q]", "batch, 3, 4"),
        ("c[]", "y[(p q b)]", "12*batch"),
        ("c[()]", "y[q, (p b)]", "4, 3*batch"),
        ("c[n]", "y[b, p, q, n]", "batch, 3, 4, 2"),
        ("c[p, n]", "y[n, (b p), q]", "2, 3*batch, 4"),
    ],
)
def test_biases(bias: str, output: str, shape: str) -> None:
    extra = ", n=2" if "n" in bias else ""
    body = f"""
indices b=batch, p=3, q=4, i=6{extra}
term
  0 operand x[b, i]
  1 core W[i, p, q]
term
  0 core {bias}
-> {output}
"""
    emit(network(body, shape))


def test_a_number_added_where_the_dynamic_size_is_last() -> None:
    """The bias is no vector there, for its length would be the batch's."""
    body = """
indices o=4, b=batch, i=6
term
  0 operand x[b, i]
  1 core W[o, i]
term
  0 core c[]
-> y[o, b]
"""
    emit(network(body, "4, batch"))


def test_a_residual() -> None:
    body = """
indices b=batch, o=6, i=6
term
  0 operand x[b, i]
  1 core W[o, i]
term
  0 operand x[b, o]
term
  0 core c[o]
-> y[b, o]
"""
    compiled = emit(network(body, "batch, 6"))
    assert count(compiled) == {"Gemm": 1, "Add": 1}


def test_terms_that_lack_output_indices() -> None:
    body = """
indices b=batch, i=6, n=2, j=6
term
  0 operand x[b, i]
term
  0 operand x[b, j]
  1 core W[j, n]
term
  0 core c[n]
-> y[b, n, i]
"""
    emit(network(body, "batch, 2, 6"))
