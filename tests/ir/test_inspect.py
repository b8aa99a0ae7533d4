"""The views of a program: JSON, Graphviz, networkx."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from typing import Any

import networkx
import pytest
from hypothesis import given, settings

from tests.strategies import programs
from tncompile.inspect import networkx_json, to_dot, to_json, to_networkx, to_text
from tncompile.inspect.bonds import bonds, levels
from tncompile.inspect.dot import quote
from tncompile.ir import Opaque, Program, Value, text
from tncompile.ir.opaque import Constant, Ref

PROGRAM = text.parse("""\
program
  input x: float32[batch, 6]
  weight bias: float32[4]
  network h: float32[batch, 4], layer fc1  # fc1, /home/me/model.py:12: h = self.fc1(x)
    indices batch=batch, o1=2, o2=2, i1=2, i2=3, r=5
    term
      0 operand x[batch, (i1 i2)]
      1 core fc1.a[i1, o1, r]
      2 core fc1.b[r, i2, o2]
      order ((0 1) 2)
      steps
        3 = gemm(0, 1) -> [batch, i2, o1, r]
        4 = gemm(3, 2) -> [batch, o1, o2]
    term
      0 core fc1.bias[(o1 o2)]
    -> h[batch, (o1 o2)]
  opaque relu: float32[batch, 4] = aten.add.Tensor(%h, %bias)
  network cp: float32[batch, 1], layer fc2
    indices batch=batch, i1=2, i2=2, r=3, t=4, s=2
    term
      0 operand relu[batch, (i1 i2)]
      1 core fc2.w[r]
      2 core fc2.u[i1, r]
      3 core fc2.v[i2, r]
      4 core fc2.t[t, t, s]
      order ((((0 1) 2) 3) 4)
    -> cp[batch, ()]
  output y = cp
  output hidden = relu
