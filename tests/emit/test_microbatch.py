"""Large batches in micro-batches: the numbers at any batch, what is taken, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import assert_plain, nodes_of, session_of
from tncompile import compiler
from tncompile.emit import microbatch
from tncompile.emit.microbatch.region import Region, find_region
from tncompile.emit.microbatch.samples import Samples
from tncompile.emit.microbatch.write import write_choice
from tncompile.runtime import settle


class Net(nn.Module):
    """Convolutions, pools and a classifier, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24),
            nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Frames(nn.Module):
    """Frames of each sample beside one another, of which some results are for frames and one mixes samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = torch.relu(self.first(x).reshape(-1, 16, 8, 8))  # four frames of 8 x 8 from an image of 16 x 16
        w = self.second(z).reshape(-1, 32, 8, 8)
        return torch.relu(w).mean((2, 3)), z.mean(0), torch.tanh(z)


class Images(nn.Module):
    """An image out of an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, y.mean((2, 3))


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the cache were so small, and work so cheap, that even small models gain."""
    monkeypatch.setattr(microbatch, "CACHE", 1 << 12)
    monkeypatch.setattr(microbatch, "_SLICE", 1 << 18)
    monkeypatch.setattr(microbatch, "_FEW", 1 << 18)
    monkeypatch.setattr(microbatch, "_COST", np.inf)
    monkeypatch.setattr(microbatch, "_CHOICE_US", 0.0)


def bodies(data: bytes) -> dict[str, onnx.GraphProto]:
    """The graphs inside control flow, by the attribute that holds them."""
    found = nodes_of(onnx.load_model_from_string(data).graph)
    return {a.name: a.g for node in found for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(("net", "channels", "most"), [(Net, 3, 8), (Images, 3, 1), (Frames, 4, 8)])
def test_every_batch_has_the_numbers_of_the_whole(net: Callable[[], nn.Module], channels: int, most: int) -> None:
    module = net().eval()
    compiled = tncompile.compile(module, (torch.randn(2, channels, 16, 16),), batch=(1, 64))
    found = compiled.report.micro_batches
    assert found is not None and found.most == most and "at a time" in str(compiled.report)
    assert_plain(compiled.onnx)
    assert {"then_branch", "else_branch", "body"} == {*bodies(compiled.onnx)}
    runs = " ".join(compiled.report.check.runs)  # type: ignore[union-attr]
    assert all(f"batch={size}" in runs for size in found.sizes)  # each way was checked
    session = session_of(compiled.onnx)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 2, found.limit, found.limit + 1, 3 * found.limit + 1, 4 * found.limit):
        x = torch.randn(batch, channels, 16, 16, generator=generator)
        with torch.no_grad():
            expected = module.double()(x.double())
        wanted = expected if isinstance(expected, tuple) else (expected,)
        (name,) = (i.name for i in session.get_inputs())
        for result, want in zip(session.run(None, {name: x.numpy()}), wanted, strict=True):
            np.testing.assert_allclose(result, want.numpy(), atol=2e-5 * float(want.abs().max()))


@pytest.mark.usefixtures("small_cache")
def test_weights_are_in_the_file_once_and_in_blocks_of_channels() -> None:
    example = (torch.randn(2, 3, 16, 16),)
    parts = tncompile.compile(Net().eval(), example, batch=(1, 64))
    whole = tncompile.compile(Net().eval(), example, batch=(1, 64), micro_batch=False)
    assert whole.report.micro_batches is None and not bodies(whole.onnx)
    assert _numbers(parts.onnx) == _numbers(whole.onnx)
    for model, depth in ((parts, 2), (whole, 1)):
        kinds = _optimized_kinds(model.onnx)
        assert kinds.count("Conv:com.microsoft.nchwc") == 2 * depth, kinds


def _numbers(data: bytes) -> int:
    """Floating-point numbers in a file."""
    initializers = onnx.load_model_from_string(data).graph.initializer
    return sum(int(np.prod(i.dims)) for i in initializers if i.data_type == onnx.TensorProto.FLOAT)


def _optimized_kinds(data: bytes) -> list[str]:
    """The operators as ONNX Runtime runs them, those in control flow too."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return [f"{n.op_type}:{n.domain}" for n in nodes_of(graph)]


