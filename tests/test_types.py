"""What models take and return: dtypes, nested and unusual outputs, shared modules, sizes that depend on each other."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

import tncompile
from tncompile.cli import main
from tncompile.errors import CheckError, UnsupportedError

B = Dim("batch")


class Model(nn.Module):
    """A function as a module, with the modules and tensors that it needs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def linear(rows: int = 8, columns: int = 8) -> nn.Linear:
    torch.manual_seed(rows * 100 + columns)
    return nn.Linear(rows, columns)


def assert_same(model: nn.Module, inputs: tuple[Any, ...], tolerance: float = 1e-5, shapes: Any = "batch") -> Any:
    """Compile, run at the example and compare each output with eager; the compile has checked other batches."""
    compiled = tncompile.compile(model.eval(), inputs, dynamic_shapes=shapes, batch=(2, 5))
    assert compiled.report.check is not None and compiled.report.check.passed
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    found = compiled.run(*(t.float() if t.dtype == torch.bfloat16 else t for t in tensors))
    found = list(found.values()) if isinstance(found, dict) else [found]
    with torch.no_grad():
        leaves = [x for x in torch.utils._pytree.tree_leaves(model(*inputs)) if x is not None]
    assert len(leaves) == len(found)
    for leaf, array in zip(leaves, found, strict=True):
        wide = torch.as_tensor(leaf).detach().double()
        assert tuple(array.shape) == tuple(wide.shape)
        np.testing.assert_allclose(array.astype(np.float64), wide.numpy(), atol=tolerance, rtol=tolerance)
    return compiled


# ------------------------------------------------------------------------ inputs and outputs

X = torch.linspace(-1, 1, 32).reshape(4, 8)
Pair = namedtuple("Pair", ["first", "second"])


def twice(model: Any, x: torch.Tensor) -> Any:
    y = model.l(x)
    return y, y


OUTPUTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[str]]] = {
    "several": (lambda m, a, b: (m.l(a) + b, a * b), (X, X + 1), ["output_0", "output_1"]),
    "nested dict": (
        lambda m, a: {"u": m.l(a), "v": {"w": a.sum(1), "z": [a, a * 2]}},
        (X,),
        ["u", "v.w", "v.z.0", "v.z.1"],
    ),
    "named tuple": (lambda m, a: Pair(m.l(a), a + 1), (X,), ["first", "second"]),
    "none": (lambda m, a: (m.l(a), None, a + 1), (X,), ["output_0", "output_1"]),
    "numbers": (lambda m, a: (m.l(a).sum(), 3.5, 2, True), (X,), ["output_0", "output_1", "output_2", "output_3"]),
    "an input": (lambda m, a: (a, m.l(a)), (X,), ["output_0", "output_1"]),
    "one value twice": (twice, (X,), ["output_0", "output_1"]),
    "a weight": (lambda m, a: (m.l(a), m.l.weight), (X,), ["output_0", "output_1"]),
    "scalar input": (lambda m, a, k: m.l(a) * k, (X, torch.tensor(2.5)), ["output"]),
    "number as input": (lambda m, a, k: m.l(a) * k, (X, 2.5), ["output"]),
    "image bytes": (
        lambda m, a: m.l(a.float() / 255),
        (torch.arange(32, dtype=torch.uint8).reshape(4, 8),),
        ["output"],
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_inputs_and_outputs(case: str) -> None:
    function, inputs, names = OUTPUTS[case]
    compiled = assert_same(Model(function, l=linear()), inputs)
    assert [o.name for o in onnx.load_model_from_string(compiled.onnx).graph.output] == names


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids_and_a_mask(dtype: torch.dtype) -> None:
    model = Model(lambda m, i, k: m.l(m.e(i)) * k.unsqueeze(-1), l=linear(), e=nn.Embedding(10, 8))
    tokens = torch.arange(20).reshape(4, 5).remainder(10).to(dtype)
    compiled = assert_same(model, (tokens, tokens > 3))
    kinds = [i.type.tensor_type.elem_type for i in onnx.load_model_from_string(compiled.onnx).graph.input]
    assert kinds == [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype)[6:])), onnx.TensorProto.BOOL]


def test_one_module_twice_and_tied_weights() -> None:
    """One module called twice, one weight of two modules, and the same weight in a product: stored once."""
    shared, other = linear(64, 64), linear(64, 64)
    other.weight = shared.weight
    model = Model(lambda m, a: torch.tanh(m.o(torch.tanh(m.s(torch.tanh(m.s(a)))))), s=shared, o=other)
    compiled = assert_same(model, (torch.randn(4, 64),))
    stored = [i for i in onnx.load_model_from_string(compiled.onnx).graph.initializer if list(i.dims) == [64, 64]]
    assert len(stored) == 1


def test_an_empty_batch() -> None:
    compiled = assert_same(Model(lambda m, a: m.l(torch.relu(m.k(a))), l=linear(), k=linear()), (X,))
    assert compiled.run(X[:0]).shape == (0, 8)


