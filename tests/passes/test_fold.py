"""Fold, where a golden file would not show it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import apply_pass, feeds_for, program_of, reasons, reference
from tncompile.errors import SourceRef
from tncompile.ir import Network, Program
from tncompile.passes import Clean, Context, Fold

SYMBOLS = {"batch": 3}


def layers(count: int, bias: str = "", last: str = "") -> str:
    """A chain of layers of 4 to 4, with bits of text to put in."""
    lines = ["program", "  input x: float32[batch, 4]"]
    for k in range(count):
        lines += [
            f"  network h{k}: float32[batch, 4], layer fc{k}",
            "    indices b=batch, o=4, i=4",
            "    term",
            f"      0 operand {f'h{k - 1}' if k else 'x'}[b, i]",
            f"      1 core fc{k}.weight[o, i]",
            *([f"    term\n      0 core fc{k}.bias[o]"] if bias else []),
            f"    -> h{k}[b, o]",
        ]
    return "\n".join([*lines, last, f"  output y = h{count - 1}"])


def test_many_layers_are_one_network() -> None:
    after, changes = apply_pass(Fold(), program_of(layers(6, bias="bias")), tolerance=1e-5)
    (network,) = after.networks
    assert network.name == "fc0+fc1+fc2+fc3+fc4+fc5"
    assert [c.name for c in network.terms[0].cores] == [f"fc{k}.weight" for k in range(6)]
    assert [len(t.tensors) for t in network.terms if t.is_constant] == [1]
    assert reasons(changes)[0] == "h5: 6 operations are one network (nothing nonlinear between them)"


def test_a_bias_of_zeros_goes_with_a_word() -> None:
    text = layers(1, bias="bias")
    after, changes = apply_pass(Fold(), program_of(text, **{"fc0.bias": 0.0}), tolerance=0)
    assert not [t for n in after.networks for t in n.terms if t.is_constant]
    assert reasons(changes) == ["h0: dropped fc0.bias (it is 0 everywhere)"]


def test_apart_layers_stay_as_they_are() -> None:
    program = program_of(layers(3, bias="bias"))
    after, changes = apply_pass(Fold(apart=True), program, tolerance=0)
    assert [n.name for n in after.networks] == ["fc0", "fc1", "fc2"]
    assert all("layers are kept apart" in line for line in reasons(changes, declined=True))


def test_the_folded_bias_is_right() -> None:
    """All biases through all layers behind them, by numpy."""
    program = program_of(layers(3, bias="bias"))
    after, _ = Fold().run(program, Context())
    weight = {name: array.astype(np.float64) for name, array in program.arrays.items()}
    expected = weight["fc2.bias"] + weight["fc2.weight"] @ (
        weight["fc1.bias"] + weight["fc1.weight"] @ weight["fc0.bias"]
    )
    (constant,) = [t for t in after.networks[0].terms if t.is_constant]
    np.testing.assert_allclose(constant.tensors[0].array(), expected, rtol=1e-6)


@pytest.mark.parametrize(("limit", "networks"), [(7, 1), (4, 2), (2, 6)])
def test_a_term_has_so_many_tensors_at_most(limit: int, networks: int) -> None:
    after, changes = apply_pass(Fold(max_tensors=limit), program_of(layers(6)), tolerance=0)
    assert len(after.networks) == networks
    assert max(len(t.tensors) for n in after.networks for t in n.terms) <= limit
    assert bool(reasons(changes, declined=True)) == (networks > 1)
    assert all(f"over {limit} tensors" in line for line in reasons(changes, declined=True))


def test_an_output_is_never_put_elsewhere() -> None:
    """What the model shows is computed for itself, and read by what follows."""
    text = layers(2).replace("  output y", "  output h = h0\n  output y")
    after, changes = apply_pass(Fold(), program_of(text), tolerance=0)
    assert [n.output.name for n in after.networks] == ["h0", "h1"]
    assert reasons(changes, declined=True) == [
        "h1: h0 (fc0) stays a network of its own (others read it too, and would compute it again)"
    ]


def test_a_view_of_an_output_is_free() -> None:
    text = """
