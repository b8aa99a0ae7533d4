"""Convolutions as networks with windows: what they compute, what they compose to, every way to run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import assert_close, evaluate_program, operators, program_of, session_of
from tncompile.emit.program import to_onnx
from tncompile.errors import VerificationError
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Network, Opaque, Program, Window, verify
from tncompile.ir import text as ir_text
from tncompile.passes import Clean, Context, Fold, MergeCores, Pipeline
from tncompile.passes.plans import Limits, candidates, merge_constants

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """One to three convolutions with nothing between them, and an input."""
    rank = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    space = shape = [draw(st.integers(5, 7)) for _ in range(rank)]
    channels = first = draw(st.sampled_from([1, 2, 4, 6]))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        kernel = [draw(st.integers(1, min(3, s))) for s in space]
        stride = [draw(st.sampled_from([1, 1, 1, 2])) for _ in space]
        dilation = [draw(st.integers(1, 2)) if (k - 1) * 2 < s else 1 for k, s in zip(kernel, space, strict=True)]
        padding = [draw(st.integers(0, k // 2)) for k in kernel]
        groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
        filters = groups * draw(st.integers(1, 3))
        args: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        layers.append(CONVOLUTIONS[rank](channels, filters, kernel, bias=draw(st.booleans()), **args))
        channels = filters
        space = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(space, padding, dilation, kernel, stride, strict=True)
        ]
        if min(space) < 3:
            break
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    module = nn.Sequential(*layers).eval()
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module, torch.randn(2, first, *shape, generator=generator)


def traced(module: nn.Module, *inputs: torch.Tensor) -> Any:
    return import_exported(trace(module, inputs, None, "batch"))


def composed(module: nn.Module, *inputs: torch.Tensor) -> Program:
    passes = (Clean(), Fold(), Clean(), MergeCores())
    return Pipeline(passes, scheduled=False).run(traced(module, *inputs).program, Context())[0]


@settings(max_examples=15, deadline=None)
@given(convolutions())
def test_networks_are_the_convolutions(case: tuple[nn.Module, torch.Tensor]) -> None:
    module, x = case
    program = traced(module, x).program
    assert not [node for node in program.nodes if isinstance(node, Opaque)]
    assert ir_text.parse(ir_text.dump(program), program.arrays) == program
    expected = module.double()(x.double()).detach().numpy()
    feeds = {program.inputs[0].name: x.numpy()}
    for stage in (program, composed(module.float(), x)):
        found = evaluate_program(stage, feeds, {"batch": 2})
        assert_close(found["output"], expected, tolerance=1e-5)


@settings(max_examples=6, deadline=None)
@given(convolutions())
def test_compiled_convolutions(case: tuple[nn.Module, torch.Tensor]) -> None:
    module, x = case
    model = tncompile.compile(module, (x,), batch=(1, 4), check=False)
    wide = torch.cat([x, x + 1, x - 1])
    assert_close(model.run(wide), module.double()(wide.double()).detach().numpy(), tolerance=1e-5)


class Factors(nn.Module):
    """A CP convolution: 1×1, k×1 and 1×k on each channel alone, 1×1."""

    def __init__(self, rank: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, rank, 1, bias=False)
        self.tall = nn.Conv2d(rank, rank, (3, 1), padding=(1, 0), groups=rank, bias=False)
        self.wide = nn.Conv2d(rank, rank, (1, 3), stride=(1, 2), padding=(0, 1), groups=rank, bias=False)
        self.last = nn.Conv2d(rank, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(self.tall(self.first(x))))


class Rebuilt(nn.Module):
    """The same, as one convolution whose kernel is computed from the factors at each call."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.factors
        kernel = torch.einsum(
            "or,ri,rk,rl->oikl",
            f.last.weight[:, :, 0, 0],
            f.first.weight[:, :, 0, 0],
            f.tall.weight[:, 0, :, 0],
            f.wide.weight[:, 0, 0, :],
        )
        return nn.functional.conv2d(x, kernel, f.last.bias, stride=(1, 2), padding=1)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_factors_and_their_product_are_the_same_network() -> None:
    x = images(2, 3, 8, 8)
    factors = Factors().eval()
    for module in (factors, Rebuilt(factors).eval()):
        (network,) = composed(module, x).networks
        moving, bias = network.terms
        assert len(moving.operands) == 1 and len(moving.windows) == 2 and len(bias.tensors) == 1
        assert sorted(c.data.size for c in moving.cores if c.data is not None) == [15, 15, 15, 35]
        expected = module.double()(x.double()).detach().numpy()
        module.float()
        assert_close(tncompile.compile(module, (x,), check=False).run(x), expected, tolerance=1e-5)


