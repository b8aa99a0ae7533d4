"""Sums of terms of equal structure, and sums that are one dense layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tncompile
from tests.helpers import apply_pass, evaluate_program, feeds_for, program_of, reasons
from tncompile.passes import Context, Order
from tncompile.passes.blockwise import one_term

BLOCKS = """program
  input x: float32[batch, 20]
  network y: float32[batch, 30]
    indices batch=batch, i=4, j=5, o=5, p=6, r=3, s=3
    term
      0 operand x[batch, (i j)]
      1 core a1[i, o, r]
      2 core b1[r, j, p]
      order ((0 1) 2)
    term
      0 operand x[batch, (i j)]
      1 core a2[i, o, s]
      2 core b2[s, j, p]
      order ((0 1) 2)
    -> y[batch, (o p)]
  output y = y
"""


def test_alike_terms_are_one_with_an_index_more() -> None:
    program = program_of(BLOCKS)
    (network,) = program.networks
    term = one_term(network, network.terms)
    assert term is not None
    assert [tuple(i.name for i in t.indices) for t in term.tensors] == [
        ("batch", "i", "j"),
        ("block", "i", "o", "r"),
        ("block", "r", "j", "p"),
    ]
    stacked = replace(program, nodes=(replace(network, terms=(term,)),))
    feeds = feeds_for(program)
    np.testing.assert_allclose(
        evaluate_program(stacked, feeds)["y"], evaluate_program(program, feeds)["y"], rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("core a2[i, o, s]", "core a2[o, i, s]"),  # modes in another order
        ("r=3, s=3", "r=3, s=2"),  # another rank
        ("      order ((0 1) 2)\n    -> y", "      order ((0 2) 1)\n    -> y"),  # traced in another order
    ],
)
def test_other_terms_are_not(old: str, new: str) -> None:
    (network,) = program_of(BLOCKS.replace(old, new)).networks
    assert one_term(network, network.terms) is None


class Blocks(nn.Module):
    """A sum of CP terms, as block-term layers are."""

    def __init__(self, blocks: int, modes: tuple[int, int], out: tuple[int, int], rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = (*modes, *out)
        self.cores = nn.ParameterList(
            torch.randn(size, rank, generator=generator) for _ in range(blocks) for size in sizes
        )
        self.blocks, self.modes = blocks, modes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, self.modes)
        parts = [
            torch.einsum("bij,ir,jr,or,pr->bop", x, *self.cores[4 * k : 4 * k + 4]).flatten(1)
            for k in range(self.blocks)
        ]
        return sum(parts[1:], parts[0])


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 3), st.integers(1, 4), st.sampled_from([(2, 3), (4, 5)]), st.sampled_from([(3, 2), (5, 4)]))
def test_block_terms_compute_what_they_did(
    blocks: int, rank: int, modes: tuple[int, int], out: tuple[int, int]
) -> None:
    module = Blocks(blocks, modes, out, rank).eval()
    x = torch.randn(3, modes[0] * modes[1], generator=torch.Generator().manual_seed(1))
    model = tncompile.compile(module, (x,), check=False)
    expected = module.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(model.run(x), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_choice_is_by_time_and_said() -> None:
    program = program_of(BLOCKS)
    after, changes = apply_pass(Order(), program, tolerance=1e-5, context=Context(batches=(1, 64)))
    (network,) = after.networks
    assert len(network.terms) == 1
    assert any("2 terms are one" in line for line in reasons(changes))


def test_convolutions_of_one_image_are_one_convolution() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    module = Sum().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = tncompile.compile(module, (x,), check=False)
    (network,) = model.program.networks
    assert [len(t.tensors) for t in network.terms if not t.is_constant] == [2]
    expected = module.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(model.run(x), expected, rtol=0, atol=1e-5)
