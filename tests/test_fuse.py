"""What ONNX Runtime makes of the emitted model: fused kernels by name, and numbers against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tncompile
from tncompile.cli import main
from tncompile.runtime.optimized import OptimizedModel, optimized

BATCH, SEQUENCE = torch.export.Dim("batch"), torch.export.Dim("sequence")
RELATIVE = 3e-6  # float32 against float64, a few layers deep


class TrainLinear(torch.nn.Module):
    """32 -> 32 as a tensor train of two cores."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(4, 4, 6) / 4)
        self.second = torch.nn.Parameter(torch.randn(6, 8, 8) / 4)
        self.bias = torch.nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bsij,ior,rjp->bsop", x.unflatten(-1, (4, 8)), self.first, self.second)
        return y.flatten(-2) + self.bias


class Encoder(torch.nn.Module):
    """One transformer block, with attention by torch or written out, and linear layers of a given kind."""

    def __init__(self, written_out: bool, linear: type[torch.nn.Module] | None = None) -> None:
        super().__init__()
        layer = linear or (lambda: torch.nn.Linear(32, 32))
        self.query, self.key, self.value, self.out = (layer() for _ in range(4))
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.first, self.second = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
        self.written_out = written_out

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = (x.shape[0], x.shape[1], 4, 8)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        allowed = mask[:, None, None, :] > 0
        if self.written_out:
            scores = q @ k.transpose(-1, -2) / math.sqrt(8)
            scores = scores + torch.where(allowed, 0.0, -1e4)
            y = torch.softmax(scores, -1) @ v
        else:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed)
        x = self.first(x + self.out(y.transpose(1, 2).reshape(x.shape)))
        return self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))


def compile_and_optimize(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], folder: Path, dynamic: object = "batch"
) -> tuple[tncompile.CompiledModel, OptimizedModel]:
    """Compile, which checks the numbers, and see what ONNX Runtime runs."""
    compiled = tncompile.compile(module.eval(), inputs, dynamic_shapes=dynamic, batch=(1, 8))
    onnx.checker.check_model(onnx.load_from_string(compiled.onnx), full_check=True)
    path = folder / "model.onnx"
    compiled.save(path)
    return compiled, optimized(path)