program
  input x: float32[batch, 6]
  network v: float32[batch, 2, 3]
    indices b=batch, i=2, j=3
    term
      0 operand x[b, (i j)]
    -> v[b, i, j]
  network y: float32[batch, 2]
    indices b=batch, i=2, j=3
    term
      0 operand v[b, i, j]
      1 core W[j]
    -> y[b, i]
  output v = v
  output y = y
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=0)
    assert [n.inputs for n in after.networks] == [("x",), ("x",)]


def test_a_square_is_not_a_sum_of_squares() -> None:
    """A value with a bias that is read twice by one term stays apart: (x W + b)^2 has a mixed term."""
    text = layers(
        1,
        bias="bias",
        last="  network s: float32[batch]\n    indices b=batch, i=4\n    term\n      0 operand h0[b, i]\n"
        "      1 operand h0[b, i]\n    -> s[b]",
    ).replace("y = h0", "y = s")
    after, changes = apply_pass(Fold(), program_of(text), tolerance=0)
    assert [n.output.name for n in after.networks] == ["h0", "s"]
    assert len(reasons(changes, declined=True)) == 1


def test_a_network_keeps_the_place_it_comes_from() -> None:
    """The composed network has the name and the source of the layer with the cores."""
    text = """
program
  input x: float32[batch, 6]
  network v: float32[batch, 2, 3]
    indices b=batch, i=2, j=3
    term
      0 operand x[b, (i j)]
    -> v[b, i, j]
  network y: float32[batch, 2, 4], layer fc
    indices b=batch, i=2, j=3, o=4
    term
      0 operand v[b, i, j]
      1 core W[j, o]
    -> y[b, i, o]
  network z: float32[batch, 8]
    indices b=batch, i=2, o=4
    term
      0 operand y[b, i, o]
    -> z[b, (i o)]
  output z = z
"""
    program = program_of(text)
    sources = [SourceRef("", "a.py", 1), SourceRef("fc", "a.py", 2), SourceRef("", "a.py", 3)]
    nodes = tuple(
        Network(n.name, n.terms, n.output, n.dtype, source) for n, source in zip(program.networks, sources, strict=True)
    )
    after, _ = Fold().run(Program(program.inputs, nodes, program.outputs), Context())
    (network,) = after.networks
    assert (network.name, network.source, network.output.name) == ("fc", SourceRef("fc", "a.py", 2), "z")


def test_shared_weights_stay_one_array() -> None:
    """The core of two layers is one array under one name, before and after."""
    program = program_of(layers(3).replace("fc1.weight", "fc0.weight").replace("fc2.weight", "fc0.weight"))
    after, _ = apply_pass(Fold(), program, tolerance=0)
    assert [c.name for c in after.networks[0].cores] == ["fc0.weight"] * 3
    assert len({id(c.data) for c in after.networks[0].cores}) == 1


def test_a_network_of_cores_alone_that_is_shown_stays() -> None:
    text = """
program
  network w: float32[3, 4]
    indices i=3, o=4, r=2
    term
      0 core A[i, r]
      1 core B[r, o]
    -> w[i, o]
  output w = w
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=0)
    assert [n.output.name for n in after.networks] == ["w"]


def test_a_bias_over_other_modes_than_the_layer() -> None:
    """The sum of a bias over one output mode and one over the other has both."""
    text = """
program
  input x: float32[batch, 2]
  network h: float32[batch, 3, 4], layer fc
    indices b=batch, p=3, q=4, i=2
    term
      0 operand x[b, i]
      1 core W[i, p, q]
    term
      0 core left[p]
    term
      0 core right[q]
    term
      0 core number[]
    -> h[b, p, q]
  output h = h
