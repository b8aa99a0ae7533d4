"""Equal networks, and equal parts of one network, computed at once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import apply_pass, assert_close, evaluate_program, feeds_for, program_of
from tncompile.ir import Opaque, Program, verify
from tncompile.passes import Context, Join, alike
from tncompile.passes.cells import FEWEST, Levels, State, families
from tncompile.passes.equals import selections
from tncompile.passes.pieces import as_selections
from tncompile.passes.worth import Seconds, Worth

TOLERANCE = 1e-11
SIZES = st.integers(1, 5)


def same_numbers(before: Program, after: Program) -> None:
    """Both verify and compute the same in float64."""
    verify(before)
    verify(after)
    feeds = feeds_for(before)
    expected = evaluate_program(before, feeds)
    for name, found in evaluate_program(after, feeds).items():
        assert_close(found, expected[name], tolerance=TOLERANCE, what=name)


def always(before: Seconds, after: Seconds, margin: float) -> bool:
    """In the place of `gains`: whatever it costs."""
    return True


# ------------------------------------------------------------------------------------ several networks


def layers(count: int, inner: int, outer: int, shared: bool, taken: bool) -> Program:
    """`count` layers with biases and a tanh: of one operand, or each of a selection, with a core of its own or one for
    all; their results are added up, weighed by a number each."""
    lines = ["program", f"  input x: float64[batch, {count}, {inner}]", f"  input z: float64[batch, {inner}]"]
    for k in range(count):
        core = "w" if shared else f"w{k}"
        if taken:
            lines.append(f"  opaque x{k}: float64[batch, {inner}] = aten.select.int(%x, 1, {count - 1 - k})")
        lines += [
            f"  network h{k}: float64[batch, {outer}]",
            f"    indices batch=batch, o={outer}, i={inner}",
            "    term",
            f"      0 operand {f'x{k}' if taken else 'z'}[batch, i]",
            f"      1 core {core}[o, i]",
            "    term",
            f"      0 core b{k}[o]",
            f"    -> h{k}[batch, o]",
            f"  opaque t{k}: float64[batch, {outer}] = aten.tanh.default(%h{k})",
        ]
    lines += [f"  network y: float64[batch, {outer}]", f"    indices batch=batch, o={outer}"]
    for k in range(count):
        lines += ["    term", f"      0 operand t{k}[batch, o]", f"      1 core s{k}[]"]
    refs = ", ".join(f"%t{k}" for k in range(count))
    lines += ["    -> y[batch, o]"]
    lines += [f"  opaque a: float64[batch, {count}, {outer}] = aten.stack.default([{refs}], 1)"]
    lines += [f"  opaque c: float64[batch, {count * outer}] = aten.cat.default([{refs}], 1)"]
    return program_of("\n".join([*lines, "  output y = y", "  output a = a", "  output c = c"]))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(2, 5), st.booleans(), st.integers(0, 1))
def test_layers_of_equal_shape(count: int, inner: int, outer: int, shared: bool, place: int) -> None:
    for taken in (True, False):
        program = layers(count, inner, outer, shared and taken, taken)
        family = next(f for f in alike.seeds(program) if len(f) == count)
        after = alike.joined(program, family, place)
        assert after is not None
        same_numbers(program, after)
        live = tncompile.passes.Clean().run(after, Context())[0]
        targets = [n.target for n in live.nodes if isinstance(n, Opaque)]
        assert any(n.output.name.endswith(".all") and len(n.terms) == 2 for n in live.networks)
        assert targets.count("aten.tanh.default") == 1
        assert ("aten.cat.default" in targets) == taken  # there they come in another order


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.sampled_from([0, 1]))
def test_pieces_are_selections(count: int, width: int, axis: int) -> None:
    shape = [3, 3]
    shape[axis] = count * width
    lines = ["program", f"  input x: float64[{shape[0]}, {shape[1]}]"]
    cut = [3, 3]
    cut[axis] = width
    for k in range(count):
        args = f"%x, {axis}, {k * width}, {(k + 1) * width}"
        lines.append(f"  opaque p{k}: float64[{cut[0]}, {cut[1]}] = aten.slice.Tensor({args})")
        lines.append(f"  output p{k} = p{k}")
    program = program_of("\n".join(lines))
    after = as_selections(program)
    same_numbers(program, after)
    assert len(selections(after)) == count


@pytest.mark.parametrize(("start", "end"), [("None", 2), (-9, 2), (-2, "None"), (2, 99)])
def test_pieces_from_an_end(start: int | str, end: int | str) -> None:
    program = program_of(f"""\