def test_state_that_changes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"writes to running_mean.*model\.eval\(\)"):
        tncompile.compile(nn.BatchNorm1d(8).train(), (X,))


# ------------------------------------------------------------------------ sizes


def test_batch_and_sequence_that_depend_on_each_other() -> None:
    seq, half = Dim("seq", max=50), Dim("half", max=32)
    shifted = Model(lambda m, a, b: m.l(a[:, 1:] + b), l=linear())
    shapes = ({"inputs": ({0: B, 1: seq + 1}, {0: B, 1: seq})},)[0]
    assert_same(shifted, (torch.randn(4, 6, 8), torch.randn(4, 5, 8)), shapes=shapes)
    paired = Model(lambda m, a: m.l(a.reshape(a.shape[0], -1, 16)), l=linear(16, 4))
    compiled = assert_same(paired, (torch.randn(4, 6, 8),), shapes={"inputs": ({0: B, 1: 2 * half},)})
    for length in (2, 10):
        assert compiled.run(torch.randn(3, length, 8)).shape == (3, length // 2, 4)


def test_three_modes_in_and_five_out() -> None:
    """The sides of a network need not have as many modes as each other, in an einsum or through views."""
    cores = {"p": (2, 2, 3, 4), "q": (4, 4, 2, 3), "r": (3, 3, 2, 2)}
    torch.manual_seed(0)
    parts = {name: nn.Parameter(torch.randn(shape) / 4) for name, shape in cores.items()}

    def train(m: Any, a: torch.Tensor) -> torch.Tensor:
        return torch.einsum("zabc,apqi,birj,cjst->zpqrst", a.reshape(-1, 2, 4, 3), m.p, m.q, m.r).flatten(1)

    compiled = assert_same(Model(train, **parts), (torch.randn(4, 24),))
    assert len(compiled.program.networks) == 1
    assert [len(a) for a in compiled.stages["traced"].networks[-1].output.axes][-1] in (1, 5)

    def views(m: Any, a: torch.Tensor) -> torch.Tensor:
        y = m.l(a.reshape(-1, 2, 3, 4).permute(0, 3, 1, 2).reshape(-1, 24))
        return m.k(y.reshape(-1, 2, 5, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(-1, 12, 10))

    assert_same(Model(views, l=linear(24, 120), k=linear(10, 7)), (torch.randn(4, 24),))


# ------------------------------------------------------------------------ dtypes


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)]
    return nn.Sequential(*layers)


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0)


@pytest.mark.parametrize(
    "dtype, make, shape",
    [(torch.float16, convolutional, (2, 3, 8, 8)), (torch.bfloat16, encoder, (2, 6, 16))],
)
def test_half_precision(dtype: torch.dtype, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    compiled = assert_same(make().to(dtype), (torch.randn(shape).to(dtype),), tolerance=24 * rounding)
    kind = str(compiled.run(torch.randn(shape).to(torch.float16 if dtype == torch.float16 else torch.float32)).dtype)
    assert kind == ("float32" if dtype == torch.bfloat16 else "float16")
    assert ("bfloat16" in str(compiled.report)) == (dtype == torch.bfloat16)
    (output,) = compiled.report.check.outputs  # type: ignore[union-attr]
    assert output.error < (5e-6 if dtype == torch.bfloat16 else 5e-3)


def test_bfloat16_weights_are_shared_and_mixed_with_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = linear(64, 64).bfloat16()
    model = Model(lambda m, a: m.k(torch.tanh(m.h(torch.tanh(m.h(a.bfloat16())))).float()), h=half, k=linear(64, 3))
    x = torch.randn(4, 64)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes={"inputs": ({0: B},)})
    torch.export.save(program, tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), "-o", str(tmp_path / "out.onnx")]) == 0
    assert "no bfloat16 on a CPU" in " ".join(capsys.readouterr().out.split())
    stored = [list(i.dims) for i in onnx.load(tmp_path / "out.onnx").graph.initializer]
    assert stored.count([64, 64]) == 1
    assert main(["verify", str(tmp_path / "model.pt"), str(tmp_path / "out.onnx")]) == 0


@pytest.mark.parametrize("mask", [None, "causal", "bool"])
def test_attention_in_float64(mask: str | None) -> None:
    """torch's exporter rounds the scale to float32: an error of 5e-8 that float64 must not have."""
    keep = torch.ones(6, 6, dtype=torch.bool).tril(1)
    options: dict[str, Any] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": keep},
    }.get(mask or "", {})
    torch.manual_seed(0)
    model = Model(lambda m, q, k: nn.functional.scaled_dot_product_attention(q, k, k, **options))
    assert_same(model, (torch.randn(2, 4, 6, 8).double(), torch.randn(2, 4, 6, 8).double()), tolerance=1e-13)


