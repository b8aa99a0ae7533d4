"""The verifier: one broken program for each invariant, and what the error says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tests.strategies import programs
from tncompile.errors import SourceRef, VerificationError
from tncompile.ir import Axis, Index, Network, Opaque, Program, Stage, Tensor, Value, text, verify
from tncompile.ir.core import Term

GOOD = text.parse("""\
program
  input x: float32[batch, 6]
  weight bias: float32[4]
  network h: float32[batch, 4], layer fc1  # fc1, model.py:12: h = self.fc1(x)
    indices batch=batch, o=4, i1=2, i2=3
    term
      0 operand x[batch, (i1 i2)]
      1 core w[i1, i2, o]
      order (0 1)
      steps
        2 = gemm(0, 1) -> [batch, o]
    term
      0 core b[o]
    -> h[batch, o]
  opaque relu: float32[batch, 4] = aten.add.Tensor(%h, %bias)  # act, model.py:13
  output y = relu
""")
NETWORK = GOOD.networks[0]
RELU = GOOD.nodes[1]
BATCH, OUT, I1, I2 = NETWORK.indices.values()
X, W = NETWORK.terms[0].tensors
(X_VALUE,) = GOOD.inputs


def with_network(network: Network) -> Program:
    return replace(GOOD, nodes=(network, RELU))


def with_term(**changes: object) -> Program:
    return with_network(replace(NETWORK, terms=(replace(NETWORK.terms[0], **changes), *NETWORK.terms[1:])))  # type: ignore[arg-type]


def with_tensors(*tensors: Tensor) -> Program:
    return with_term(tensors=tensors)


def with_core(**changes: object) -> Program:
    return with_tensors(X, replace(W, **changes))  # type: ignore[arg-type]


def with_inputs(*values: Value) -> Program:
    return replace(GOOD, inputs=values)


def with_output(*axes: Axis) -> Program:
    return with_network(replace(NETWORK, output=Tensor("h", axes)))


def with_steps(*steps: tuple[int, int]) -> Program:
    (step,) = NETWORK.terms[0].steps or ()
    return with_term(steps=tuple(replace(step, left=a, right=b) for a, b in steps))


def with_step_order(*order: str) -> Program:
    (step,) = NETWORK.terms[0].steps or ()
    return with_term(steps=(replace(step, order=order),))


def test_a_good_program_passes_both_stages() -> None:
    verify(GOOD)
    verify(GOOD, "traced")
    verify(GOOD, "scheduled")


@settings(max_examples=50, deadline=None)
@given(program=programs(scheduled=True))
def test_what_the_strategies_draw_passes(program: Program) -> None:
    verify(program, "scheduled")


SEQ = Index("s", "seq")
BROKEN = [
    # values
    (replace(GOOD, nodes=(RELU, NETWORK)), "relu: reads 'h', which nothing before it defines"),
    (replace(GOOD, inputs=()), "fc1: reads 'x', which nothing before it defines"),
    (replace(GOOD, weights={}), "relu: reads 'bias', which nothing before it defines"),
    (with_tensors(replace(X, name="bias"), W), "fc1: reads 'bias', which nothing before it defines"),
    (with_inputs(X_VALUE, Value("h", "float32", ())), "fc1: value 'h' is defined twice"),
    (with_inputs(X_VALUE, X_VALUE), "value 'x' is defined twice"),
    (replace(GOOD, nodes=(*GOOD.nodes, RELU)), "relu: value 'relu' is defined twice"),
    (replace(GOOD, outputs=(("y", "bias"),)), "output 'y' shows 'bias', which nothing defines"),
    # operands
    (with_inputs(Value("x", "float32", ("batch", 7))), "x has shape ('batch', 7), its axes say ('batch', 6)"),
    (with_inputs(Value("x", "tuple")), "x has shape None, its axes say ('batch', 6)"),
    (with_inputs(Value("x", "float64", ("batch", 6))), "x is float64, the network float32"),
    # cores
    (with_core(data=np.zeros((6, 4), "float32")), "core w has shape (6, 4), its axes say (2, 3, 4)"),
    (with_core(data=np.zeros((2, 3, 4))), "core w is float64, the network float32"),
    (with_core(name="b"), "the name b stands for two arrays"),
    # indices
    (with_core(axes=((I1,), (Index("i2", 4),), (OUT,))), "index i2 has sizes 3 and 4"),
    (with_output((BATCH,), (OUT, OUT)), "an output index stands twice"),
    (with_output((BATCH,), (SEQ,)), "output index s of symbolic size is on no tensor"),
    # terms and orders
    (with_network(replace(NETWORK, terms=())), "no terms"),
    (with_network(replace(NETWORK, terms=(Term(()), *NETWORK.terms))), "order () does not name each of 0 tensors once"),
    (with_term(order=0), "order 0 does not name each of 2 tensors once"),
    (with_term(order=(0, 0)), "order (0, 0) does not name each of 2 tensors once"),
    (with_term(order=(0, (1, 2))), "order (0, (1, 2)) does not name each of 2 tensors once"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_any_stage(broken: Program, message: str) -> None:
    stages: tuple[Stage, Stage] = ("traced", "scheduled")
    for stage in stages:
        with pytest.raises(VerificationError) as caught:
            verify(broken, stage)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (with_term(steps=None), "a term has no schedule"),
        (with_steps(), "the schedule leaves 2 tensors, not one"),
        (with_steps((0, 2)), "step 2 reads 2, which is not there (any more)"),
        (with_steps((0, 1), (0, 2)), "step 3 reads 0, which is not there (any more)"),
        (with_steps((0, -1)), "step 2 reads -1, which is not there (any more)"),
        (with_step_order("batch"), "step 2 leaves [batch]; its sides give batch o"),
        (with_step_order("batch", "o", "i1"), "step 2 leaves [batch o i1]; its sides give batch o"),
        (with_step_order("batch", "o", "q"), "step 2 leaves [batch o q]; its sides give batch o"),
        (with_step_order("batch", "o", "o"), "step 2 leaves [batch o o]; its sides give batch o"),
    ],
)
def test_the_scheduled_stage(broken: Program, message: str) -> None:
    verify(broken, "traced")
    with pytest.raises(VerificationError) as caught:
        verify(broken, "scheduled")
    assert message in str(caught.value)


def test_a_constant_term_needs_no_schedule() -> None:
    assert NETWORK.terms[1].steps is None
    verify(GOOD, "scheduled")


def test_an_output_index_may_be_on_no_tensor_if_it_is_static() -> None:
    network = replace(NETWORK, output=replace(NETWORK.output, axes=((BATCH,), (OUT,), (Index("new", 5),))))
    verify(with_network(network))


def test_a_weight_may_be_a_core_too_if_it_is_the_same_array() -> None:
    data = NETWORK.terms[1].tensors[0].data
    assert data is not None
    verify(replace(GOOD, weights={**GOOD.weights, "b": data}))
    with pytest.raises(VerificationError, match="the name b stands for two arrays"):
        verify(replace(GOOD, weights={**GOOD.weights, "b": data.copy()}))


def error(make: Callable[[], Program]) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(make())
    return str(caught.value)


def test_the_error_shows_the_node_its_text_and_the_line_of_python() -> None:
    lines = error(lambda: with_term(order=0)).splitlines()
    assert lines[0] == "fc1: order 0 does not name each of 2 tensors once"
    assert lines[1].startswith("network h: float32[batch, 4], layer fc1  # fc1, model.py:12")
    assert lines[-3:] == ["  -> h[batch, o]", "  at fc1, model.py:12", "     h = self.fc1(x)"]


def test_the_error_has_the_source() -> None:
    opaque = Opaque("n", "t", (), (), Value("x", "tuple"), SourceRef("m", "f.py", 3))
    with pytest.raises(VerificationError) as caught:
        verify(replace(GOOD, nodes=(opaque,)))
    assert caught.value.source == SourceRef("m", "f.py", 3)