program
  input x: float64[3, 4]
  opaque p: float64[3, 2] = aten.slice.Tensor(%x, 1, {start}, {end})
  output p = p
""")
    after = as_selections(program)
    assert len(selections(after)) == 1
    same_numbers(program, after)


def test_a_module_on_several_values() -> None:
    program = layers(4, 3, 2, shared=True, taken=True)
    nodes = []
    for node in program.nodes:  # other values instead of selections from one
        if isinstance(node, Opaque) and node.target == "aten.select.int":
            nodes.append(replace(node, output=replace(node.output, name=f"{node.output.name}.raw")))
            read = (replace(node.args[0], name=f"{node.output.name}.raw"),)  # type: ignore[type-var]
            nodes.append(replace(node, target="aten.relu.default", args=read))
        else:
            nodes.append(node)
    program = replace(program, nodes=tuple(nodes))
    family = next(iter(alike.seeds(program)))
    after = alike.joined(program, family, 0)
    assert after is not None
    same_numbers(program, after)


def test_only_what_is_faster() -> None:
    """What would have to be stacked first is large, and the work on it small."""
    text = "\n".join(
        f"""  input x{k}: float32[batch, 4096]
  network y{k}: float32[batch, 2]
    indices batch=batch, o=2, i=4096
    term
      0 operand x{k}[batch, i]
      1 core w{k}[o, i]
      order (0 1)
    -> y{k}[batch, o]
  output y{k} = y{k}"""
        for k in range(3)
    )
    program = program_of(f"program\n{text}")
    after, changes = Join().run(program, Context(batches=(64, 256)))
    assert after == program
    assert [change.declined for change in changes] == [True]


# ------------------------------------------------------------------------------------ one network


def chain(sites: int, bond: int, mode: int, output: int | None, ring: bool = False) -> Program:
    """A matrix product state over selections from x; where `output` is given, a core with a mode of the output's
    stands at that place."""
    selects = [f"  opaque x{k}: float64[batch, {mode}] = aten.select.int(%x, 1, {k})" for k in range(sites)]
    bonds = [f"b{k}" for k in range(sites + (output is not None) - (not ring))]
    lines = [f"    indices batch=batch, {', '.join(f's{k}={mode}' for k in range(sites))}"]
    lines[0] += "".join(f", {b}={bond}" for b in bonds) + (", o=3" if output is not None else "")
    lines += ["    term"]
    tensors, left = [], bonds[-1] if ring else ""
    order: list[int | None] = [*range(sites)]
    if output is not None:
        order.insert(output, None)
    for place, k in enumerate(order):
        right = bonds[place] if place < len(bonds) else ""
        names = [n for n in (left, "o" if k is None else f"s{k}", right) if n]
        tensors.append(f"core A{place}[{', '.join(names)}]")
        if k is not None:
            tensors.append(f"operand x{k}[batch, s{k}]")
        left = right
    lines += [f"      {k} {tensor}" for k, tensor in enumerate(tensors)]
    shown = ["batch"] + ["o"] * (output is not None)
    size = "batch, 3" if output is not None else "batch"
    head = f"program\n  input x: float64[batch, {sites}, {mode}]\n" + "\n".join(selects)
    body = "\n".join(lines)
    return program_of(f"{head}\n  network y: float64[{size}]\n{body}\n    -> y[{', '.join(shown)}]\n  output y = y")


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 14), st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(0, 5), st.booleans())
def test_every_level_of_a_chain(sites: int, bond: int, mode: int, output: int | None, ring: bool) -> None:
    program = tncompile.passes.Clean().run(chain(sites, bond, mode, output, ring), Context())[0]
    network = program.networks[-1]
    levels = Levels(Worth(Context()), program.values)
    todo = [State(network, (), selections(program))]
    seen = 0
    while todo and seen < 12:
        state = todo.pop()
        for cell in families(state):
            joined = levels.joined(state, cell)
            assert joined is not None
            after, _ = joined
            rest = [node for node in program.nodes if node is not network]
            same_numbers(program, replace(program, nodes=(*rest, *after.nodes, after.network)))
            todo.append(after)
            seen += 1
    assert seen or bond == 1 or mode == 1 or sites < FEWEST + 3


class Tree(nn.Module):
    """A binary tree of tensors over the sites of a product state."""

    def __init__(self, sites: int, rank: int) -> None:
        super().__init__()
        sizes = [2, *itertools.repeat(rank, sites.bit_length() - 2), 3]
        counts = [sites >> (k + 1) for k in range(len(sizes) - 1)]
        generator = torch.Generator().manual_seed(0)
        self.levels = nn.ParameterList(
            nn.Parameter(torch.randn(count, a, a, b, generator=generator) / a)
            for count, a, b in zip(counts, sizes, sizes[1:], strict=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = list(torch.stack([1 - x, x], -1).unbind(1))
        for level in self.levels:
            values = [
                torch.einsum("bi,bj,ijk->bk", a, b, w) for a, b, w in zip(values[::2], values[1::2], level, strict=True)
            ]
        return values[0]


class Chain(nn.Module):
    """A matrix product state with one bond size, contracted site by site."""

    def __init__(self, sites: int, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(sites, rank, 2, rank, generator=generator)
        self.cores = nn.ParameterList(nn.Parameter(0.7 * torch.eye(rank)[:, None] + 0.1 * core) for core in noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.stack([torch.cos(x), torch.sin(x)], -1)
        left = torch.ones_like(x[:, :1]).expand(-1, self.cores[0].shape[0])
        for k, core in enumerate(self.cores):
            left = torch.einsum("bl,lkr,bk->br", left, core, values[:, k])
        return left


@pytest.mark.parametrize("module", [Chain(24, 5), Tree(16, 4)], ids=["chain", "tree"])
def test_a_classifier_of_activations(module: nn.Module) -> None:
    """Far fewer operators, also at a batch that was not planned for."""
    x = torch.rand(4, 24 if isinstance(module, Chain) else 16, generator=torch.Generator().manual_seed(1))
    model = tncompile.compile(module.eval(), (x,), batch=(1, 8))
    assert [r for r in model.report.passes if r.name == "join" and not r.changes[-1].declined]
    assert len(onnx.load_model_from_string(model.onnx).graph.node) < 80  # over 150 site by site
    for size in (1, 5):
        inputs = torch.rand(size, x.shape[1], generator=torch.Generator().manual_seed(size))
        expected = module.double()(inputs.double()).detach().numpy()
        module.float()
        assert_close(model.run(inputs), expected, tolerance=2e-6)


# ------------------------------------------------------------------------------------ what follows


class Attention(nn.Module):
    """Self-attention with three projections of equal shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.as_tensor(self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("always_join", [False, True])
def test_attention_is_still_fused(always_join: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if always_join:
        monkeypatch.setattr("tncompile.passes.join.gains", always)
    model = tncompile.compile(Attention(16, 2).eval(), (torch.randn(2, 5, 16),), batch=(1, 8))
    found = [node.op_type for node in onnx.load_model_from_string(model.onnx).graph.node]
    assert found.count("MultiHeadAttention") == 1


class Experts(nn.Module):
    """A mixture of experts with soft gating, each expert a module."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.stack([weights[:, k : k + 1] * e(x) for k, e in enumerate(self.experts)]).sum(0)


def test_experts_become_two_matmuls() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    module = Experts(16, 6).eval()
    model = tncompile.compile(module, (x,), batch=(1, 8))
    found = [node.op_type for node in onnx.load_model_from_string(model.onnx).graph.node]
    assert sum(op in ("Gemm", "MatMul") for op in found) in (3, 4)  # the gate, two for all experts, their biases
    assert found.count("Gelu") <= 1
    assert_close(model.run(x), module.double()(x.double()).detach().numpy(), tolerance=2e-6)


def test_steps_of_a_recurrence_wait_for_each_other() -> None:
    """The input projections of all steps are one matmul; the recurrent ones stay."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.take, self.keep = nn.Linear(6, 5), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.take(x[:, 0]))
            for k in range(1, x.shape[1]):
                h = torch.tanh(torch.relu(self.take(x[:, k])) + torch.relu(self.keep(h)))
            return h

    torch.manual_seed(0)
    x, module = torch.randn(3, 6, 6), Recurrent().eval()
    model = tncompile.compile(module, (x,), batch=(1, 8))
    found = [node.op_type for node in onnx.load_model_from_string(model.onnx).graph.node]
    assert sum(op in ("Gemm", "MatMul") for op in found) == 1 + 5
    assert_close(model.run(x), module.double()(x.double()).detach().numpy(), tolerance=2e-6)


def test_a_group_of_layers_goes_through_the_pass() -> None:
    program = layers(4, 8, 8, shared=False, taken=False)
    after, changes = apply_pass(Join(), program, tolerance=TOLERANCE)
    assert [change.declined for change in changes] == [False]
    assert len(after.networks) < len(program.networks)
