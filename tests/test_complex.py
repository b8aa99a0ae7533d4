"""Every operation on complex numbers that has a rule, as pairs of real ones, against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tncompile
from tncompile.errors import UnsupportedError
from tncompile.frontend.computable import computable
from tncompile.frontend.trace import trace
from tncompile.ir import Network

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(torch.complex(x, x * 2 - 1), self.w)


def written(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :2] = (x @ w)[..., :2]
    y[:, 3] = x.real[:, 0]
    return y


def written_new(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], 4, 4, dtype=torch.complex128)
    y[:, 0, :2] = (x @ w)[..., :2]
    y[:, -1] = 1j
    y[:, torch.tensor([1, 2])] = w[:2]
    return y


def sound(x: torch.Tensor) -> torch.Tensor:
    """Two rows of a signal."""
    return x.real.flatten()[:8].repeat(2, 4) * torch.arange(64.0).reshape(2, 32).sin()


CASES: dict[str, Function] = {
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [0])),
    "tensordot_of_more": lambda x, w: torch.tensordot(x.reshape(-1, 2, 2), w.reshape(2, 2, 4), dims=([-1, 1], [0, 1])),
    "written": written,
    "written_new": written_new,
    "full": lambda x, w: torch.full((4,), 1 + 2j, dtype=w.dtype) + torch.ones_like(x) * x + x.new_zeros(4),
    "full_like": lambda x, w: (
        torch.full_like(x, 2j) * x + torch.zeros(4, dtype=w.dtype) + torch.eye(4, dtype=w.dtype)[0]
    ),
    "real_like": lambda x, w: torch.full_like(x, 2.0, dtype=torch.float64) * x,
    "scaled": lambda x, w: (1j * x @ w * (2 + 1j)) / 2j,
    "real_scaled": lambda x, w: x.real * 1j + 1,
    "less": lambda x, w: torch.sub(1j - x, 1 - w[0], alpha=2),
    "divided": lambda x, w: 2 / w[0] + x / w[0],
    "power": lambda x, w: (x @ w) ** 3,
    "rfft2": lambda x, w: torch.fft.rfft2(x.real.reshape(-1, 2, 2)),
    "irfft2": lambda x, w: torch.fft.irfft2(x.reshape(-1, 2, 2), s=(3, 4), norm="ortho"),
    "fftn": lambda x, w: torch.fft.ifftn(torch.fft.fftn(x.reshape(-1, 2, 2), dim=(1, 2)) * w[0, 0], dim=(-2, -1)),
    "rfftn": lambda x, w: torch.fft.irfftn(torch.fft.rfftn(x.real.reshape(-1, 2, 2), dim=(2, 1)), s=(2, 2), dim=(2, 1)),
    "one_axis": lambda x, w: torch.fft.ifft(torch.fft.fft(x.reshape(-1, 2, 2), 3, dim=1), dim=1, norm="forward"),
    "ifft_of_real": lambda x, w: torch.fft.ifft2(w.real).sum() * x,
    "fftshift": lambda x, w: torch.fft.ifftshift(torch.fft.fftshift(x[:, :3] * w[0, :3], dim=-1), dim=-1),
    "stft": lambda x, w: torch.stft(sound(x), 8, 3, window=w.real.flatten()[:8], return_complex=True),
    "stft_one": lambda x, w: torch.stft(
        sound(x)[0], 7, window=torch.ones(7, dtype=torch.float64), center=False, normalized=True, return_complex=True
    ),
    "stft_narrow": lambda x, w: torch.stft(
        sound(x), 8, win_length=5, window=w.real.flatten()[:5], onesided=False, return_complex=True
    ),
    "stft_ones": lambda x, w: torch.stft(sound(x), 9, win_length=6, return_complex=True),
    "split": lambda x, w: torch.cat([*(x @ w).split([1, 3], 1)[::-1], *x.chunk(2, 1)], 1),
    "unbind": lambda x, w: torch.stack((x @ w).unbind(1)[::-1], -1),
    "moved": lambda x, w: nn.functional.pad((x @ w).flip(1).roll(1, 1), (1, 2)).repeat(1, 2),
    "diagonal": lambda x, w: x.reshape(-1, 2, 2).diagonal(dim1=1, dim2=2) * torch.trace(w),
    "chosen": lambda x, w: torch.where(x.real > 0, x, x @ w).masked_fill(x.real < -1, 1j)[:, [0, 2]],
    "vectors": lambda x, w: torch.outer(x[0], w[0]) * torch.vdot(x[0], w[1]) + torch.dot(w[0], w[1]),
    "adjoint": lambda x, w: x @ w.mH + torch.linalg.multi_dot([x, w, w]),
    "kron": lambda x, w: x.repeat(1, 4) @ torch.kron(w, w),
    "addmm": lambda x, w: torch.addmm(w[0], x, w, alpha=2, beta=3),
    "norm": lambda x, w: torch.linalg.vector_norm(x @ w, dim=1),
    "exp": lambda x, w: torch.exp(1j * (x @ w)),
    "implicit_einsum": lambda x, w: torch.einsum("bi,io", x, w),
}


@pytest.mark.parametrize("name", [*CASES])
def test_rule(name: str) -> None:
    model = Model(CASES[name]).eval()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = as_pairs(model, x)
    with torch.no_grad():
        expected = model(x)
    expected = torch.view_as_real(expected.resolve_conj()) if expected.is_complex() else expected
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def as_pairs(model: nn.Module, x: torch.Tensor) -> Any:
    """The result of the real graph, whose every value is real."""
    program = computable(trace(model, (x,))).exported
    for node in program.graph.nodes:
        values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        assert not any(isinstance(v, torch.Tensor) and v.is_complex() for v in values)
    store = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    args = [x if s.kind.name == "USER_INPUT" else store[s.target] for s in specs]
    with torch.no_grad():
        return torch.fx.Interpreter(program.graph_module).run(*args)[0]


def test_a_fourier_layer() -> None:
    """Its modes are written into zeros, as in a Fourier neural operator."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 4, dtype=torch.cfloat))

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            modes = torch.fft.rfft(u)
            kept = torch.zeros_like(modes)
            kept[..., :4] = torch.einsum("bix,iox->box", modes[..., :4], self.w)
            return torch.fft.irfft(kept, n=u.shape[-1])

    compiled = tncompile.compile(Layer().eval(), (torch.randn(2, 3, 12),), batch=(1, 4))
    assert compiled.report.check is not None
    assert compiled.report.check.passed