"""
    program = program_of(text)
    after, _ = apply_pass(Fold(), program, tolerance=1e-6)
    (constant,) = [t for t in after.networks[0].terms if t.is_constant]
    assert [i.name for i in constant.tensors[0].indices] == ["p", "q"]
    arrays = program.arrays
    expected = arrays["left"][:, None] + arrays["right"][None, :] + arrays["number"]
    np.testing.assert_allclose(constant.tensors[0].array(), expected, rtol=1e-6)


def test_biases_that_are_numbers() -> None:
    """Two biases without any mode are one, without any mode."""
    text = """
program
  input x: float32[batch]
  network y: float32[batch]
    indices b=batch
    term
      0 operand x[b]
    term
      0 core one[]
    term
      0 core two[]
    -> y[b]
  output y = y
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    (constant,) = [t for t in after.networks[0].terms if t.is_constant]
    assert constant.tensors[0].shape == ()


@pytest.mark.parametrize(
    ("read", "core", "indices", "terms"),
    [
        ("x[b, (i j)]", "V[i, j, o]", "", 1),
        ("x[b, k]", "V[k, o]", ", k=6", 1),  # one summed index, split where the other term has two
        ("x[b, (k l)]", "V[k, l, o]", ", k=3, l=2", 2),
    ],
)
def test_an_adapter_is_added_where_modes_nest(read: str, core: str, indices: str, terms: int) -> None:
    """x whole is the same operand as x split into modes; x split into others that do not nest is not."""
    text = f"""
program
  input x: float32[batch, 6]
  network y: float32[batch, 4]
    indices b=batch, o=4, i=2, j=3{indices}
    term
      0 operand x[b, (i j)]
      1 core W[i, j, o]
    term
      0 operand {read}
      1 core {core}
    -> y[b, o]
  output y = y
"""
    after, changes = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    assert len(after.networks[0].terms) == terms
    assert len(reasons(changes)) == 2 - terms


def test_a_number_is_added_to_each_of_a_vector() -> None:
    """w·x + 2·x: a core without the other's mode is the same along it."""
    text = """
program
  input x: float32[batch, 6]
  network y: float32[batch, 6]
    indices b=batch, o=6
    term
      0 operand x[b, o]
      1 core W[o]
    term
      0 operand x[b, o]
      1 core two[]
    -> y[b, o]
  output y = y
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    (term,) = after.networks[0].terms
    assert [core.shape for core in term.cores] == [(6,)]


def test_a_value_that_meets_itself_is_computed_once() -> None:
    """h·h is no product of two layers."""
    text = """
program
  input x: float32[batch, 3]
  network h: float32[batch, 4]
    indices b=batch, i=3, o=4
    term
      0 operand x[b, i]
      1 core W[i, o]
    -> h[b, o]
  network y: float32[batch, 4]
    indices b=batch, o=4
    term
      0 operand h[b, o]
      1 operand h[b, o]
    -> y[b, o]
  output y = y
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    assert [n.output.name for n in after.networks] == ["h", "y"]


def test_terms_that_merge_anyway_make_no_room() -> None:
    """Two terms of x become one; that is no reason to compute another layer twice."""
    text = """
program
  input x: float32[batch, 8]
  input z: float32[batch, 8]
  network h: float32[batch, 2]
    indices b=batch, i=8, r=2
    term
      0 operand z[b, i]
      1 core Z[i, r]
    -> h[b, r]
  opaque t: float32[batch, 2] = aten.tanh.default(%h)
  network y: float32[batch, 8]
    indices b=batch, i=8, o=8, r=2
    term
      0 operand x[b, i]
      1 core A[i, o]
    term
      0 operand x[b, i]
      1 core B[i, o]
    term
      0 operand h[b, r]
      1 core C[r, o]
    -> y[b, o]
  output y = y
  output t = t
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    assert [(n.output.name, n.inputs) for n in after.networks] == [("h", ("z",)), ("y", ("x", "h"))]


def test_cores_of_different_modes_stay_two() -> None:
    """x A along one mode of the result and x B along another: their sum has both, and is larger than either."""
    text = """