def error(compiled: tncompile.CompiledModel, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """max |y - y64| / max |y64| on these inputs."""
    y = compiled.run(*inputs)
    wide = module.double()
    with torch.no_grad():
        reference = wide(*(x.double() if x.is_floating_point() else x for x in inputs)).numpy()
    module.float()
    assert y.shape == reference.shape
    return float(np.abs(y - reference).max() / np.abs(reference).max())


def assert_outputs(
    compiled: tncompile.CompiledModel, module: torch.nn.Module, x: torch.Tensor, rtol: float, atol: float
) -> None:
    """Every output has the shape and, nearly, the numbers that the module gives in float64."""
    y = compiled.run(x)
    with torch.no_grad():
        reference = module.double()(x.double())
    for mine, wide in zip(y.values(), reference, strict=True):
        assert mine.shape == tuple(wide.shape)
        np.testing.assert_allclose(mine, wide.numpy(), rtol=rtol, atol=atol)


def sequences(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences, whose last two tokens are masked in every other one."""
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[::2, -2:] = 0
    return torch.randn(batch, length, 32, generator=generator), mask


@pytest.mark.parametrize("linear", [None, TrainLinear], ids=["dense", "tensor_train"])
@pytest.mark.parametrize("written_out", [True, False], ids=["written_out", "sdpa"])
@pytest.mark.parametrize("dynamic", ["batch", ({0: BATCH, 1: SEQUENCE},) * 2], ids=["batch", "batch_and_sequence"])
def test_a_transformer_block_reaches_the_fused_kernels(
    tmp_path: Path, written_out: bool, linear: type[torch.nn.Module] | None, dynamic: object
) -> None:
    torch.manual_seed(0)
    block = Encoder(written_out, linear)
    compiled, seen = compile_and_optimize(block, sequences(3, 7), tmp_path, dynamic)
    assert seen.fused["com.microsoft:MultiHeadAttention"] == 1
    assert seen.fused["com.microsoft:BiasGelu"] == 1
    assert seen.fused["com.microsoft:SkipLayerNormalization"] >= 1
    assert "Softmax" not in seen.after
    for batch, length in ((1, 7), (5, 7), *(((4, 11),) if dynamic != "batch" else ())):
        inputs = sequences(batch, length)
        assert error(compiled, block, inputs) < RELATIVE


class Masked(torch.nn.Module):
    """Attention by torch with a mask of booleans."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(-2)


def test_a_query_that_may_look_at_nothing_gives_zero_as_in_torch(tmp_path: Path) -> None:
    x, mask = torch.randn(3, 7, 32), torch.ones(3, 1, 7, 7, dtype=torch.bool)
    mask[1, :, 2] = False
    compiled, seen = compile_and_optimize(Masked(), (x, torch.ones_like(mask)), tmp_path)
    assert seen.fused["com.microsoft:MultiHeadAttention"] == 1
    assert not compiled.run(x, mask)[1, 2].any()
    assert error(compiled, Masked(), (x, mask)) < RELATIVE


class Attention(torch.nn.Module):
    """Attention alone, on what `prepare` makes of three inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = lambda x: x.unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
        if self.kind == "sizes_first":  # other elements are together: heads vary fastest
            split = lambda x: x.unflatten(-1, (8, 4)).permute(0, 3, 1, 2)  # noqa: E731
        y = torch.softmax(0.3 * split(q) @ split(k).transpose(-1, -2), -2 if self.kind == "over_queries" else -1)
        y = y @ split(v)
        return y if self.kind == "heads_shown" else y.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(("kind", "count"), [("heads_shown", 1), ("sizes_first", 0), ("over_queries", 0)])
def test_attention_is_told_by_where_its_elements_go(tmp_path: Path, kind: str, count: int) -> None:
    torch.manual_seed(0)
    module, inputs = Attention(kind), tuple(torch.randn(4, 24, 32) for _ in range(3))
    compiled, seen = compile_and_optimize(module, inputs, tmp_path)
    assert seen.fused.get("com.microsoft:MultiHeadAttention", 0) == count
    assert error(compiled, module, inputs) < RELATIVE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_attention_stays_where_the_kernel_has_no_such_type(tmp_path: Path, dtype: torch.dtype) -> None:
    inputs = tuple(torch.randn(2, 6, 32).to(dtype) for _ in range(3))
    _, seen = compile_and_optimize(Attention("plain"), inputs, tmp_path)
    assert "com.microsoft:MultiHeadAttention" not in seen.before


class Column(torch.nn.Module):
    """Two convolutions along a column of an image, as in models of sound."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 8, (5, 1), stride=(2, 1), padding=(2, 0))
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 16, (3, 1), padding=(1, 0), dilation=(1, 1))
        self.head = torch.nn.Linear(16 * 256, 3)
        torch.nn.init.normal_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.reshape(-1, 1, 1024, 1)
        y = self.norm(self.first(x).relu())
        y = torch.nn.functional.max_pool2d(self.second(y).relu(), (2, 1))
        return self.head(y.flatten(1)), y


def test_a_column_is_computed_as_a_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Column()
    compiled, _ = compile_and_optimize(module, (torch.randn(3, 1024),), tmp_path)
    nodes = onnx.load_from_string(compiled.onnx).graph.node
    kernels = [list(a.ints) for n in nodes if n.op_type == "Conv" for a in n.attribute if a.name == "kernel_shape"]
    assert kernels == [[1, 5], [1, 3]]
    read = {name for node in nodes for name in node.input}
    assert {t.name for t in onnx.load_from_string(compiled.onnx).graph.initializer} <= read  # no weight twice
    x = torch.randn(5, 1024)
    assert_outputs(compiled, module, x, rtol=1e-4, atol=1e-5)


def test_a_short_column_is_not_written_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Softsign(), torch.nn.Conv2d(16, 16, (64, 1)))  # 64 places
    compiled, seen = compile_and_optimize(module, (torch.randn(2, 16, 127, 1),), tmp_path)
    assert "com.microsoft.nchwc:Conv" in seen.after
    assert len(compiled.onnx) < 1.2 * 16 * 16 * 64 * 4
    assert error(compiled, module, (torch.randn(3, 16, 127, 1),)) < RELATIVE


