"""Shapes that are known at run time only."""

from __future__ import annotations

import pytest

from tests.emit.programs import TWO, emit, network
from tncompile.passes import Clean, Order


@pytest.mark.parametrize(
    ("inputs", "operand", "output", "shape"),
    [
        (TWO, "x[b, s, i]", "y[(b s), i]", "batch*seq, 6"),
        (TWO, "x[b, s, i]", "y[(s b), i]", "batch*seq, 6"),
        (TWO, "x[b, s, i]", "y[(b i), s]", "6*batch, seq"),
        (TWO, "x[b, s, i]", "y[i, (s b)]", "6, batch*seq"),
        (TWO, "x[b, s, i]", "y[(b s i)]", "6*batch*seq"),
        (TWO, "x[b, s, i]", "y[(s i), b]", "6*seq, batch"),
        ("x: float32[6*batch, seq]", "x[(b i), s]", "y[i, s, b]", "6, seq, batch"),
        ("x: float32[6*batch, seq]", "x[(i b), s]", "y[(b s), i]", "batch*seq, 6"),
    ],
)
def test_views_of_two_dynamic_sizes(inputs: str, operand: str, output: str, shape: str) -> None:
    body = f"indices b=batch, s=seq, i=6\nterm\n  0 operand {operand}\n-> {output}"
    emit(network(body, shape, inputs))


@pytest.mark.parametrize(
    ("operand", "output", "shape"),
    [
        ("h[(b s), i]", "y[b, s, i]", "batch, seq, 6"),
        ("h[(b s), i]", "y[s, b, i]", "seq, batch, 6"),
        ("h[(b s), i]", "y[b, i, s]", "batch, 6, seq"),
        ("h[(b s), i]", "y[(s i), b]", "6*seq, batch"),
        ("h[(b s), i]", "y[b, i]", "batch, 6"),
        ("h[(b s), i]", "y[s]", "seq"),
    ],
)
def test_a_merged_axis_is_split_again(operand: str, output: str, shape: str) -> None:
    """``h.view(batch, seq, -1)`` behind a nonlinear layer on ``(batch * seq)`` rows: only the model's inputs tell
    what the two sizes are."""
    text = f"""
program
  input x: float32[batch, seq, 6]
  network h: float32[batch*seq, 6]
    indices b=batch, s=seq, i=6
    term
      0 operand x[b, s, i]
    -> h[(b s), i]
  network y: float32[{shape}]
    indices b=batch, s=seq, i=6
    term
      0 operand {operand}
    -> {output}
  output h = h
  output y = y
"""
    emit(text, (Clean(), Order()))


def test_a_merged_axis_of_a_derived_size_is_split_again() -> None:
    """Rows of (batch, seq + 1), as behind a class token that was put before a sequence."""
    text = """
program
  input x: float32[batch, seq, 1]
  input h: float32["(seq + 1)*batch", 6]
  network y: float32[batch, "(seq + 1)", 6]
    indices b=batch, t="(seq + 1)", i=6
    term
      0 operand h[(b t), i]
    -> y[b, t, i]
  output y = y
"""
    emit(text, (Clean(), Order()))


def test_a_layer_on_rows_of_two_sizes() -> None:
    body = """
indices b=batch, s=seq, o=4, i=6
term
  0 operand x[b, s, i]
  1 core W[o, i]
term
  0 core bias[o]
-> y[(b s), o]
"""
    emit(network(body, "batch*seq, 4", TWO))


def test_batch_modes_of_a_core_before_two_dynamic_sizes() -> None:
    """A matmul for each group, with two dynamic sizes that no Reshape may join."""
    body = """
indices g=3, b=batch, s=seq, o=4, i=2
term
  0 operand x[g, b, s, i]
  1 core W[g, o, i]
-> y[g, b, s, o]
"""
    emit(network(body, "3, batch, seq, 4", "x: float32[3, batch, seq, 2]"))


@pytest.mark.parametrize("output", ["y[b, s, g, o]", "y[g, b, o, s]", "y[b, g, s, o]", "y[s, g, o, b]"])
def test_groups_and_two_dynamic_sizes_in_any_order(output: str) -> None:
    sizes = {"b": "batch", "s": "seq", "g": "3", "o": "4"}
    shape = ", ".join(sizes[n] for n in output[2:-1].split(", "))
    body = f"""
indices b=batch, s=seq, g=3, o=4, i=2, r=2
term
  0 operand x[b, s, (g i)]
  1 core W[g, i, r]
  2 core V[g, r, o]
-> {output}
"""
    emit(network(body, shape, TWO), (Clean(), Order(margin=-0.99)))


def test_attention_scores_of_two_dynamic_sizes() -> None:
    body = """
indices b=batch, h=2, q=seq, k=seq, d=3
term
  0 operand x[b, q, (h d)]
  1 operand z[b, k, (h d)]
-> y[b, h, q, k]
"""
    emit(network(body, "batch, 2, seq, seq", f"{TWO}; z: float32[batch, seq, 6]"))