def test_a_small_model_is_left_alone() -> None:
    compiled = tncompile.compile(Net().eval(), (torch.randn(2, 3, 16, 16),), batch=(1, 8))
    assert compiled.report.micro_batches is None and not bodies(compiled.onnx)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("faster", [True, False])
def test_with_tune_it_is_raced(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[list[int]] = []

    def whole_is_faster(whole: bytes, parts: bytes, *rest: Any) -> bool:
        assert settle.whole_is_faster(whole, parts, *rest) in (True, False)
        assert not bodies(whole) and bodies(parts)
        raced.append(rest[1])
        return faster

    monkeypatch.setattr(compiler, "whole_is_faster", whole_is_faster)
    monkeypatch.setattr(compiler, "settle", lambda *_: settle.Settled((), (), ()))
    compiled = tncompile.compile(Net().eval(), (torch.randn(2, 3, 16, 16),), batch=(1, 64), tune=0.2)
    assert raced == [[64]]
    assert (compiled.report.micro_batches is None) == faster == (not bodies(compiled.onnx))


@pytest.mark.usefixtures("small_cache")
def test_weights_that_outweigh_images_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "_TWICE", 1000)
    assert not bodies(tncompile.compile(Net().eval(), (torch.randn(2, 3, 16, 16),), batch=(1, 64)).onnx)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(
    ("choice", "batches", "taken"), [(1e-6, (1, 64), True), (1.0, (1, 64), False), (1.0, (64,), True)]
)
def test_the_smallest_batch_can_pay_for_the_choice(
    choice: float, batches: tuple[int, ...], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense convolutions gain nothing by the compiler, so their own work must be enough."""
    monkeypatch.setattr(microbatch, "_CHOICE_US", choice)
    compiled = tncompile.compile(Net().eval(), (torch.randn(2, 3, 16, 16),), batch=batches)
    assert bool(bodies(compiled.onnx)) == taken


@pytest.mark.usefixtures("small_cache")
class Light(nn.Module):
    """Little work on large images, as two convolutions in TT form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Conv2d(64, 2, (3, 1), padding=(1, 0)), nn.Conv2d(2, 128, (1, 3), padding=(0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.wide(self.narrow(x)).transpose(2, 3) + 1)


def test_light_work_on_images_from_memory_is_worth_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Scan costs is compared with the whole batch, whose images come from memory."""
    compiled = tncompile.compile(Light(), (torch.randn(2, 64, 20, 20),), batch=256, threads=1, check=False)
    assert compiled.report.micro_batches is not None
    found = microbatch.find_region
    monkeypatch.setattr(microbatch, "find_region", lambda *given: as_if_cached(found(*given)))
    compiled = tncompile.compile(Light(), (torch.randn(2, 64, 20, 20),), batch=256, threads=1, check=False)
    assert compiled.report.micro_batches is None


def as_if_cached(region: Region | None) -> Region | None:
    return None if region is None else replace(region, streamed_microseconds=region.microseconds)


def test_a_fixed_batch_is_left_alone() -> None:
    exported = torch.export.export(Net().eval(), (torch.randn(64, 3, 16, 16),))
    compiled = compiler.compile_exported(exported)
    assert not bodies(compiled.onnx)


# ------------------------------------------------------------------------------ which nodes


def graph_of(text: str, **weights: list[int]) -> onnx_ir.Graph:
    """A graph written in ONNX's own text, with inferred shapes; `weights` have random numbers, or are sizes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = np.array(shape, np.int64) if name.startswith("n_") else rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    return model.graph


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ("y = Relu(x)", True),
        ("y = Add(x, w1)", True),
        ("y = Add(x, wb)", False),  # one number for each sample of one batch size
        ("y = Softmax<axis=1>(x)", True),
        ("y = Softmax<axis=0>(x)", False),
        ("y = Softmax<axis=-4>(x)", False),
        ("y = ReduceMean<keepdims=1>(x, n_2)", True),
        ("y = ReduceMean<keepdims=1>(x, n_0)", False),
        ("y = ReduceMean<keepdims=1>(x)", False),  # over all axes
        ("y = Transpose<perm=[0, 2, 1, 3]>(x)", True),
        ("y = Transpose<perm=[1, 0, 2, 3]>(x)", False),
        ("y = Concat<axis=1>(x, x)", True),
        ("y = Concat<axis=0>(x, x)", False),
        ("y = CumSum(x, n_0)", False),  # no rule
        ("y = MatMul(x, w1)", True),
        ("y = MatMul(wb, x)", False),
        ("y = Slice(x, n_0, n_1, n_2)", True),
        ("y = Slice(x, n_0, n_1, n_0)", False),
        ("y, z = MaxPool<kernel_shape=[2, 2]>(x)", False),  # indices count through the batch
    ],
)
def test_what_computes_each_sample_by_itself(body: str, taken: bool) -> None:
    text = f"main (float[batch, 3, 4, 4] x) => (float[batch, c, h, w] y) {{ {body} }}"
    graph = graph_of(text, w1=[4, 4], wb=[5, 3, 4, 4], n_0=[0], n_1=[1], n_2=[2])
    assert bool(Samples(graph, "batch").nodes) == taken


