"""Switches in the IR: which case serves which size, the text, what the verifier refuses, and the views."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import each_case, evaluate_program, feeds_for, program_of
from tests.strategies import SYMBOLS, draw_switch, feeds, networks
from tncompile.errors import ParseError, SourceRef, VerificationError
from tncompile.inspect import networkx_json, to_dot, to_json, to_networkx
from tncompile.ir import Network, Program, Switch, Term, Value, evaluate, text, verify
from tncompile.ir.core import networks_of

TEXT = """\
program
  input x: float32[batch, 6]
  switch batch <= 8, 64
    network h: float32[batch, 4], layer fc1  # fc1, model.py:12: h = self.fc1(x)
      indices batch=batch, o=4, i=6, r=2
      term
        0 operand x[batch, i]
        1 core a[i, r]
        2 core b[r, o]
        order ((0 1) 2)
        steps
          3 = matmul(0, 1) -> [batch, r]
          4 = matmul(3, 2) -> [batch, o]
      -> h[batch, o]
    network h: float32[batch, 4], layer fc1  # fc1, model.py:12: h = self.fc1(x)
      indices n=batch, o=4, r=2, i=6
      term
        0 core b[r, o]
        1 core a[i, r]
        2 operand x[n, i]
        order (0 (1 2))
        steps
          3 = core_left(2, 1) -> [n, r]
          4 = matmul(3, 0) -> [n, o]
      -> h[n, o]
    network h: float32[batch, 4], layer fc1  # fc1, model.py:12: h = self.fc1(x)
      indices batch=batch, o=4, i=6
      term
        0 operand x[batch, i]
        1 core a*b[i, o]
        order (0 1)
        steps
          2 = matmul(0, 1) -> [batch, o]
      -> h[batch, o]
  opaque relu: float32[batch, 4] = aten.relu.default(%h)
  output y = relu