program
  input x: float32[batch, 3]
  network y: float32[batch, 4, 5]
    indices b=batch, i=3, o=4, p=5
    term
      0 operand x[b, i]
      1 core A[i, o]
    term
      0 operand x[b, i]
      1 core B[i, p]
    -> y[b, o, p]
  output y = y
"""
    after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    assert len(after.networks[0].terms) == 2


def test_several_uses_of_a_layer_become_one() -> None:
    """y = h + m·h - 2·h, as an adapter with magnitudes has it: one product and one bias, and h is gone."""
    text = """
program
  input x: float32[batch, 3]
  network h: float32[batch, 4]
    indices b=batch, i=3, o=4
    term
      0 operand x[b, i]
      1 core W[i, o]
    term
      0 core bias[o]
    -> h[b, o]
  network y: float32[batch, 4]
    indices b=batch, o=4
    term
      0 operand h[b, o]
    term
      0 operand h[b, o]
      1 core m[o]
    term
      0 operand h[b, o]
      1 core two[]
    -> y[b, o]
  output y = y
"""
    after, changes = apply_pass(Fold(), program_of(text), tolerance=1e-6)
    (network,) = after.networks
    assert [len(term.tensors) for term in network.terms] == [2, 1]
    assert not any(change.declined for change in changes)


def layer_with_adapter(name: str, small: bool) -> str:
    """A layer of x, of one core or of two small ones, and an adapter that reads a."""
    cores = f"U{name}[i, s]\n      2 core V{name}[s, o]" if small else f"W{name}[i, o]"
    return f"""
  network {name}: float32[batch, 8]
    indices b=batch, i=8, o=8, r=2{", s=2" * small}
    term
      0 operand x[b, i]
      1 core {cores}
    term
      0 operand a[b, r]
      1 core B{name}[r, o]
    -> {name}[b, o]"""


def test_an_adapter_whose_factor_others_share_is_added_into_each_layer() -> None:
    """Layers whose adapters share a = x A: one of a single core takes it in, one of small cores does not."""

    def terms(*small: bool) -> dict[str, int]:
        names = "qkv"[: len(small)]
        text = f"""
program
  input x: float32[batch, 8]
  network a: float32[batch, 2]
    indices b=batch, i=8, r=2
    term
      0 operand x[b, i]
      1 core A[i, r]
    -> a[b, r]{"".join(map(layer_with_adapter, names, small))}
{"".join(f"  output {name} = {name}" + chr(10) for name in names)}"""
        after, _ = apply_pass(Fold(), program_of(text), tolerance=1e-6)
        return {n.output.name: len(n.terms) for n in after.networks}

    assert terms(False, False) == {"q": 1, "k": 1}
    assert terms(False, True, True) == {"a": 1, "q": 1, "k": 2, "v": 2}


def test_an_adapter_larger_than_the_layer_stays() -> None:
    """Where the product of an adapter's factors is larger than all that is there, two small terms are cheaper."""
    text = """
program
  input x: float32[batch, 64]
  network y: float32[batch, 64]
    indices b=batch, o=64, i=64, r=2, q=2
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
    after, _ = apply_pass(Fold(), program_of(text), tolerance=0)
    assert [len(t.cores) for t in after.networks[0].terms] == [2, 2]


def test_composition_agrees_with_numpy_layer_by_layer() -> None:
    """Not with `tncompile.ir.evaluate`, which the tests of single passes use."""
    program = program_of(layers(4, bias="bias"))
    after, _ = Fold().run(Clean().run(program, Context())[0], Context())
    feeds = feeds_for(program, SYMBOLS)
    expected = reference(program, feeds, SYMBOLS)["h3"]
    np.testing.assert_allclose(reference(after, feeds, SYMBOLS)["h3"], expected, rtol=0, atol=1e-5)