class Sound(torch.nn.Module):
    """Layers over one axis as models of sound have them: a residual, a norm, a depthwise convolution, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv1d(1, 32, 9, stride=2, padding=4)  # few products a result: stays as it is
        self.second = torch.nn.Conv1d(32, 32, 3, padding=2, dilation=2)
        self.depthwise = torch.nn.Conv1d(32, 32, 5, padding=(2,), groups=32)
        self.norm, self.prelu = torch.nn.BatchNorm1d(32), torch.nn.PReLU(32)
        self.gain = torch.nn.Parameter(torch.randn(32, 1))
        self.last = torch.nn.Conv1d(32, 16, 4, stride=3)
        torch.nn.init.normal_(self.norm.running_mean)
        torch.nn.init.uniform_(self.prelu.weight, -1.5, 1.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x.unsqueeze(1)).relu()
        y = torch.nn.functional.max_pool1d(x + self.gain * self.prelu(self.second(x)), 3, 2, 1)
        y = self.norm(self.depthwise(y)).relu()
        return self.last(y).sigmoid().mean(-1), y


def test_sequences_are_computed_as_images_of_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Sound()
    compiled, seen = compile_and_optimize(module, (torch.randn(3, 400),), tmp_path)
    model = onnx.load_from_string(compiled.onnx)
    kernels = [list(a.ints) for n in model.graph.node for a in n.attribute if a.name == "kernel_shape"]
    assert sorted(kernels) == [[1, 3], [1, 3], [1, 4], [1, 5], [9]]
    assert seen.after["com.microsoft.nchwc:Conv"] >= 3
    assert {t.name for t in model.graph.initializer} <= {name for node in model.graph.node for name in node.input}
    x = torch.randn(5, 400)
    assert_outputs(compiled, module, x, rtol=1e-4, atol=1e-5)


class Octaves(torch.nn.Module):
    """One bank of filters over a signal and over what is left of it at half the rate, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.bank, self.halve = torch.nn.Conv1d(16, 64, 32, stride=8), torch.nn.Conv1d(16, 16, 9, stride=2, padding=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for _ in range(4):
            found.append(self.bank(x).softmax(1).mean(-1))
            x = self.halve(x).softmax(1)
        return torch.stack(found)


def test_a_kernel_that_several_convolutions_share_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Octaves()
    compiled, _ = compile_and_optimize(module, (torch.randn(2, 16, 800),), tmp_path)
    kernels = [n.input[1] for n in onnx.load_from_string(compiled.onnx).graph.node if n.op_type == "Conv"]
    assert len(kernels) == 7 and len({*kernels}) == 2
    assert len(compiled.onnx) < 1.2 * 4 * sum(p.numel() for p in module.parameters())
    assert error(compiled, module, (torch.randn(3, 16, 800),)) < 1e-5


def test_an_empty_batch_of_sequences_has_an_empty_result(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Softsign(), torch.nn.Conv1d(32, 16, 3), torch.nn.ReLU())
    compiled, _ = compile_and_optimize(module, (torch.randn(2, 32, 20),), tmp_path)
    assert compiled.run(torch.randn(0, 32, 20)).shape == (0, 16, 18)


class Rebuilt(torch.nn.Module):
    """A convolution whose kernel is computed from two factors, over sequences or columns."""

    def __init__(self, column: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Parameter(torch.randn(64, 4) / 4), torch.nn.Parameter(torch.randn(4, 64 * 5) / 4)
        self.column = column

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = (self.a @ self.b).reshape(64, 64, 5)
        if self.column:
            return torch.relu(torch.nn.functional.conv2d(torch.tanh(x), kernel[..., None]))
        return torch.relu(torch.nn.functional.conv1d(torch.tanh(x), kernel))


@pytest.mark.parametrize("column", [False, True])
def test_a_turned_kernel_is_stored_as_its_cores(column: bool) -> None:
    module, shape = Rebuilt(column).eval(), (3, 64, 300, 1) if column else (3, 64, 300)
    passes = tncompile.passes.parse_passes("clean,fold,dense")
    dense = tncompile.compile(module, (torch.randn(shape),), passes=passes, store="folded")
    small = tncompile.compile(module, (torch.randn(shape),), passes=passes, store="cores")
    assert len(dense.onnx) > 64 * 64 * 5 * 4 > 8 * len(small.onnx)
    assert error(small, module, (torch.randn(shape),)) < RELATIVE


@settings(max_examples=6, deadline=None)
@given(
    channels=st.sampled_from([1, 3, 8, 16, 20, 32, 40]),
    filters=st.sampled_from([1, 16, 24, 32]),
    groups=st.sampled_from([1, 1, 2, "all"]),
    kernel=st.integers(1, 40),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_convolution_of_sequences(
    channels: int, filters: int, groups: int | str, kernel: int, stride: int, dilation: int, padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    count = channels if groups == "all" else int(groups)
    if channels % count or filters % count:
        filters, channels = filters * count, channels * count
    layer = torch.nn.Conv1d(channels, filters, kernel, stride, padding, dilation, groups=count)
    behind = (torch.nn.LeakyReLU(), torch.nn.MaxPool1d(2, ceil_mode=True))
    module = torch.nn.Sequential(torch.nn.Softsign(), layer, *behind)
    compiled = tncompile.compile(module.eval(), (torch.randn(2, channels, 96),), batch=(1, 4))
    assert error(compiled, module, (torch.randn(3, channels, 96),)) < RELATIVE


class Image(torch.nn.Module):
    """A small detector: convolutions, PReLU, BatchNorm and a softmax over two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, bias=False)
        self.prelu, self.norm, self.head = torch.nn.PReLU(8), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1)
        torch.nn.init.uniform_(self.prelu.weight, -1.5, 1.5)
        torch.nn.init.normal_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.prelu(self.first(x)))).relu()
        return torch.softmax(self.head(x), 1)


def test_an_image_stays_in_the_layout_of_its_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = Image(), (torch.randn(2, 3, 12, 12),)
    compiled, seen = compile_and_optimize(module, inputs, tmp_path)
    assert not {"PRelu", "Softmax", "BatchNormalization"} & {*seen.after}
    assert "com.microsoft.nchwc:ReorderInput" not in seen.fused
    assert error(compiled, module, (torch.randn(5, 3, 12, 12),)) < RELATIVE


def test_inspect_shows_what_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    compile_and_optimize(Encoder(False), sequences(3, 7), tmp_path)
    assert main(["inspect", str(tmp_path / "model.onnx"), "--format", "optimized"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert rows["operator"] == ["written", "run"]
    assert rows["com.microsoft:BiasGelu"] == ["1"]
    assert rows["com.microsoft:MultiHeadAttention"] == ["1", "1"]


def test_inspect_optimized_wants_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    assert main(["inspect", str(path), "--format", "optimized"]) == 1
    path.write_bytes(b"nothing")
    assert main(["inspect", str(path), "--format", "optimized"]) == 1
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ reshapes


class Reshaped(torch.nn.Module):
    """Products over the last of three axes, and operations on each element of what is flattened between."""

    def __init__(self, columns: int, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.randn(8, k) / 3) for k in (8, columns))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.between((x @ self.first).flatten(1))
        return y.unflatten(-1, (-1, self.second.shape[0])) @ self.second


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (torch.relu, 2),
        (lambda y: torch.nn.functional.gelu(torch.clamp(y, max=0.5)), 2),
        (lambda y: torch.cumsum(y, 1), 3),
    ],
)
def test_two_reshapes_around_elementwise_operations_become_one(
    tmp_path: Path, between: Callable[[torch.Tensor], torch.Tensor], count: int
) -> None:
    torch.manual_seed(0)
    module = Reshaped(4, between)
    compiled, seen = compile_and_optimize(module, (torch.randn(3, 5, 8),), tmp_path)
    assert seen.before.get("Reshape", 0) == count
    assert error(compiled, module, (torch.randn(4, 5, 8),)) < RELATIVE