@pytest.mark.parametrize(
    ("sizes", "entries"),
    [
        ([-1, 48], 1),
        ([-1, 16], 3),
        ([-1, 4, 4], 3),
        ([0, 3, 16], 1),
        ([6, -1], None),
        ([-1, 32], None),
        ([-1, 96], None),
    ],
)
def test_samples_behind_a_reshape(sizes: list[int], entries: int | None) -> None:
    text = "main (float[batch, 3, 4, 4] x) => (float[a, b] y) { y = Reshape(x, n_s)  }"
    graph = graph_of(text.replace("float[a, b]", "float[" + ", ".join("abc"[: len(sizes)]) + "]"), n_s=sizes)
    node = next(iter(graph))
    node.outputs[0].shape = onnx_ir.Shape([s if s > 0 else "batch" if s == 0 else "rest" for s in sizes])
    samples = Samples(graph, "batch")
    assert samples.entry(node.outputs[0]) == entries and (node in samples.nodes) == (entries is not None)


# ------------------------------------------------------------------------------ any net


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int]]:
    torch.manual_seed(draw(st.integers(0, 99)))
    channels, size = draw(st.integers(1, 9)), draw(st.integers(6, 9))
    first, layers = channels, list[nn.Module]()
    for _ in range(draw(st.integers(1, 3))):
        after = draw(st.integers(1, 17))
        kernel, padding = draw(st.sampled_from([(1, 0), (3, 1), (3, 0)]))
        layers += [nn.Conv2d(channels, after, kernel, padding=padding), draw(st.sampled_from([nn.ReLU, nn.Tanh]))()]
        channels = after
    tails: list[list[nn.Module]] = [
        [],
        [nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Softmax(1)],
        [nn.MaxPool2d(2), nn.Flatten(2)],
    ]
    return nn.Sequential(*layers, *draw(st.sampled_from(tails))).eval(), (first, max(size, 8))


@pytest.mark.parametrize("most", [1, 4])
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(net=nets(), batch=st.integers(1, 13))
def test_any_net_in_parts(most: int, net: tuple[nn.Module, tuple[int, int]], batch: int) -> None:
    module, (channels, size) = net
    seen = []

    def parts(model: onnx_ir.Model, **_: object) -> None:
        onnx_ir.passes.common.ShapeInferencePass()(model)
        (first, *_rest) = model.graph.inputs[0].shape or ()
        region = find_region(model.graph, str(getattr(first, "value", first)))
        if region is not None:
            write_choice(model.graph, region, 2, most)
            seen.append(len(region.nodes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "in_micro_batches", parts)
        compiled = tncompile.compile(module, (torch.randn(2, channels, size, size),), check=False)
    assume(seen)  # not all written as products of matrices
    assert "body" in bodies(compiled.onnx)
    x = torch.randn(batch, channels, size, size)
    with torch.no_grad():
        expected = module.double()(x.double()).numpy()
    session = session_of(compiled.onnx)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
