"""Models that are small and awkward: each once went wrong, or is near something that did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import tncompile
from tncompile.errors import UnsupportedError
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.passes import Clean, Context, Fold, MergeCores, Pipeline


class Model(torch.nn.Module):
    """A function with parameters: `self.name` for each keyword."""

    def __init__(self, function: Callable[..., Any], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


functional = torch.nn.functional
AWKWARD: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {
    "a scale and a square layer on one operand": (
        Model(lambda m, x: x * m.s + functional.linear(x, m.w), s=normal(8), w=normal(8, 8)),
        (normal(3, 8),),
    ),
    "an operand and its transpose": (Model(lambda m, x: 0.5 * x + 0.25 * x.mT), (normal(3, 8, 8),)),
    "a parameter named like the input": (Model(lambda m, x: x @ m.x, x=normal(8, 4)), (normal(3, 8),)),
    "that parameter in an opaque node": (Model(lambda m, x: torch.maximum(x, m.x), x=normal(8)), (normal(3, 8),)),
    "a parameter named like an operation": (
        Model(lambda m, x: torch.relu(x) @ m.relu, relu=normal(8, 8)),
        (normal(3, 8),),
    ),
    "inputs that are outputs": (Model(lambda m, x: (x, x, x.relu())), (normal(3, 8),)),
    "weights that are outputs": (Model(lambda m, x: (x @ m.w, m.w, m.w), w=normal(8, 8)), (normal(3, 8),)),
    "a constant output": (
        Model(lambda m, x: (torch.relu(x @ m.a), m.a @ m.b), a=normal(8, 8), b=normal(8, 8)),
        (normal(3, 8),),
    ),
    "a dynamic diagonal": (Model(lambda m, x: torch.diagonal(x, dim1=1, dim2=2)), (normal(3, 8, 8),)),
    "a division by zero": (Model(lambda m, x: (x.abs() + 1) / 0.0), (normal(3, 8),)),
    "a batch of one": (Model(lambda m, x: x @ m.w, w=normal(8, 4)), (normal(1, 8),)),
    "cores that share no bond": (
        Model(lambda m, x: torch.einsum("bij,ik,jl->bkl", x, m.a, m.b), a=normal(8, 8), b=normal(8, 8)),
        (normal(3, 8, 8),),
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_compiles_and_computes_the_same(name: str) -> None:
    module, inputs = AWKWARD[name]
    compiled = tncompile.compile(module.eval(), inputs)
    assert [v.name for v in compiled.program.inputs] == [
        i.name for i in onnx.load_model_from_string(compiled.onnx).graph.input
    ]
    fresh = tuple(normal(5, *x.shape[1:]) for x in inputs)
    expected = module.double()(*(x.double() for x in fresh))
    found = compiled.run(*fresh)
    pairs = zip(expected, found.values(), strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for wanted, got in pairs:
        torch.testing.assert_close(torch.from_numpy(got).double(), wanted, rtol=1e-5, atol=1e-5)


ADAPTERS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "low rank": lambda m, x: x @ m.w + (x @ m.a) @ m.b,
    "two layers": lambda m, x: x @ m.c @ m.c.T + x @ (m.c + 1) @ (m.c.T - 1),
    "Kronecker": lambda m, x: x @ m.w + x @ torch.kron(m.k, m.a[:8] @ m.b[:, :8]),
    "Hadamard": lambda m, x: x @ (m.w + (m.a @ m.b) * (m.c @ m.c.T)),
    "magnitudes": lambda m, x: (y := x @ m.w + m.v) + (m.v - 1) * (y - m.v) + m.v * (x @ m.a @ m.b),
    "scaled factors": lambda m, x: x @ m.w + ((x @ m.a) * m.k[0]) @ m.b * m.v,
    "Cayley series": lambda m, x: (
        x @ (torch.eye(32) + 2 * (s := m.w - m.w.T) + 2 * (q := s @ s) + 2 * (t := q @ s) + t @ s) @ m.w
    ),
    "Fourier": lambda m, x: x @ m.w + x @ torch.fft.ifft2(m.w).real,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_become_one_with_their_layer(name: str) -> None:
    """As in LoRA, LoKr, LoHa, DoRA, VeRA, OFT and FourierFT."""
    weights = {"w": normal(32, 32) / 6, "a": normal(32, 4), "b": normal(4, 32), "c": normal(32, 16)}
    model = Model(ADAPTERS[name], **weights, k=normal(4, 4), v=normal(32)).eval()
    compiled = tncompile.compile(model, (normal(3, 32),))
    (node,) = onnx.load_model_from_string(compiled.onnx).graph.node
    assert node.op_type == ("Gemm" if name == "magnitudes" else "MatMul")
    x = normal(3, 32)
    wanted = model.double()(x.double())
    torch.testing.assert_close(torch.from_numpy(compiled.run(x)).double(), wanted, rtol=1e-5, atol=2e-5)


def test_a_spectrum_of_a_layer_is_no_quadratic_form() -> None:
    """|x W F|² by a core of the squares would be below zero now and then, and its root no number."""
    model = Model(lambda m, x: torch.fft.fft(x @ m.w).abs(), w=normal(16, 16)).eval()
    x = normal(3, 16)
    found = torch.from_numpy(tncompile.compile(model, (x,)).run(x)).double()
    torch.testing.assert_close(found, model.double()(x.double()), rtol=1e-4, atol=1e-4)


def test_a_float16_sum_that_does_not_fit_is_not_merged() -> None:
    large = Model(lambda m, x: x @ m.a + x @ m.b, a=torch.full((8, 8), 6e4), b=torch.full((8, 8), 6e4)).half()
    traced = import_exported(trace(large.eval(), (normal(3, 8).half(),)))
    program, _ = Pipeline((Clean(), Fold()), scheduled=False).run(traced.program, Context())
    assert [len(n.terms) for n in program.networks] == [2]


def test_a_float16_product_that_does_not_fit_is_not_merged() -> None:
    large = Model(lambda m, x: x @ m.a @ m.b, a=normal(64, 16) * 900, b=normal(16, 64) * 900).half()
    traced = import_exported(trace(large.eval(), (normal(3, 64).half(),)))
    for scheduled in (False, True):
        program, _ = Pipeline((Clean(), Fold(), MergeCores()), scheduled).run(traced.program, Context())
        assert all(np.isfinite(c.data).all() for n in program.networks for c in n.cores if c.data is not None)


def test_a_pipeline_without_order_is_completed() -> None:
    compiled = tncompile.compile(torch.nn.Linear(8, 4).eval(), normal(3, 8), passes=(Clean(),))
    assert [p.name for p in compiled.report.passes] == ["clean", "order"]


class ManyProducts(torch.nn.Module):
    """A weight that is a sum of more products than are put into what reads it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.ParameterList(torch.randn(6, 2, generator=generator) for _ in range(20))
        self.b = torch.nn.ParameterList(torch.randn(2, 5, generator=generator) for _ in range(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ sum(a @ b for a, b in zip(self.a, self.b, strict=True))


class ClosedRing(torch.nn.Module):
    """Rows of the diagonal of a core."""

    def __init__(self) -> None:
        super().__init__()
        self.core = torch.nn.Parameter(torch.randn(7, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("irr->i", self.core)[ids]


@pytest.mark.parametrize(
    ("module", "x"), [(ManyProducts(), torch.ones(3, 6)), (ClosedRing(), torch.tensor([1, 2, 5]))], ids=["sum", "ring"]
)
def test_weights_that_are_not_taken_apart(module: torch.nn.Module, x: torch.Tensor) -> None:
    assert tncompile.compile(module.eval(), (x,)).report.check.passed


@pytest.mark.parametrize(
    ("function", "called"),
    [
        (lambda x: torch.linalg.svd(x)[1], "aten.linalg_svd"),  # which torch decomposes to another one first
        (lambda x: torch.cdist(x, x), "aten.cdist"),
        (lambda x: x.kthvalue(2)[0], "aten.kthvalue"),
    ],
)
def test_what_the_exporter_lacks_is_named_with_its_line(function: Callable[..., Any], called: str) -> None:
    model = Model(lambda _, x: function((x * 2).relu()) + 1)
    with pytest.raises(UnsupportedError, match=rf"cannot translate {called}") as raised:
        tncompile.compile(model, (torch.randn(3, 4),), check=False)
    assert "test_awkward_models.py:" in str(raised.value) and "return self.function(" in str(raised.value)
