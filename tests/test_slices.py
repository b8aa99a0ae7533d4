"""Networks computed in slices: the numbers, the predicted memory, and what the pass `limit` chooses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import ROUNDING, assert_plain, feeds_for, program_of, reference, session_of
from tests.test_property import single
from tncompile.cost.memory import network_peak
from tncompile.emit.program import to_onnx
from tncompile.errors import TNCompileError, VerificationError
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Network, Program, Slice, Switch, verify
from tncompile.ir import text as ir_text
from tncompile.passes import Context, Limit, Order, Pipeline
from tncompile.passes.limit import _sliceable

CHAIN = """\
program
  input x: float32[batch, 24]
  network y: float32[batch, 30], layer fc
    indices b=batch, i=4, j=6, o=5, p=6, r=8
    term
      0 operand x[b, (i j)]
      1 core fc.a[i, r, o]
      2 core fc.c[r, j, p]
      order ((0 1) 2)
      steps
        3 = matmul(0, 1) -> [b, j, r, o]
        4 = matmul(3, 2) -> [b, o, p]
    term
      0 core fc.bias[(o p)]
    -> y[b, (o p)]
  output out = y
"""


def emitted(program: Program) -> bytes:
    model = onnx_ir.to_proto(to_onnx(program, TracedModel(None, program, {})))  # type: ignore[arg-type]
    data: bytes = model.SerializeToString()
    assert_plain(data)
    return data


def sliced(program: Program, *slices: tuple[str, int]) -> Program:
    """The program with its first network's first term in slices."""
    (node,) = program.nodes
    assert isinstance(node, Network)
    term = replace(node.terms[0], slices=tuple(Slice(name, count) for name, count in slices))
    return replace(program, nodes=(replace(node, terms=(term, *node.terms[1:])),))


def compare(program: Program, batches: tuple[int, ...] = (1, 2, 3, 7)) -> bytes:
    """Run an emitted program at several batch sizes, fewer than the slices among them, against numpy in float64."""
    data = emitted(program)
    session = session_of(data)
    for batch in batches:
        symbols = {"batch": batch, "seq": 5}
        feeds = feeds_for(program, symbols)
        want, size = (reference(program, feeds, symbols, absolute) for absolute in (False, True))
        for (_, name), found in zip(program.outputs, session.run(None, feeds), strict=True):
            assert found.shape == want[name].shape
            bound = 64 * ROUNDING["float32"] * size[name]
            assert (np.abs(found - want[name]) <= bound).all(), f"{name} at batch {batch}"
    return data


@pytest.mark.parametrize(
    "slices",
    [
        [("r", 2)],  # a bond: summed
        [("r", 3)],  # in parts of unequal size
        [("i", 4)],  # a mode of the input
        [("o", 5)],  # a mode of the output: concatenated
        [("p", 4)],
        [("b", 4)],  # the batch, also where it is smaller than 4
        [("b", 3), ("r", 2)],
        [("o", 2), ("p", 2), ("j", 2)],
    ],
    ids=lambda slices: " ".join(f"{name}={count}" for name, count in slices),
)
def test_slices_of_every_kind(slices: list[tuple[str, int]]) -> None:
    program = sliced(program_of(CHAIN), *slices)
    verify(program, "scheduled")
    model = onnx.load_model_from_string(compare(program))
    matmuls = sum(n.op_type in ("MatMul", "Gemm", "Conv") for n in model.graph.node)
    assert matmuls == 2 * np.prod([count for _, count in slices])


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=st.integers(0, 3000), data=st.data())
def test_random_networks(seed: int, data: st.DataObject) -> None:
    context = Context(batches=(1, 7), sizes={"seq": 5})
    program, _ = Pipeline((Order(),)).run(single(seed), context)
    nodes = []
    for node in program.nodes:
        if isinstance(node, Switch):
            node = node.cases[-1]
        assert isinstance(node, Network)
        terms = []
        for term in node.terms:
            sizes = {n: term.indices[n].size for n in _sliceable(node, term)} if not term.is_constant else {}
            fit = [n for n, size in sizes.items() if isinstance(size, str) or size > 1]
            chosen = data.draw(st.lists(st.sampled_from(fit), min_size=1, max_size=2, unique=True)) if fit else []
            most = [min(4, size) if isinstance(size := sizes[n], int) else 4 for n in chosen]
            counts = [data.draw(st.integers(2, m)) for m in most]
            terms.append(replace(term, slices=tuple(map(Slice, chosen, counts))))
        nodes.append(replace(node, terms=tuple(terms)))
    program = replace(program, nodes=tuple(nodes))
    verify(program, "scheduled")
    assert ir_text.parse(ir_text.dump(program), program.arrays) == program
    compare(program, (1, 3, 4))


