"""Trim, on any chain of slices, rolls, flips and zeros around a value, and in models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tncompile
from tests.helpers import apply_pass, program_of
from tncompile.ir import Opaque
from tncompile.passes import Trim

Step = Callable[[str, str, int, st.DataObject], tuple[list[str], int]]
"""The lines that make a value of another of some size, and its size."""


def _line(name: str, size: int, call: str) -> str:
    return f"  opaque {name}: float64[3, {size}] = aten.{call}"


def _slice(name: str, read: str, size: int, data: st.DataObject) -> tuple[list[str], int]:
    bound = st.none() | st.integers(-size - 1, size + 1)
    start, end, step = data.draw(bound), data.draw(bound), data.draw(st.integers(1, 3))
    made = len(range(size)[start:end:step])
    return [_line(name, made, f"slice.Tensor(%{read}, 1, {start}, {end}, {step})")], made


def _roll(name: str, read: str, size: int, data: st.DataObject) -> tuple[list[str], int]:
    shift = data.draw(st.integers(-2 * size, 2 * size))
    return [_line(name, size, f"roll.default(%{read}, [{shift}], [{data.draw(st.sampled_from((1, -1)))}])")], size


def _flip(name: str, read: str, size: int, data: st.DataObject) -> tuple[list[str], int]:
    return [_line(name, size, f"flip.default(%{read}, [1])")], size


def _pad(name: str, read: str, size: int, data: st.DataObject) -> tuple[list[str], int]:
    before, after = data.draw(st.integers(-2, 3)), data.draw(st.integers(-2, 3))
    value = data.draw(st.sampled_from((0.0, 0.0, 1.5)))  # what is not zero stays
    assume(size + min(before, 0) + min(after, 0) > 0)
    made = size + before + after
    return [_line(name, made, f"constant_pad_nd.default(%{read}, [{before}, {after}], {value})")], made


def _scatter(name: str, read: str, size: int, data: st.DataObject) -> tuple[list[str], int]:
    start, step = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    end = start + step * max(size - 1, 0) + (size > 0)
    made = end + data.draw(st.integers(0, 3))
    zeros = _line(f"{name}_0", made, f"new_zeros.default(%{read}, [3, {made}])")
    return [zeros, _line(name, made, f"slice_scatter.default(%{name}_0, %{read}, 1, {start}, {end}, {step})")], made


STEPS: tuple[Step, ...] = (_slice, _roll, _flip, _pad, _scatter)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_chain_between_two_layers(data: st.DataObject) -> None:
    first = size = data.draw(st.integers(1, 6))
    lines: list[str] = []
    read = "f"
    for number in range(data.draw(st.integers(1, 4))):
        new, size = data.draw(st.sampled_from(STEPS))(f"v{number}", read, size, data)
        lines += new
        read = f"v{number}"
    chain = "\n".join(lines)
    program = program_of(f"""
program
  input x: float64[3, 4]
  network f: float64[3, {first}]
    indices b=3, k={first}, i=4
    term
      0 operand x[b, i]
      1 core F[i, k]
    term
      0 core bias[k]
    -> f[b, k]
{chain}
  network y: float64[3, 2]
    indices b=3, o=2, k={size}
    term
      0 operand {read}[b, k]
      1 core G[k, o]
    -> y[b, o]
  output y = y
""")
    after, _ = apply_pass(Trim(), program, tolerance=1e-12)
    assert sum(a.size for a in after.arrays.values()) <= sum(a.size for a in program.arrays.values())
    assert len(after.nodes) <= len(program.nodes)


class Modes(torch.nn.Module):
    """A spectral layer: of a transform some modes are kept and mixed, the others are zeros when it is undone."""

    def __init__(self, modes: int, shifted: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 8, modes, dtype=torch.complex64, generator=generator))
        self.modes, self.shifted = modes, shifted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = torch.fft.fft(x)
        f = torch.fft.fftshift(f, dim=-1) if self.shifted else f
        kept = torch.zeros_like(f)
        kept[..., 3 : 3 + self.modes] = torch.einsum("bim,iom->bom", f[..., 3 : 3 + self.modes], self.weight)
        return torch.fft.ifft(torch.fft.ifftshift(kept, dim=-1) if self.shifted else kept).real


@pytest.mark.parametrize("shifted", [False, True])
def test_of_a_transform_only_the_modes_that_are_kept_are_computed(shifted: bool) -> None:
    model, x = Modes(5, shifted).eval(), torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(1))
    compiled = tncompile.compile(model, (x,))
    assert not any(isinstance(node, Opaque) for node in compiled.program.nodes)
    assert max(array.size for array in compiled.program.arrays.values()) < 128 * 128  # no whole transform
    torch.testing.assert_close(torch.from_numpy(compiled.run(x)), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_is_given_the_rows_that_are_read() -> None:
    """The last step of a sequence: the layer before it takes that step alone."""
    layer = torch.nn.Linear(8, 300)

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.tanh())[:, -1:]

    model, x = Last().eval(), torch.randn(3, 16, 8)
    compiled = tncompile.compile(model, (x,))
    assert [n.operands[0].shape[1] for n in compiled.program.networks] == [1]
    torch.testing.assert_close(torch.from_numpy(compiled.run(x)), model(x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_others_have_is_not_copied_for_an_order() -> None:
    """A roll of what a tied weight gives stays a roll; one of a weight of its own goes into it."""

    class Rolled(torch.nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(8, 8))
            self.b = self.a if tied else torch.nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.tanh() @ self.a).relu() + torch.roll(x @ self.b, 3, 1).relu()

    x = torch.randn(3, 8)
    for tied in (True, False):
        model = Rolled(tied).eval()
        compiled = tncompile.compile(model, (x,))
        rolls = [n for n in compiled.program.nodes if isinstance(n, Opaque) and "roll" in n.target]
        numbers = sum(array.size for array in compiled.program.arrays.values())
        assert (len(rolls), numbers) == ((1, 64) if tied else (0, 128))
        torch.testing.assert_close(torch.from_numpy(compiled.run(x)), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: ((x @ w) * x)[:, 5:5],  # nothing is left
        lambda x, w: torch.slice_scatter(x.new_zeros(x.shape[0], 12), x @ w, 1, 2, 10)[:, ::3].sin(),
        lambda x, w: torch.slice_scatter(x.double() * 0, (x @ w).double(), 1, 0, 8).cos(),
        lambda x, w: (y := x @ w)[:, 1:3] * y[:, 5:7].sum(),  # two slices of one value
        lambda x, w: torch.einsum("bi,bj->bij", x, x @ w)[:, 2].tanh(),
        lambda x, w: torch.nn.functional.pad((x @ w).flip(1), (1, -2)) @ torch.roll(w, 1, 0)[:7],
    ],
)
def test_models(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, self.w)

    model, x = Model().eval(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    found = torch.from_numpy(tncompile.compile(model, (x,)).run(x))
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-5)
