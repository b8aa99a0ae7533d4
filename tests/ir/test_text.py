"""The text of programs: what it looks like, that it parses back, and what is said where it does not."""

from __future__ import annotations

import math
import re
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import arguments, programs
from tncompile.errors import ParseError, SourceRef
from tncompile.ir import Index, Network, Opaque, Program, Tensor, Term, Value, text, verify
from tncompile.ir.core import same_array
from tncompile.ir.opaque import Constant, Ref

EXAMPLE = textwrap.dedent(str(text.__doc__).split("\n\n")[1]) + "\n"


@settings(max_examples=200, deadline=None)
@given(program=programs(scheduled=True))
def test_every_program_parses_back(program: Program) -> None:
    printed = text.dump(program)
    assert printed.isascii()
    parsed = text.parse(printed, program.arrays)
    assert parsed == program
    assert text.dump(parsed) == printed
    assert [n.source for n in parsed.nodes] == [n.source for n in program.nodes]
    verify(parsed, "scheduled")


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_every_program_parses_without_arrays(program: Program) -> None:
    parsed = text.parse(text.dump(program))
    assert text.dump(parsed) == text.dump(program)
    verify(parsed)
    for name, array in parsed.arrays.items():
        assert (array.shape, array.dtype) == (program.arrays[name].shape, program.arrays[name].dtype)
        assert not any(array.strides) and not array.any()
        assert parsed.arrays[name] is array


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 9) | st.text(max_size=8), max_size=3), st.text(max_size=8), st.text(max_size=8))
def test_any_sizes_and_names_parse_back(shape: list[int | str], name: str, dtype: str) -> None:
    program = Program((Value(name, dtype, tuple(shape)),), (), ((dtype, name),))
    assert text.parse(text.dump(program)) == program


@settings(max_examples=200, deadline=None)
@given(st.lists(arguments(["x", "a b"]), max_size=4))
def test_any_arguments_parse_back_with_their_types(args: list[object]) -> None:
    node = Opaque("n", "t", tuple(args), (("k", tuple(args)),), Value("n", "tuple"))  # type: ignore[arg-type]
    (parsed,) = text.parse(text.dump(Program((), (node,), ()))).nodes
    assert repr(parsed) == repr(node)


def test_the_documented_example_is_what_dump_prints() -> None:
    program = text.parse(EXAMPLE)
    verify(program, "scheduled")
    assert text.dump(program) == str(program) == EXAMPLE
    network = program.networks[0]
    assert network.source == SourceRef("fc1", "model.py", 12, "h = self.fc1(x)")
    assert text.dump_node(network) in textwrap.dedent(EXAMPLE.partition("\n")[2])


def test_sources_can_be_left_out() -> None:
    program = text.parse(EXAMPLE)
    assert "#" not in text.dump(program, sources=False)
    assert text.parse(text.dump(program, sources=False), program.arrays) == program


@pytest.mark.parametrize(
    "source",
    [
        SourceRef(),
        SourceRef("fc1"),
        SourceRef("encoder.0.fc1", "/home/me/model.py", 12),
        SourceRef("", "model.py", 12),
        SourceRef("fc1", "model.py", 12, 'y = x[:, 0]  # a "comment"'),
        SourceRef("", r"C:\models\net.py", 3, "return x"),
    ],
)
def test_sources_parse_back(source: SourceRef) -> None:
    node = Opaque("n", "t", (), (), Value("n", "tuple"), source)
    assert text.parse(text.dump(Program((), (node,), ()))).nodes[0].source == source


def test_a_source_never_breaks_the_text() -> None:
    source = SourceRef("a\nb", "c\r\nd", -1, "x =\\\n  y\x00")
    node = Opaque("n", "t", (), (), Value("n", "tuple"), source)
    program = Program((), (node, Opaque("m", "t", (), (), Value("m", "tuple"))), ())
    assert text.parse(text.dump(program)) == program


def test_comments_blank_lines_and_indentation_are_free() -> None:
    program = text.parse(EXAMPLE)
    lines = text.dump(program, sources=False).splitlines()
    loose = "# a program\n\n" + "\n\n  # more\n".join(f"\t{line.strip()}  # {k}" for k, line in enumerate(lines))
    assert text.parse(loose, program.arrays) == program