def test_slices_that_mean_nothing_are_refused() -> None:
    program = program_of(CHAIN)
    for slices, message in [
        ([("q", 2)], "slices of q"),
        ([("r", 9)], "9 slices of r, whose size is 8"),
        ([("r", 1)], "1 slices of r"),
        ([("r", 2), ("r", 2)], "r is sliced twice"),
    ]:
        with pytest.raises(VerificationError, match=message):
            verify(sliced(program, *slices), "scheduled")


def test_text_shows_slices() -> None:
    program = sliced(program_of(CHAIN), ("b", 3), ("r", 2))
    text = ir_text.dump(program)
    assert "      slices b=3, r=2\n      steps\n" in text
    assert ir_text.parse(text, program.arrays) == program


# ------------------------------------------------------------------------------------ memory


def test_the_peak_of_a_chain_by_hand() -> None:
    program = program_of(CHAIN)
    sizes = {"b": 10, "i": 4, "j": 6, "o": 5, "p": 6, "r": 8}
    operand, middle, result = 10 * 24, 10 * 6 * 8 * 5, 10 * 30
    # x permuted to (b j i) is gone when the second step permutes the intermediate to (b o r j)
    assert network_peak(program.networks[0], sizes, 4) == 4 * (operand + 2 * middle)
    # in two slices of r: the operand is shared, one partial result waits
    assert network_peak(sliced(program, ("r", 2)).networks[0], sizes, 4) == 4 * (operand + middle + result)
    # in five of the batch: a copy of the operand's slice, and the results that are done
    parts = 2 * middle // 5 + operand // 5 + result - result // 5
    assert network_peak(sliced(program, ("b", 5)).networks[0], sizes, 4) == 4 * (operand + parts)


def limited(text: str, megabytes: float, batch: int) -> tuple[Program, list[str]]:
    context = Context(batches=(1, batch), max_memory=int(megabytes * 1e6))
    program, reports = Pipeline((Order(),)).run(program_of(text), context)
    return program, [str(c) for r in reports for c in r.changes if r.name == "limit"]


OUTER = """\
program
  input x: float32[batch, 64]
  input z: float32[batch, 64]
  network y: float32[batch, 64], layer fc
    indices b=batch, i=64, j=64, o=64
    term
      0 operand x[b, i]
      1 operand z[b, j]
      2 core w[i, j, o]
    -> y[b, o]
  output out = y
"""


def test_limit_slices_what_is_too_large() -> None:
    program, changes = limited(OUTER, 1.0, 256)  # x w is [256, 4096]: 4 MB
    (term,) = program.networks[0].terms
    sizes = {"b": 256, "i": 64, "j": 64, "o": 64}
    assert term.slices and network_peak(program.networks[0], sizes, 4) <= 1e6
    assert len(changes) == 1 and "the limit is 1 MB" in changes[0]
    compare(program, (1, 3, 256))


MEASURE = """\
import re, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {i.name: np.ones((int(sys.argv[2]), i.shape[1]), np.float32) for i in session.get_inputs()}
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
session.run(None, feeds)
print(peak() - before)
"""


def measured(program: Program, batch: int, path: Path) -> int:
    """Bytes by which a process of its own grows in one run."""
    path.write_bytes(emitted(program))
    command = [sys.executable, "-c", MEASURE, str(path), str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("name", ["b", "i", "j", "o"])
def test_onnx_runtime_needs_the_memory_that_is_predicted(name: str, tmp_path: Path) -> None:
    """All but the inputs, which are there before; a mode of either input, the output's, and the batch."""
    batch, context = 8192, Context(batches=(8192,))
    whole, _ = Pipeline((Order(),)).run(program_of(OUTER), context)
    sizes = {"b": batch, "i": 64, "j": 64, "o": 64}
    inputs = 2 * batch * 64 * 4
    predicted, found = [], []
    for program in (whole, sliced(whole, (name, 8))):
        predicted.append(network_peak(program.networks[0], sizes, 4) - inputs)
        found.append(measured(program, batch, tmp_path / "model.onnx"))
    assert abs(found[0] - predicted[0]) < 0.25 * predicted[0]
    assert found[1] < 2 * predicted[1]  # its arena may leave a gap where a slice just was
    assert (found[1] < 0.6 * found[0]) == (predicted[1] < 0.6 * predicted[0])


def test_limit_leaves_alone_what_fits() -> None:
    program, changes = limited(OUTER, 100.0, 256)
    assert not changes and not program.networks[0].terms[0].slices


def test_limit_refuses_what_cannot_be() -> None:
    with pytest.raises(TNCompileError, match=r"fc cannot be computed in 0.1 MB at batch 256.*alone 0.197 MB") as info:
        limited(OUTER, 0.1, 256)
    assert "--max-memory" in str(info.value)


def test_limit_is_a_pass_by_name() -> None:
    from tncompile.passes import parse_passes

    assert parse_passes("clean,order,limit{max_slices=8}")[-1] == Limit(max_slices=8)