""")
H, CP = PROGRAM.networks


def test_text_is_the_dump() -> None:
    assert to_text(PROGRAM) == text.dump(PROGRAM)


# --- bonds -------------------------------------------------------------------------------------------------


def test_bonds_and_their_kinds() -> None:
    found = {b.index.name: (b.kind, b.tensors, b.is_open) for b in bonds(H.terms[0], H.output.indices)}
    assert found == {
        "batch": ("open", (0,), True),
        "i1": ("bond", (0, 1), False),
        "i2": ("bond", (0, 2), False),
        "o1": ("open", (1,), True),
        "r": ("bond", (1, 2), False),
        "o2": ("open", (2,), True),
    }
    found = {b.index.name: (b.kind, b.tensors, b.is_open) for b in bonds(CP.terms[0], CP.output.indices)}
    assert found["r"] == ("hyperedge", (1, 2, 3), False)
    assert found["t"] == ("trace", (4, 4), False)
    assert found["s"] == ("sum", (4,), False)


def test_levels_count_from_the_operands() -> None:
    assert levels(H.terms[0]) == {0: 0, 1: 1, 2: 1}
    assert levels(H.terms[1]) == {0: 1}
    assert levels(CP.terms[0]) == {0: 0, 1: 2, 2: 1, 3: 1, 4: 1}


# --- JSON --------------------------------------------------------------------------------------------------


def test_json_of_the_example() -> None:
    record = to_json(PROGRAM)
    assert (record["format"], record["version"]) == ("tncompile.program", 1)
    assert record["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 6]}]
    assert record["outputs"] == [{"name": "y", "value": "cp"}, {"name": "hidden", "value": "relu"}]
    assert record["weights"] == [{"name": "bias", "dtype": "float32", "shape": [4], "parameters": 4, "bytes": 16}]
    assert (record["parameters"], record["bytes"]) == (4 + 20 + 30 + 4 + 3 + 6 + 6 + 32, 420)
    network, opaque, _ = record["nodes"]
    assert {k: network[k] for k in ("kind", "name", "value", "reads", "dtype", "output", "parameters", "bytes")} == {
        "kind": "network",
        "name": "fc1",
        "value": {"name": "h", "dtype": "float32", "shape": ["batch", 4]},
        "reads": ["x"],
        "dtype": "float32",
        "output": {"indices": ["batch", "o1", "o2"], "axes": [["batch"], ["o1", "o2"]], "shape": ["batch", 4]},
        "parameters": 54,
        "bytes": 216,
    }
    source = {"module": "fc1", "file": "/home/me/model.py", "line": 12, "code": "h = self.fc1(x)"}
    assert network["source"] == source
    assert network["indices"][:2] == [{"name": "batch", "size": "batch"}, {"name": "o1", "size": 2}]
    term, bias = network["terms"]
    assert term["tensors"][1] == {
        "position": 1,
        "name": "fc1.a",
        "kind": "core",
        "indices": ["i1", "o1", "r"],
        "axes": [["i1"], ["o1"], ["r"]],
        "shape": [2, 2, 5],
        "parameters": 20,
    }
    assert {"name": "r", "size": 5, "kind": "bond", "tensors": [1, 2], "output": False} in term["bonds"]
    assert term["order"] == [[0, 1], 2]
    step = {"number": 4, "form": "gemm", "left": 3, "right": 2, "order": ["batch", "o1", "o2"]}
    assert term["steps"][1] == step
    assert (bias["order"], bias["steps"]) == (0, None)
    assert opaque == {
        "kind": "opaque",
        "name": "",
        "value": {"name": "relu", "dtype": "float32", "shape": ["batch", 4]},
        "reads": ["h", "bias"],
        "source": None,
        "target": "aten.add.Tensor",
        "args": [{"ref": "h"}, {"ref": "bias"}],
        "kwargs": {},
    }


def test_json_of_arguments() -> None:
    args = (Ref("x"), Constant("torch.float32"), 1, 0.5, math.nan, -math.inf, True, None, "s", (1, (Ref("y"),)))
    node = Opaque("n", "t", args, (("k", (1.5,)),), Value("n", "tuple"))
    record = to_json(Program((), (node,), ()))["nodes"][0]
    assert record["args"] == [
        {"ref": "x"}, {"constant": "torch.float32"}, 1, 0.5, {"float": "nan"}, {"float": "-inf"}, True, None, "s",
        [1, [{"ref": "y"}]],
    ]  # fmt: skip
    assert record["kwargs"] == {"k": [1.5]}
    assert record["value"] == {"name": "n", "dtype": "tuple", "shape": None}


@settings(max_examples=100, deadline=None)
@given(program=programs(scheduled=True))
def test_json_is_plain_data(program: Program) -> None:
    record = to_json(program)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["parameters"] == sum(a.size for a in program.arrays.values())


# --- Graphviz ----------------------------------------------------------------------------------------------


def test_dot_of_the_example() -> None:
    dot = to_dot(PROGRAM)
    lines = [line.strip() for line in dot.splitlines()]
    # values are numbered in order, their tensors by term and position
    assert "subgraph cluster_v1 {" in lines
    assert "subgraph cluster_v1_0 {" in lines
    assert "subgraph cluster_v3_0 {" not in lines  # a single term has no box of its own
    assert any(line.startswith('graph [label="fc1  (model.py:12)"') for line in lines)
    assert any(line.startswith('v1_0_t0 [label="x\\n[batch, (i1 i2)]", shape=box') for line in lines)
    assert any(line.startswith('v1_0_t1 [label="a", shape=circle') for line in lines)
    assert 'v1_0_t1 -> v1_0_t2 [dir=none, minlen=2, xlabel=" r:5 "];' in lines
    assert 'v1_0_t0 -> v1 [dir=none, label=" batch "];' in lines
    assert "{ rank=same; v1_0_t1; v1_0_t2; }" in lines
    assert any(line.startswith('v2 [label="aten.add.Tensor\\nbias 4\\nfloat32 batch x 4", shape=box') for line in lines)
    # the data flow: input to operand, value to opaque node, value to output
    for arrow in ("v0 -> v1_0_t0", "v1 -> v2", "v2 -> v3_0_t0", "v3 -> o0", "v2 -> o1"):
        assert any(line.startswith(f"{arrow} [color=") for line in lines)
    # the hyperedge of the CP form is a point with an edge to each of its cores
    assert any('xlabel="r:3", shape=point' in line for line in lines)
    assert sum(bool(re.fullmatch(r"v3_0_t[23] -> v3_0_i3 \[dir=none\];", line)) for line in lines) == 2
    assert "v3_0_i3 -> v3_0_t1 [dir=none];" in lines
    assert 'v3_0_t4 -> v3_0_t4 [dir=none, label=" t:4 "];' in lines
    assert not any("s:2" in line for line in lines)


def test_a_term_without_open_indices_still_leads_to_the_result() -> None:
    program = text.parse("program\nnetwork y: float32[3]\nindices i=3\nterm\n0 core a[]\nterm\n0 core b[i]\n-> y[i]\n")
    assert "v0_0_t0 -> v0 [dir=none, style=dotted];" in to_dot(program)


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("plain.name", '"plain.name"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ("\\N", r'"\\N"'),
        ("a\nb\x00", r'"a\\nb\\x00"'),
        ("&lt;", '"&amp;lt;"'),
        ("<b>", '"<b>"'),
        ("é", '"é"'),
        ("\ud800", r'"\\ud800"'),
    ],
)
def test_quote(name: str, quoted: str) -> None:
    assert quote(name) == quoted


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_dot_is_well_formed(program: Program) -> None:
    dot = to_dot(program)
    dot.encode()
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', dot)
    assert bare.count('"') % 2 == 0
    assert bare.count("{") == bare.count("}")
    assert bare.count("[") == bare.count("]")
    assert to_dot(program) == dot
    defined = {m[1] for m in re.finditer(r"^\s*(\w+) \[label=", bare, re.M)}
    for edge in re.finditer(r"^\s*(\w+) -> (\w+) \[", bare, re.M):
        assert {edge[1], edge[2]} <= defined


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(program=programs(max_nodes=2))
def test_graphviz_reads_it(program: Program) -> None:
    done = subprocess.run(["dot", "-Tsvg"], input=to_dot(program).encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for name in [v.name for v in program.inputs] + [n.output.name for n in program.networks]:
        if name.isascii() and name.isalnum():
            assert f">{name}</text>" in done.stdout.decode()


# --- networkx ----------------------------------------------------------------------------------------------


def edges(graph: Any, kind: str) -> set[tuple[str, str, str | None]]:
    return {(a, b, d.get("index")) for a, b, d in graph.edges(data=True) if d["kind"] == kind}


def test_networkx_of_the_example() -> None:
    graph = to_networkx(PROGRAM)
    kinds = {
        kind: [n for n, k in graph.nodes(data="kind") if k == kind]
        for kind in {*dict(graph.nodes(data="kind")).values()}
    }
    assert {kind: len(nodes) for kind, nodes in kinds.items()} == {
        "input": 1, "weight": 1, "network": 2, "opaque": 1, "output": 2, "operand": 2, "core": 7, "hyperedge": 1,
    }  # fmt: skip
    assert graph.nodes["tensor:h/0/1"] == {
        "label": "fc1.a",
        "kind": "core",
        "name": "fc1.a",
        "network": "h",
        "term": 0,
        "position": 1,
        "axes": [["i1"], ["o1"], ["r"]],
        "shape": [2, 2, 5],
        "parameters": 20,
    }
    assert graph.nodes["value:h"]["layer"] == "fc1"
    assert graph.nodes["value:h"]["source"] == "fc1, /home/me/model.py:12"
    assert graph.nodes["value:h"]["parameters"] == 54
    assert graph.nodes["value:relu"]["target"] == "aten.add.Tensor"
    assert edges(graph, "flow") == {
        ("value:x", "tensor:h/0/0", None),
        ("value:h", "value:relu", None),
        ("weight:bias", "value:relu", None),
        ("value:relu", "tensor:cp/0/0", None),
        ("value:cp", "output:y", None),
        ("value:relu", "output:hidden", None),
    }
    assert ("tensor:h/0/1", "tensor:h/0/2", "r") in edges(graph, "bond")
    assert ("tensor:h/1/0", "value:h", "o1") in edges(graph, "open")
    assert edges(graph, "trace") == {("tensor:cp/0/4", "tensor:cp/0/4", "t")}
    (middle,) = kinds["hyperedge"]
    assert edges(graph, "hyperedge") == {(f"tensor:cp/0/{p}", middle, "r") for p in (1, 2, 3)}
    assert graph.nodes[middle]["size"] == 3
    assert networkx.number_weakly_connected_components(graph) == 2  # the traced core is on its own


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_networkx_has_every_tensor_and_reads_back(program: Program) -> None:
    graph = to_networkx(program)
    tensors = [n for n, k in graph.nodes(data="kind") if k in ("core", "operand")]
    assert len(tensors) == sum(len(n.tensors) for n in program.networks)
    assert all("kind" in d for _, d in graph.nodes(data=True))
    assert all("kind" in d for _, _, d in graph.edges(data=True))
    # an operand's value comes before the network's: without bonds and hyperedges the flow has no cycle
    flow = networkx.DiGraph((a, b) for a, b, d in graph.edges(data=True) if d["kind"] in ("flow", "open"))
    assert networkx.is_directed_acyclic_graph(flow)
    again = networkx.node_link_graph(json.loads(networkx_json(program)), edges="edges")
    assert networkx.utils.graphs_equal(again, graph)


def test_networkx_is_loaded_only_when_it_is_needed() -> None:
    code = "import sys, tncompile.inspect; assert not {'networkx', 'torch', 'onnx'} & {*sys.modules}, 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