def test_one_name_is_one_array() -> None:
    lines = ["program", "weight w: float32[2]", "network y: float32[2]", "indices i=2", "term"]
    program = text.parse("\n".join([*lines, "0 core w[i]", "1 core w[i]", "order (0 1)", "-> y[i]"]))
    first, second = program.networks[0].cores
    assert first.data is second.data is program.weights["w"]
    verify(program)


def test_steps_none_and_empty_steps_differ() -> None:
    core = Tensor("c", (), np.zeros((), "float32"))
    for steps in (None, ()):
        network = Network("y", (Term((core,), 0, steps),), Tensor("y", ()), "float32")
        program = Program((), (network,), ())
        assert text.parse(text.dump(program), program.arrays).networks[0].terms[0].steps == steps


def test_nan_infinity_and_minus_zero() -> None:
    args = (math.nan, (math.inf, -math.inf), -0.0, 1e300, np.float64(0.1))
    node = Opaque("n", "t", args, (), Value("n", "tuple"))
    program = Program((), (node,), ())
    assert "t(nan, [inf, -inf], -0.0, 1e+300, 0.1)" in text.dump(program)
    assert text.parse(text.dump(program)) == program


def test_constants_that_look_like_something_else_are_quoted() -> None:
    args = (
        Constant("None"),
        None,
        Constant("nan"),
        Constant("a b"),
        "torch.float32",
        Constant("torch.float32"),
        Ref("q q"),
    )
    program = Program((), (Opaque("n", "t", args, (), Value("n", "tuple")),), ())
    assert 'constant "None", None, constant "nan", constant "a b", "torch.float32", torch.float32, %"q q"' in text.dump(
        program
    )
    assert text.parse(text.dump(program)) == program


def test_the_text_of_a_broken_network_shows_both_sizes() -> None:
    a, b = Index("i", 2), Index("i", 3)
    network = Network("y", (Term((Tensor("x", ((a,),)), Tensor("x", ((b,),)))),), Tensor("y", ()), "float32")
    assert "indices i=2, i=3" in text.dump_node(network)


def test_given_arrays_are_shared_not_copied() -> None:
    program = text.parse(EXAMPLE)
    arrays = {name: np.ones(a.shape, a.dtype) for name, a in program.arrays.items()}
    parsed = text.parse(EXAMPLE, arrays)
    assert all(parsed.arrays[name] is array for name, array in arrays.items())
    assert not same_array(parsed.weights["conv.weight"], program.weights["conv.weight"])


def test_arrays_that_do_not_fit_are_refused() -> None:
    arrays = text.parse(EXAMPLE).arrays
    missing = {k: v for k, v in arrays.items() if k != "fc1.factor_1"}
    with pytest.raises(ParseError, match=r"line 9, column 14: no array is given for fc1.factor_1"):
        text.parse(EXAMPLE, missing)
    with pytest.raises(ParseError, match=r"the array fc1.bias is float32\[3\], not float32\[1024\]"):
        text.parse(EXAMPLE, {**arrays, "fc1.bias": np.zeros(3, "float32")})
    with pytest.raises(ParseError, match=r"the array conv.weight is float64\[16, 1, 3, 3\], not float32\["):
        text.parse(EXAMPLE, {**arrays, "conv.weight": np.zeros((16, 1, 3, 3))})