"""


def example() -> Program:
    """The program of the text, its dense core the product of the two others."""
    program = program_of(TEXT)
    arrays = program.arrays
    product = (np.float64(arrays["a"]) @ np.float64(arrays["b"])).astype(np.float32)
    return program_of(TEXT, a=arrays["a"], b=arrays["b"], **{"a*b": product})


PROGRAM = example()
SWITCH = PROGRAM.nodes[0]
assert isinstance(SWITCH, Switch)


def with_switch(**changes: object) -> Program:
    return replace(PROGRAM, nodes=(replace(SWITCH, **changes), *PROGRAM.nodes[1:]))  # type: ignore[arg-type]


def with_case(number: int, **changes: object) -> Program:
    cases = list(SWITCH.cases)
    cases[number] = replace(cases[number], **changes)  # type: ignore[arg-type]
    return with_switch(cases=tuple(cases))


# --- which case serves which size ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "number"), [(1, 0), (8, 0), (9, 1), (64, 1), (65, 2), (10**6, 2)])
def test_a_limit_belongs_to_the_case_below_it(size: int, number: int) -> None:
    assert SWITCH.case(size) is SWITCH.cases[number]


@pytest.mark.parametrize(
    ("limits", "ranges"),
    [((8,), ("<=8", ">8")), ((8, 64), ("<=8", "9-64", ">64")), ((1, 2, 9), ("<=1", "2", "3-9", ">9"))],
)
def test_ranges_name_every_size_once(limits: tuple[int, ...], ranges: tuple[str, ...]) -> None:
    assert Switch("batch", limits, SWITCH.cases[:1] * (len(limits) + 1)).ranges == ranges


def test_a_switch_stands_for_one_value_of_one_layer() -> None:
    assert SWITCH.value == PROGRAM.values["h"] == Value("h", "float32", ("batch", 4))
    assert (SWITCH.name, SWITCH.label, SWITCH.dtype) == ("fc1", "fc1", "float32")
    assert SWITCH.source == SourceRef("fc1", "model.py", 12, "h = self.fc1(x)")
    assert SWITCH.inputs == ("x",)
    assert networks_of(SWITCH) == PROGRAM.networks == SWITCH.cases
    assert set(PROGRAM.arrays) == {"a", "b", "a*b"}


@pytest.mark.parametrize("batch", [8, 9, 64, 65])
def test_every_case_computes_the_same(batch: int) -> None:
    feeds = feeds_for(PROGRAM, {"batch": batch})
    found = [evaluate_program(p, feeds, {"batch": batch})["y"] for p in (PROGRAM, *each_case(PROGRAM))]
    assert len(found) == 4
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-6 * np.abs(found[0]).max())


@settings(max_examples=60, deadline=None)
@given(drawn=networks(max_tensors=5, max_terms=2), data=st.data())
def test_cases_that_are_drawn_compute_the_same(drawn: tuple[tuple[Value, ...], Network], data: st.DataObject) -> None:
    values, network = drawn
    switch = draw_switch(data.draw, network, "batch")
    operands = feeds(values)
    expected = evaluate(network, operands, SYMBOLS)
    for case in switch.cases:
        found = evaluate(case, operands, SYMBOLS)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * max(np.abs(expected).max(initial=0), 1e-30))


# --- text ------------------------------------------------------------------------------------------------------


def test_text_parses_back() -> None:
    assert text.dump(PROGRAM) == TEXT
    again = text.parse(TEXT, PROGRAM.arrays)
    assert again == PROGRAM
    verify(again, "scheduled")
    assert text.dump_node(SWITCH).splitlines()[0] == "switch batch <= 8, 64"


def test_programs_that_differ_in_a_switch_are_not_equal() -> None:
    assert with_switch(limits=(8, 65)) != PROGRAM
    assert with_switch(cases=(SWITCH.cases[1], SWITCH.cases[0], SWITCH.cases[2])) != PROGRAM


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<= 8, 64", "< 8, 64", "line 3, column 16: expected '<='"),
        ("<= 8, 64", "<= 64, 8", "line 3, column 23: the limits of a switch increase"),
        ("<= 8, 64", "<= 8, 8", "the limits of a switch increase"),
        ("<= 8, 64", "<=", "expected a size, found the end of the line"),
        ("<= 8, 64", "<= eight", "expected a size"),
        ("<= 8, 64", "<= 8, 64 again", "expected the end of the line"),
        ("<= 8, 64", "<= 8, 64, 512", "expected 'network', a case of the switch"),
    ],
)
def test_errors_say_where_and_what(old: str, new: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        text.parse(TEXT.replace(old, new))
    assert message in str(caught.value)


def test_a_text_that_ends_within_a_switch_is_an_error() -> None:
    lines = TEXT.splitlines()
    with pytest.raises(ParseError, match="expected 'network', a case of the switch, found the end of the text"):
        text.parse("\n".join(lines[:3]))


# --- the verifier ----------------------------------------------------------------------------------------------


def test_a_good_switch_passes_both_stages() -> None:
    verify(PROGRAM)
    verify(PROGRAM, "scheduled")


OTHER = SWITCH.cases[1]
BROKEN = [
    (with_switch(limits=(8,)), "3 cases for 1 limits"),
    (with_switch(limits=(), cases=SWITCH.cases[:1]), "1 cases for 0 limits"),
    (with_switch(limits=(64, 8)), "the limits do not increase"),
    (with_switch(limits=(8, 8)), "the limits do not increase"),
    (with_switch(limits=(0, 8)), "the limits do not increase"),
    (with_switch(symbol="seq"), "no input shows the size seq"),
    (with_case(1, name="fc2"), "the cases do not compute the same value"),
    (with_case(1, output=replace(OTHER.output, name="g")), "the cases do not compute the same value"),
    (with_case(1, output=replace(OTHER.output, axes=OTHER.output.axes[::-1])), "the cases do not compute the same"),
    (with_case(1, dtype="float64"), "the cases do not compute the same value"),
    (with_case(2, terms=()), "no terms"),
    (with_case(1, terms=(replace(OTHER.terms[0], order=0),)), "order 0 does not name each of 3 tensors once"),
    (
        with_case(2, terms=(Term((replace(OTHER.terms[0].tensors[2], name="z"),)),)),
        "fc1: reads 'z', which nothing before it defines",
    ),
    (replace(PROGRAM, nodes=(*PROGRAM.nodes, SWITCH)), "fc1: value 'h' is defined twice"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[str(k) for k in range(len(BROKEN))])
def test_what_the_verifier_refuses(broken: Program, message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify(broken)
    assert message in str(caught.value)
    assert "model.py:12" in str(caught.value)


def test_every_case_needs_a_schedule() -> None:
    broken = with_case(1, terms=(replace(OTHER.terms[0], steps=None),))
    verify(broken, "traced")
    with pytest.raises(VerificationError, match="a term has no schedule"):
        verify(broken, "scheduled")


@pytest.mark.parametrize(("size", "shown"), [("4*batch", True), ("batch*seq", False), ("(batch + 1)", False)])
def test_the_size_must_be_readable_off_an_input(size: str, shown: bool) -> None:
    """As a whole multiple on one axis: that is what the emitted condition compares."""
    lines = ["program", f"input w: float32[{size}]", "switch batch <= 8"]
    lines += ["network h: float32[4]", "indices o=4", "term", "0 core c[o]", "-> h[o]"]
    program = text.parse("\n".join([*lines, *lines[3:]]))
    if shown:
        verify(program)
        return
    with pytest.raises(VerificationError, match="no input shows the size batch"):
        verify(program)


# --- views -----------------------------------------------------------------------------------------------------


def test_json_lists_the_cases() -> None:
    record = to_json(PROGRAM)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    switch = record["nodes"][0]
    assert (switch["kind"], switch["name"], switch["symbol"], switch["limits"]) == ("switch", "fc1", "batch", [8, 64])
    assert switch["reads"] == ["x"]
    assert [(c["kind"], c["serves"]) for c in switch["cases"]] == [
        ("network", "<=8"),
        ("network", "9-64"),
        ("network", ">64"),
    ]
    assert [len(c["terms"][0]["steps"]) for c in switch["cases"]] == [2, 2, 1]
    assert record["parameters"] == 12 + 8 + 24  # an array of two cases counts once


def test_networkx_has_a_network_for_each_case() -> None:
    graph = to_networkx(PROGRAM)
    assert graph.nodes["value:h"]["kind"] == "switch"
    for serves, tensors in (("<=8", 3), ("9-64", 3), (">64", 2)):
        case = f"value:h/{serves}"
        assert (graph.nodes[case]["kind"], graph.nodes[case]["layer"]) == ("network", "fc1")
        assert graph.edges[case, "value:h", 0]["kind"] == "flow"
        assert sum(n.startswith(f"tensor:h/{serves}/") for n in graph) == tensors
    assert ("value:x", "tensor:h/9-64/0/2") in set(graph.edges())
    again = networkx.node_link_graph(json.loads(networkx_json(PROGRAM)), edges="edges")
    assert networkx.utils.graphs_equal(again, graph)


def test_dot_draws_a_cluster_for_each_case() -> None:
    dot = to_dot(PROGRAM)
    assert len(re.findall(r"subgraph cluster_v1_c[012] \{", dot)) == 3
    for serves in ("<=8", "9-64", ">64"):
        assert f" batch {serves} " in dot
    assert len(re.findall(r"^\s*v1_c[012] -> v1 \[", dot, re.M)) == 3


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_draws_it() -> None:
    done = subprocess.run(["dot", "-Tsvg"], input=to_dot(PROGRAM).encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    svg = done.stdout.decode()
    assert "batch 9&#45;64" in svg and svg.count(">x</text>") == 4  # the input, and an operand in each case