def test_every_order_and_merge_is_right() -> None:
    module, x = Factors().eval(), images(3, 3, 8, 8)
    program = composed(module, x)
    (network,) = program.networks
    term, context = network.terms[0], Context(batches=(1, 32))
    ways = candidates(network, term, context, Limits(16, 24, 3))
    assert len(ways) > 4  # those that take over twice the time of the best are not followed
    assert {step.form for way in ways for step in way.steps} >= {"convolve", "core_left"}
    expected = module.double()(x.double()).detach().numpy()
    source = traced(module.float(), x)
    for way in ways:
        one = replace(merge_constants(network, term, way.tree), steps=way.steps)
        ready = replace(program, nodes=(replace(network, terms=(one, *network.terms[1:])),))
        verify(ready, "scheduled")
        model = onnx_ir.to_proto(to_onnx(ready, source))
        onnx.checker.check_model(model, full_check=True)
        (found,) = session_of(model.SerializeToString()).run(None, {"x": x.numpy()})
        assert_close(found, expected, tolerance=1e-5, what=str(way.tree))


def test_a_dense_network_is_written_as_it_was() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, groups=2), nn.ReLU()
    ).eval()
    net[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    model = tncompile.compile(net, (images(2, 3, 9, 9),))
    assert operators(model.onnx) == ["Conv", "Conv", "Relu", "Relu"]


def test_a_bias_passes_a_window_only_where_it_stays_constant() -> None:
    x = images(2, 3, 8, 8)
    first = nn.Conv2d(3, 4, 1)
    inside = nn.Sequential(first, nn.Conv2d(4, 5, 3, bias=False)).eval()
    (network,) = composed(inside, x).networks
    assert [len(t.windows) for t in network.terms] == [2, 0]
    padded = nn.Sequential(first, nn.Conv2d(4, 5, 3, padding=1, bias=False)).eval()
    assert len(composed(padded, x).networks) == 2
    for module in (inside, padded):
        expected = module.double()(x.double()).detach().numpy()
        assert_close(tncompile.compile(module.float(), (x,), check=False).run(x), expected, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["conv", "kernel"])
def test_what_stays_opaque(kind: str) -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv1d(x, kernel)

    if kind == "kernel":
        program = traced(Own(), images(2, 3, 8), images(4, 3, 3)).program
    else:
        program = traced(nn.Conv1d(3, 4, 3).double(), images(2, 3, 8).double()).program
    assert [n.target for n in program.nodes if isinstance(n, Opaque)] == ["aten.conv1d.default"]


class Slid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.shortcut(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2)


def test_a_sum_of_convolutions_adds_biases_in_one_of_them() -> None:
    x = images(2, 4, 9, 9)
    module = Slid().eval()
    model = tncompile.compile(module, (x,))
    assert operators(model.onnx) == ["Add", "Conv", "Conv"]
    assert_close(model.run(x), module.double()(x.double()).detach().numpy(), tolerance=1e-5)


def test_dynamic_space() -> None:
    x = images(2, 3, 24)
    module = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 5, stride=2)).eval()
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("time", min=8, max=64)},)
    model = tncompile.compile(module, (x,), dynamic_shapes=shapes)
    longer = images(5, 3, 41)
    assert_close(model.run(longer), module.double()(longer.double()).detach().numpy(), tolerance=1e-5)


TEXT = """program
  input x: float32[batch, 3, 8]
  network y: float32[batch, 5, 4]
    indices batch=batch, o=5, h=4, c=3, i=8, k=3
    term
      0 operand x[batch, c, i]
      1 core w[o, c, k]
      window i, k -> h, stride=2, dilation=1, padding=1 1
      order (0 1)
    -> y[batch, o, h]
  output y = y
"""


def test_text() -> None:
    program = program_of(TEXT)
    assert ir_text.dump(program) == TEXT
    (network,) = program.networks
    assert network.terms[0].windows == (Window("i", "k", "h", 2, 1, (1, 1)),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("h=4", "h=5", "leaves 4, but h has size 5"),
        ("window i, k", "window c, k", "a window over c, which is not an index of one operand alone"),
        ("window i, k", "window i, c", "a window with c, which is not an index of one kernel alone"),
        ("k -> h", "k -> o", "leaves o, which is not an index of the output alone"),
    ],
)
def test_wrong_windows_are_refused(old: str, new: str, message: str) -> None:
    text = TEXT.replace(old, new)
    text = text.replace("y: float32[batch, 5, 4]", "y: float32[batch, 5, 5]") if new == "h=5" else text
    with pytest.raises(VerificationError, match=message):
        verify(program_of(text))


def test_a_window_is_not_split() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bchw,ho->bcow", self.conv(x).unflatten(2, (2, 4)), torch.ones(2, 3))

    x = images(2, 3, 8)
    program = composed(Folded().eval(), x)
    assert [len(n.terms[0].windows) for n in program.networks if isinstance(n, Network)] == [1, 0]