def error_of(program: str) -> str:
    with pytest.raises(ParseError) as caught:
        text.parse(program)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "at", "message"),
    [
        ("(i1 i2)]", "(i1 i9)]", 7, "i9", "index i9 is not in the line 'indices'"),
        ("(i1 i2)]", "(i1 i2]", 7, "]", "expected an index, or a group of them in parentheses, found ]"),
        ("o1, r]", "o1, r", 8, "", "expected ',' or ']', found the end of the line"),
        ("o1, r]", "o1; r]", 8, "; r", "expected ',' or ']', found ;"),
        ("1 core", "2 core", 8, "2 core", "expected the number 1"),
        ("1 core", "1 cord", 8, "cord", "expected 'core' or 'operand', found cord"),
        ("((0 1) 2)", "((0 x) 2)", 10, "x", "expected a tensor's number or '(', found x"),
        ("((0 1) 2)", "((0 1) 2", 10, "", "expected a tensor's number or '(', found the end of the line"),
        ("= gemm(0, 1)", "= gemm(0 1)", 12, "1)", "expected ',', found 1"),
        ("3 = gemm", "4 = gemm", 12, "4 =", "expected the number 3"),
        ("o2=32", "o2=33", 4, "h: ", "h has shape [batch, 1024], the line '->' says h of shape [batch, 1056]"),
        ("o2=32", "o1=32", 5, "o1=32, i1", "index o1 is there twice"),
        ("o2=32", "o2=", 5, ", i1", "expected a size, found ,"),
        ("o2=32", "o2=3$2", 5, "3$2", "3$2 is not a size"),
        ("r=8", "r=rank", 8, "fc1.factor_0", "fc1.factor_0 needs a shape of numbers, not [4, 32, rank]"),
        (", layer fc1", ", module fc1", 4, "module", "expected 'layer', found module"),
        ("-> h[", "-> g[", 4, "h: ", "the line '->' says g"),
        ("    -> h[", "    => h[", 16, "=>", "expected a tensor, 'order', 'steps', 'term' or '->', found ="),
        ("(%h)", "(%h", 17, "", "expected ',' or ')', found the end of the line"),
        ("(%h)", "(12..3)", 17, "12..3", "12..3 is not a number, a name or a string"),
        ("(%h)", '("a)', 17, '"a)', "not a JSON string: Unterminated string"),
        ("(%h)", "(constant x)", 17, "x)", "expected the constant's spelling as a string, found x"),
        ("(%h)", "(dim=1, 2)", 17, "2)", "expected a keyword argument, found 2"),
        ("(%h)", "(%h) again", 17, "again", "expected the end of the line, found again"),
        ("output y = relu", "output y relu", 18, "relu", "expected '=', found relu"),
        (
            "output y",
            "result y",
            18,
            "result",
            "expected 'input', 'weight', 'network', 'opaque', 'switch' or 'output', found result",
        ),
        ("input x: float32[", "input x float32[", 2, "float32[", "expected ':', found float32"),
        ("weight conv.weight: float32", "weight conv.weight: floor32", 3, "conv", "floor32 is not a dtype of numpy"),
        ("float32[16, 1, 3, 3]", "float32[16, n]", 3, "conv", "conv.weight needs a shape of numbers, not [16, n]"),
        ("float32[16, 1, 3, 3]", "tuple", 3, "conv", "conv.weight needs a shape of numbers, not none"),
        ("fc1.bias[(o1 o2)]", "fc1.factor_0[(o1 o2)]", 15, "fc1", "the array fc1.factor_0 is float32["),
        ("program", "programme", 1, "programme", "expected 'program', found programme"),
    ],
)
def test_errors_say_where_and_what(old: str, new: str, line: int, at: str, message: str) -> None:
    broken = EXAMPLE.replace(old, new, 1)
    assert broken != EXAMPLE
    found = error_of(broken)
    assert message in found
    where = re.match(r"line (\d+), column (\d+): .*\n(.*)\n( *)\^$", found)
    assert where is not None
    assert int(where[1]) == line
    assert where[3] == broken.split("\n")[line - 1]
    assert len(where[4]) + 1 == int(where[2])
    assert where[3][len(where[4]) :].startswith(at)


@pytest.mark.parametrize("program", ["", "\n\n", "# only a comment"])
def test_an_empty_text_is_an_error(program: str) -> None:
    assert "expected 'program', found the end of the text" in error_of(program)


def test_a_text_that_ends_early_is_an_error() -> None:
    lines = EXAMPLE.splitlines()
    assert "expected 'term' or '->', found the end of the text" in error_of("\n".join(lines[:5]))
    assert "'order', 'steps', 'term' or '->', found the end of the text" in error_of("\n".join(lines[:9]))


def test_a_weight_that_is_there_twice_is_an_error() -> None:
    assert "line 3, column 8: weight w is there twice" in error_of("program\nweight w: float32[]\nweight w: float32[]")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(EXAMPLE)), st.integers(0, 9), st.text('()[]#,=:%"\n 01ahx->', max_size=4))
def test_a_damaged_text_parses_or_is_a_parse_error(start: int, length: int, inserted: str) -> None:
    damaged = EXAMPLE[:start] + inserted + EXAMPLE[start + length :]
    try:
        program = text.parse(damaged)
    except ParseError:
        return
    assert text.parse(text.dump(program)) == program