def test_a_circuit_is_one_network() -> None:
    class Circuit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Parameter(torch.randn(3, 2, 2, dtype=torch.cfloat))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.to(torch.cfloat).reshape(-1, 2, 2, 2)
            for k in range(3):
                state = torch.tensordot(state, self.gates[k], dims=([k + 1], [1])).movedim(-1, k + 1)
            return state.abs().flatten(1)

    compiled = tncompile.compile(Circuit().eval(), (torch.randn(2, 8),))
    networks = [n for n in compiled.stages["fold"].nodes if isinstance(n, Network) and n.cores]
    assert len(networks) == 1


def test_a_refusal_has_the_line() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)aten.angle.default on complex .*test_complex.py:\d+"):
        computable(trace(Model(lambda x, w: (x @ w).angle()), (torch.randn(3, 4).double(),)))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.fft.rfft(x.repeat(1, 2000)).abs(), "of 8,000 points; as products"),
        (lambda x: torch.stft(x.repeat(1, 2000), 5000, window=torch.ones(5000), return_complex=True).abs(), "of 5,000"),
        (lambda x: torch.stft(x, 4, window=torch.ones(4) * 1j, center=False, return_complex=True).abs(), "is complex"),
    ],
)
def test_what_is_not_supported_says_why(function: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    class Transform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    with pytest.raises(UnsupportedError, match=why):
        tncompile.compile(Transform().eval(), (torch.randn(2, 4),))
