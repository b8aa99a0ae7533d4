"""Rules for Fourier transforms: along each axis one product with the matrix of the transform."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch

from tncompile.frontend.pairs.builder import Builder, Node, NoRule, rule

_aten = torch.ops.aten
LONGEST_TRANSFORM = 4096
"""A Fourier transform is a product with its matrix, which for more points would be too large."""

_ALONG_ONE = (_aten.fft_fft.default, _aten.fft_ifft.default, _aten.fft_rfft.default, _aten.fft_irfft.default)
#: transforms along several axes: what is done along the last of them, and along the others
_LAST_AND_OTHERS: dict[str, tuple[Any, Any]] = {
    "fft": (_aten.fft_fft.default, _aten.fft_fft.default),
    "ifft": (_aten.fft_ifft.default, _aten.fft_ifft.default),
    "rfft": (_aten.fft_rfft.default, _aten.fft_fft.default),
    "irfft": (_aten.fft_irfft.default, _aten.fft_ifft.default),
}


@rule(*_ALONG_ONE)
def _one(b: Builder, x: Node, n: int | None = None, dim: int = -1, norm: str | None = None) -> Node | None:
    return _along(b, b.node.target, b.pairs.get(x, x), x in b.pairs, dim % b.value(x).ndim, n, norm)


@rule(_aten.fft_fft2.default, _aten.fft_ifft2.default, _aten.fft_rfft2.default, _aten.fft_irfft2.default)
def _two(
    b: Builder, x: Node, s: Sequence[int] | None = None, dim: Sequence[int] = (-2, -1), norm: str | None = None
) -> Node | None:
    return _several(b, x, s, dim, norm)


@rule(_aten.fft_fftn.default, _aten.fft_ifftn.default, _aten.fft_rfftn.default, _aten.fft_irfftn.default)
def _several(
    b: Builder,
    x: Node,
    s: Sequence[int] | None = None,
    dim: Sequence[int] | None = None,
    norm: str | None = None,
) -> Node | None:
    """One axis after the other: of a real tensor the last first, to a real one the last at the end."""
    ndim = b.value(x).ndim
    if dim is None:
        dim = range(ndim) if s is None else range(-len(s), 0)
    axes = [d % ndim for d in dim]
    sizes = [None] * len(axes) if s is None else [None if n == -1 else n for n in s]
    function: Any = b.node.target
    kind = function._schema.name.rpartition("fft_")[2].rstrip("n2")
    last, others = _LAST_AND_OTHERS[kind]
    steps = [(others, axis, n) for axis, n in zip(axes[:-1], sizes[:-1], strict=True)]
    steps.insert(len(steps) if kind == "irfft" else 0, (last, axes[-1], sizes[-1]))
    value: Node | None = b.pairs.get(x, x)
    paired = x in b.pairs
    for step, axis, n in steps:
        if value is None:
            return None
        value, paired = _along(b, step, value, paired, axis, n, norm), step is not _aten.fft_irfft.default
    return value


def _along(
    b: Builder, function: Any, value: Node, paired: bool, axis: int, n: int | None, norm: str | None
) -> Node | None:
    """One axis of a real tensor, or of a pair, transformed; None where the axis is too long, or of no fixed size."""
    example = value.meta["val"]
    size, ndim = example.shape[axis], example.ndim - paired
    if not isinstance(size, int) or not (n is None or isinstance(n, int)):
        raise NoRule("the size of its axis is dynamic; trace it with a fixed one")
    _is_short(max(size, n or 0))
    each = torch.eye(size, dtype=torch.complex128 if paired else torch.float64)
    matrix = function(each, n, -1, norm)  # [from, to]
    if paired:  # what i makes of it too
        matrix = torch.stack([matrix, function(each * 1j, n, -1, norm)], 1)
    becomes_pair = matrix.is_complex()
    if becomes_pair:
        matrix = torch.view_as_real(matrix.resolve_conj())  # an inverse of real numbers is a conjugate view
    kind = function._schema.name.rpartition("::")[2]
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    name = f"{kind}_{size}_{n or 'all'}_{norm or 'none'}_{len(matrix.shape)}"
    weight = b.constant(name, matrix.to(dtype).contiguous())
    axes = string.ascii_lowercase[:ndim]
    before, after = axes + "Z" * paired, axes.replace(axes[axis], "Y") + "X" * becomes_pair
    table = axes[axis] + "Z" * paired + "Y" + "X" * becomes_pair
    return b.call(_aten.einsum.default, f"{before},{table}->{after}", [value, weight])


def _is_short(points: int) -> None:
    if points > LONGEST_TRANSFORM:
        raise NoRule(f"of {points:,} points; as products, transforms have up to {LONGEST_TRANSFORM:,}")


@rule(_aten.fft_fftshift.default, _aten.fft_ifftshift.default)
def _shifted(b: Builder, x: Node, dim: Sequence[int] | None = None) -> Node | None:
    """A roll by half of each axis."""
    shape = b.value(x).shape
    axes = range(len(shape)) if dim is None else [d % len(shape) for d in dim]
    forward = b.node.target is _aten.fft_fftshift.default
    shifts = []
    for axis in axes:
        if not isinstance(shape[axis], int):
            return None
        shifts.append(shape[axis] // 2 if forward else (shape[axis] + 1) // 2)
    return b.call(_aten.roll.default, b.pairs[x], shifts, [*axes])


@rule(_aten.stft.default)
def _frames(
    b: Builder,
    x: Node,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Node | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Node | None:
    """A transform of each frame of a real signal (time) or (batch, time) is a convolution with the matrix, whose rows
    are multiplied by the window: as torch.stft gives it, (batch, frequency, frame)."""
    if x in b.pairs or window in b.pairs:
        raise NoRule("its signal or its window is complex")
    _is_short(n_fft)
    if align_to_window:
        return None
    width = win_length or n_fft
    turns = torch.outer(torch.arange(n_fft if onesided is False else n_fft // 2 + 1), torch.arange(n_fft)) % n_fft
    angles = -2 * torch.pi * turns.double() / n_fft
    matrix = torch.stack([angles.cos(), angles.sin()], 1) / (math.sqrt(n_fft) if normalized else 1)
    if window is None:  # as many ones, in the middle of the frame
        outside = (torch.arange(n_fft) - (n_fft - width) // 2).clamp(-1, width)
        matrix = matrix * ((outside >= 0) & (outside < width))
    name = f"stft_{n_fft}_{len(matrix)}_{width if window is None else 'window'}_{bool(normalized)}"
    kernel = b.constant(name, matrix.flatten(0, 1)[:, None].to(b.value(x).dtype).contiguous())
    if window is not None:
        before = (n_fft - width) // 2
        padded = b.call(_aten.constant_pad_nd.default, window, [before, n_fft - width - before])
        kernel = b.call(_aten.mul.Tensor, kernel, padded)
    batched = b.value(x).ndim == 2
    signal = b.call(_aten.unsqueeze.default, x, 1 if batched else 0)
    signal = signal if batched else b.call(_aten.unsqueeze.default, signal, 0)
    found = b.call(_aten.conv1d.default, signal, kernel, None, [hop_length or n_fft // 4])
    found = b.call(_aten.unflatten.int, found, 1, [len(matrix), 2])
    found = b.call(_aten.permute.default, found, [0, 1, 3, 2])
    return found if batched else b.call(_aten.squeeze.dim, found, 0)
