"""Images stay in ONNX Runtime's blocks of channels: 1x1 convolutions are convolutions, whatever lies between them."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import tncompile
from tests.helpers import operators
from tncompile.compiler import CompiledModel


def checked(model: nn.Module, x: torch.Tensor, **options: object) -> CompiledModel:
    """A compiled model that computes what eager PyTorch does."""
    result = tncompile.compile(model.eval(), (x,), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.from_numpy(result.run(x)), model(x), rtol=1e-4, atol=1e-5)
    return result


class Activated(nn.Module):
    """Convolutions of three places and of one, x·sigmoid(x) between them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((24, 24, 3), (24, 48, 1), (48, 24, 1), (24, 24, 3))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x


@pytest.mark.parametrize("fixed", [True, False])
def test_of_one_image_and_of_many(fixed: bool) -> None:
    options = {"dynamic_shapes": {}, "batch": 1} if fixed else {"batch": (1, 8)}
    result = checked(Activated(), torch.randn(1 if fixed else 2, 24, 40, 40), micro_batch=False, **options)
    assert operators(result.onnx) == sorted(4 * ["Conv", "Sigmoid", "Mul"])


class Gated(nn.Module):
    """Squeeze and excitation before a 1x1 convolution: the gate is no reason to multiply its weights at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.squeeze, self.excite, self.project = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.before(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.after(self.project(x * gate))


def test_after_a_gate() -> None:
    found = operators(checked(Gated(), torch.randn(2, 32, 14, 14), batch=8).onnx)
    assert found.count("Conv") == 3 and found.count("Mul") == 1 and "MatMul" not in found


class Normed(nn.Module):
    """A block of ConvNeXt: channels are last for the norm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(80, 80, 7, padding=3, groups=80), nn.LayerNorm(80)
        self.wide, self.narrow = nn.Conv2d(80, 320, 1), nn.Conv2d(320, 80, 1)
        self.after = nn.Conv2d(80, 80, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(self.narrow(nn.functional.gelu(self.wide(h))) + x)


def test_channels_that_move_for_a_norm_move_in_one_node_beside_the_convolution() -> None:
    found = operators(checked(Normed(), torch.randn(2, 80, 20, 20), batch=8).onnx)
    assert found == sorted([*4 * ["Conv"], *2 * ["Transpose"], "LayerNormalization", "Gelu", "Add"])


class Grouped(nn.Module):
    """Channels mixed within groups, as a 1x1 convolution or as the einsum that it is."""

    def __init__(self, groups: int, width: int, einsum: bool) -> None:
        super().__init__()
        sizes = ((3, 1), (1, groups), (3, 1))
        self.layers = nn.ModuleList(
            nn.Conv2d(groups * width, groups * width, k, padding=k // 2, groups=g) for k, g in sizes
        )
        self.groups, self.einsum = groups, einsum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, mix, last = self.layers
        x = torch.relu(first(x))
        if not self.einsum:
            return last(torch.relu(mix(x)))
        weight = mix.weight.reshape(self.groups, -1, mix.in_channels // self.groups)
        mixed = torch.einsum("bgchw,goc->bgohw", x.unflatten(1, (self.groups, -1)), weight).flatten(1, 2)
        return last(torch.relu(mixed + mix.bias[:, None, None]))


@pytest.mark.parametrize("einsum", [False, True])
@pytest.mark.parametrize(("groups", "width", "convolves"), [(6, 16, True), (4, 32, True), (12, 3, False)])
def test_groups_of_whole_blocks(groups: int, width: int, convolves: bool, einsum: bool) -> None:
    result = checked(Grouped(groups, width, einsum), torch.randn(2, groups * width, 14, 14), batch=8, micro_batch=False)
    assert operators(result.onnx).count("Conv") == 2 + convolves and ("MatMul" in operators(result.onnx)) != convolves


class Gray(nn.Module):
    """One image of three channels that lie last, before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.gray, self.after = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.relu(self.gray(x.permute(0, 3, 1, 2))))


@pytest.mark.parametrize(("side", "batch"), [(56, 1), (112, 8)])
def test_the_only_channel_is_no_product_at_each_place(side: int, batch: int) -> None:
    found = checked(Gray(), torch.randn(2, side, side, 3), batch=batch, micro_batch=False)
    graph = onnx.load_model_from_string(found.onnx).graph
    weights = {i.name for i in graph.initializer}
    assert all(node.input[0] not in weights for node in graph.node if node.op_type == "MatMul")


class Residual(nn.Module):
    """An image and a 1x1 convolution of what heads make of it, each with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.mix = nn.Conv2d(64, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        heads = torch.softmax(x.flatten(2).unflatten(1, (4, -1)).transpose(2, 3), -1)
        h = heads.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.after(x + self.mix(h))


def test_what_is_added_to_an_image_is_one_too() -> None:
    found = operators(checked(Residual(), torch.randn(2, 64, 10, 10), batch=8, micro_batch=False).onnx)
    assert found.count("Conv") == 3 and "MatMul" not in found


def test_a_kernel_is_not_written_out_over_a_long_signal() -> None:
    """At each of 342 places: 320,000 numbers for 256."""
    result = checked(nn.Conv1d(1, 1, 256, stride=2, bias=False), torch.randn(2, 1, 939), batch=(1, 32))
    assert len(result.onnx) < 10_000


class Mixed(nn.Module):
    """Channels mixed at each place, as an einsum."""

    def __init__(self, equation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(64, 64, dtype=dtype) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, x, self.weight)


@pytest.mark.parametrize(("equation", "sizes"), [("bchw,oc->bohw", (16, 16)), ("bct,oc->bot", (256,))])
def test_in_float64_which_has_no_such_kernel_a_matmul_stays_in_place(equation: str, sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 64, *sizes, dtype=torch.float64)
    result = tncompile.compile(Mixed(equation, torch.float64).eval(), (x,), batch=32)
    assert "Transpose" not in operators(result.onnx) and "MatMul" in operators(result.onnx)


def test_in_float16() -> None:
    x = torch.randn(2, 64, 16, 16, dtype=torch.float16)
    assert operators(tncompile.compile(Mixed("bchw,oc->bohw", torch.float16).eval(), (x,), batch=32).onnx) == ["Conv"]