@pytest.mark.parametrize("make, shape", [(encoder, (2, 6, 16)), (lambda: nn.GroupNorm(2, 8), (2, 8, 5))])
def test_float64(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    assert_same(make().double(), (torch.randn(shape).double(),), tolerance=1e-11)


def test_what_has_no_kernel_in_float64_says_so() -> None:
    with pytest.raises(CheckError, match=r"has no Erf for this dtype on CPUExecutionProvider.*model\.float\(\)"):
        tncompile.compile(nn.Sequential(linear(), nn.GELU()).double(), (X.double(),))


# ------------------------------------------------------------------------ complex numbers


def complex_of(*shape: int, dtype: torch.dtype = torch.complex64) -> nn.Parameter:
    torch.manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, dtype=dtype) / 2)


def rotated(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Rotary positions as Llama's own code has them."""
    turn = torch.polar(torch.ones_like(m.angles), m.angles)
    pairs = torch.view_as_complex(m.l(x).reshape(x.shape[0], -1, 4, 2))
    return torch.view_as_real(pairs * turn).flatten(2)


def born(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A complex matrix product state and the square of its amplitude."""
    z = x.to(torch.complex64)
    psi = torch.einsum("zi,ir,rjk,zj->zk", z, m.p, m.q, z)
    return (psi * psi.conj()).real / 7 + psi.abs()


COMPLEX: dict[str, tuple[Callable[..., Any], dict[str, Any], torch.Tensor]] = {
    "born": (born, {"p": complex_of(8, 3), "q": complex_of(3, 8, 4)}, X),
    "rotary": (rotated, {"l": linear(), "angles": torch.linspace(0, 3, 12).reshape(3, 4)}, torch.randn(4, 3, 8)),
    "filter": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, norm="ortho") * m.w, n=8, norm="ortho"),
        {"w": complex_of(5)},
        X,
    ),
    "spectrum": (lambda m, x: torch.fft.ifft(torch.fft.fft(x)[:, 1:] @ m.w).imag, {"w": complex_of(7, 6)}, X),
    "layers": (
        lambda m, x: (
            torch.stack([nn.functional.linear(torch.complex(x, x + 1), m.w, m.b), m.c * 2 - x], 1)
            .permute(0, -1, 1)
            .sum(-1)
            .abs()
        ),
        {"w": complex_of(8, 8), "b": complex_of(8), "c": complex_of(1, 8)},
        X,
    ),
}


@pytest.mark.parametrize(
    "function",
    [
        lambda z, x: z.sum().abs() + x.sum(1),
        lambda z, x: z.mean().real + z.mean(-1).imag,
        lambda z, x: z.sum(dim=[]).imag * x.sum(1),
        lambda z, x: torch.mean(z, dim=(), keepdim=True).abs()[0] + x.sum(1),
        lambda z, x: z.sum((0, 1)).sum().abs() + x.sum(1),
        lambda z, x: torch.sum(x, -1, dtype=torch.complex64).real,
    ],
)
def test_sums_of_complex_numbers(function: Callable[..., Any]) -> None:
    """Over no axis is over all; never over real and imaginary parts."""
    assert_same(Model(lambda m, x: function(torch.complex(x, x * m.c + 1), x), c=torch.randn(8)), (X,))


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_numbers_inside(case: str) -> None:
    function, parts, x = COMPLEX[case]
    compiled = assert_same(Model(function, **parts), (x,))
    assert not compiled.report.notes
    assert compiled.traced.reference is not compiled.traced.exported  # checked against the complex graph


def test_complex_numbers_of_two_precisions() -> None:
    def both(m: Any, x: torch.Tensor) -> torch.Tensor:
        narrow = torch.complex(x, x + 1) @ m.p
        return (narrow.to(torch.complex128) * m.q).abs()

    parts = {"p": complex_of(8, 3), "q": complex_of(3, dtype=torch.complex128)}
    compiled = tncompile.compile(Model(both, **parts), (X,), check=False)
    expected = both(Model(both, **parts), X).detach().numpy()
    found = compiled.run(X)
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_complex_inputs_and_outputs_are_pairs() -> None:
    model = Model(lambda m, z: z @ m.p, p=complex_of(8, 3))
    z = torch.randn(4, 8, dtype=torch.complex64)
    compiled = tncompile.compile(model, (z,))
    assert "real and imaginary part" in str(compiled.report)
    found = compiled.run(torch.view_as_real(z))
    expected = torch.view_as_real(model(z)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert len(compiled.program.networks) == len(compiled.program.nodes) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: torch.fft.fft(x, dim=0).abs(), r"aten\.fft_fft\.default is not supported: the size of its"),
        (lambda m, x: (x * m.p).tanh().abs(), r"aten\.tanh\.default on complex numbers is not supported"),
    ],
)
def test_what_has_no_rule_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        tncompile.compile(Model(function, p=complex_of(8)), (X,))
