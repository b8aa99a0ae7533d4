"""Clean, where a golden file would not show it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import apply_pass, program_of
from tncompile.ir import Network
from tncompile.passes import Clean, Context

RANDOM = """
program
  input x: float32[batch, 4]
  opaque a: float32[batch, 4] = aten.{0}.default(%x{1})
  opaque b: float32[batch, 4] = aten.{0}.default(%x{1})
  network y: float32[batch, 4]
    indices n=batch, i=4
    term
      0 operand a[n, i]
      1 operand b[n, i]
    -> y[n, i]
  output y = y
"""


def test_two_draws_are_not_one() -> None:
    """Of equal nodes one stays, but not where each would draw its own numbers."""
    for target, more, nodes in (("rand_like", "", 3), ("bernoulli", "", 3), ("relu", "", 2), ("elu", ", 0.5", 2)):
        after, changes = Clean().run(program_of(RANDOM.format(target, more)), Context())
        assert (target, len(after.nodes), len(changes)) == (target, nodes, 3 - nodes)


def test_what_nothing_reads_is_told() -> None:
    """Operations that are not linear in one line, of a loop there may be hundreds."""
    read = ["x", "d0", "d1", "d2", "d3"]
    dead = "".join(f"  opaque d{k}: float32[batch, 4] = aten.relu.default(%{x})\n" for k, x in enumerate(read))
    text = f"""
program
  input x: float32[batch, 4]
  opaque y: float32[batch, 4] = aten.relu.default(%x)
{dead}  opaque z: float32[batch, 4] = aten.tanh.default(%y)
  output y = y
"""
    after, changes = Clean().run(program_of(text), Context())
    assert [n.value.name for n in after.nodes] == ["y"]
    # the first of the dead is y once more
    assert [str(c) for c in changes][-1] == "d1: dropped d1, d2, d3 and 2 more (nothing reads them)"
    assert changes[-1].details["values"] == ["d1", "d2", "d3", "d4", "z"]


def test_arguments_that_are_equal_in_python_but_not_to_torch() -> None:
    """1, 1.0 and True are three arguments."""
    text = """
program
  input x: float32[batch, 4]
  opaque a: float32[batch, 4] = aten.{0}(%x, 1)
  opaque b: float32[batch, 4] = aten.{0}(%x, 1.0)
  opaque c: float32[batch, 4] = aten.{0}(%x, True)
  opaque d: float32[batch, 4] = aten.{0}(%x, 1)
  output a = a
  output b = b
  output c = c
"""
    after, changes = Clean().run(program_of(text.format("pow.Tensor_Scalar")), Context())
    assert [n.value.name for n in after.nodes] == ["a", "b", "c"]
    assert [c.network for c in changes if "already" in c.what] + [c.network for c in changes if "dropped" in c.what]


def test_an_output_is_kept_though_a_duplicate() -> None:
    """Both names are the model's own; what reads the second may read the first."""
    text = """
program
  input x: float32[batch, 4]
  opaque a: float32[batch, 4] = aten.relu.default(%x)
  opaque b: float32[batch, 4] = aten.relu.default(%x)
  output first = a
  output second = b
"""
    after, _ = apply_pass(Clean(), program_of(text), tolerance=0)
    assert after.outputs == (("first", "a"), ("second", "b"))


def test_chains_of_identities_and_duplicates_end_in_one_pass() -> None:
    text = """
program
  input x: float32[batch, 4]
  network a: float32[batch, 4]
    indices n=batch, i=4
    term
      0 operand x[n, i]
    -> a[n, i]
  network b: float32[batch, 4]
    indices n=batch, i=4
    term
      0 operand a[n, i]
    -> b[n, i]
  opaque r: float32[batch, 4] = aten.relu.default(%b)
  opaque s: float32[batch, 4] = aten.relu.default(%a)
  opaque t: float32[batch, 4] = aten.relu.default(%s)
  opaque u: float32[batch, 4] = aten.relu.default(%r)
  network y: float32[batch, 4]
    indices n=batch, i=4
    term
      0 operand t[n, i]
    term
      0 operand u[n, i]
    -> y[n, i]
  output y = y
"""
    after, _ = apply_pass(Clean(), program_of(text), tolerance=0)
    assert [n.value.name for n in after.nodes] == ["r", "t", "y"]
    assert after.nodes[0].inputs == ("x",)


def test_a_second_run_finds_nothing() -> None:
    text = """
program
  input x: float32[batch, 1, 4]
  network y: float32[batch, 1]
    indices n=batch, one=1, i=4
    term
      0 operand x[n, one, i]
      1 core ones[i, one]
    term
      0 core bias[one]
    -> y[n, one]
  output y = y
"""
    after, first = apply_pass(Clean(), program_of(text, ones=1), tolerance=0)
    again, second = apply_pass(Clean(), after, tolerance=0)
    assert [c.what for c in first] == ["dropped one", "dropped ones"]
    assert (again, second) == (after, ())
    network = after.nodes[0]
    assert isinstance(network, Network)
    assert all(index.size != 1 for index in network.indices.values())


IDENTITY = """
program
  input x: float32[batch, 4]
  input z: float32[batch, 4]
  network y: float32[batch, 4{more}]
    indices n=batch, i=4, j=4, o=4, p=4
    term
      0 operand x[n, i]
      1 core eye[i, j]
      2 {second}
      3 core c[{core}]
    -> y[n, {out}]
  output y = y
"""


@pytest.mark.parametrize(
    ("second", "core", "out", "dropped"),
    [
        ("operand z[n, o]", "j, o, p", "p", True),
        ("operand z[n, j]", "o, p", "p", True),  # x · z
        ("operand z[n, o]", "o, p", "j, p", True),  # of the output: the other one takes its name
        ("operand z[n, i]", "j, p", "p", True),
        ("operand z[n, o]", "o, p", "i, j", False),  # a diagonal of the output
        ("operand z[n, o]", "i, j, p", "p", False),  # a diagonal of c
    ],
)
def test_an_identity_gives_another_name(second: str, core: str, out: str, dropped: bool) -> None:
    more = ", 4" * out.count(",")
    program = program_of(IDENTITY.format(second=second, core=core, out=out, more=more))
    (network,) = program.networks
    (term,) = network.terms
    eye = replace(term.tensors[1], data=np.eye(4, dtype=np.float32))
    whole = replace(network, terms=(replace(term, tensors=(term.tensors[0], eye, *term.tensors[2:])),))
    after, changes = apply_pass(Clean(), replace(program, nodes=(whole,)), tolerance=1e-6)
    assert [c.why for c in changes] == (["it is the identity"] if dropped else [])
    assert len(after.networks[0].terms[0].cores) == 2 - dropped
