"""Weights rounded to fewer bits, as onnxruntime.quantization rounds them, and the bytes that they take then.

Eight bits are symmetric with one scale a channel. Four bits are blocks of 32 numbers that one output is made of, each
with a scale and a zero point. A *channel* is what one output is computed from: a column of ``x @ W``, a filter of a
convolution, a row of a table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.ir import Array

BITS = ("fp32", "fp16", "int8-weights", "int8", "int8-static", "int4-weights", "int4")
"""The ways to compute with a weight, from the most exact on.

- ``fp16``, ``int8-weights`` and ``int4-weights`` are smaller in the file alone: ONNX Runtime makes float32 of them when
  it loads it, and runs as fast as with ``fp32``.
- ``int8`` computes in eight bits, activations quantized as they come; of a table in eight bits, rows are widened.
- ``int8-static`` computes in eight bits, activations by ranges seen in calibration.
- ``int4`` keeps four bits in memory and widens them as it computes (MatMulNBits, GatherBlockQuantized).
"""

STORED = ("fp16", "int8-weights", "int4-weights")
"""Those that differ from ``fp32`` in the file alone."""

BLOCK = 32
"""How many numbers have a scale of their own in four bits."""

_LARGEST = {"fp16": float(np.finfo(np.float16).max)}


def check_bits(bits: str) -> None:
    """TNCompileError for a name that is none of `BITS`."""
    if bits not in BITS:
        raise TNCompileError(f"{bits!r} is no way to store a weight; it is one of {', '.join(BITS)}")


def simulated(weight: Array, bits: str, axis: int = -1) -> Array:
    """A weight as it counts once rounded: float32, of the same shape. TNCompileError for unknown bits.

    `axis` has the channels: the last one of ``x @ W[in, out]``, the first one of a convolution or of a table. What
    ``int8``, ``int8-static`` and ``int4`` do to activations is not simulated.
    """
    check_bits(bits)
    exact = np.asarray(weight, np.float32)
    if bits == "fp32" or exact.size == 0:
        return exact.copy()
    if bits == "fp16":
        return exact.astype(np.float16).astype(np.float32)
    if bits.startswith("int8"):
        return Eight.of(exact, (axis,)).array()
    moved = np.moveaxis(exact, axis, 0)
    rounded = Four.of(moved.reshape(moved.shape[0], -1)).array().reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(rounded, 0, axis))


def stored_bytes(shape: Sequence[int], bits: str, axis: int = -1) -> int:
    """Bytes that a float32 weight takes in a file, scales and zero points included. TNCompileError for unknown bits."""
    check_bits(bits)
    elements = math.prod(shape)
    if bits in ("fp32", "fp16") or elements == 0:
        return elements * (2 if bits == "fp16" else 4)
    channels = shape[axis] if shape else 1
    if bits.startswith("int8"):
        return elements + channels * (4 if bits == "int8-weights" else 5)
    blocks = -(-(elements // channels) // BLOCK)
    zero_points = blocks if bits == "int4-weights" else -(-blocks // 2)
    return channels * (blocks * (BLOCK // 2 + 4) + zero_points)


@dataclass(frozen=True)
class Eight:
    """``values * scale``: int8, and a scale that has size 1 along all axes but those of the channels."""

    values: Array
    scale: Array

    @classmethod
    def of(cls, weight: Array, axes: Sequence[int]) -> Eight:
        """Round a float32 weight whose channels lie along some axes."""
        kept = {axis % weight.ndim for axis in axes} if weight.ndim else set()
        others = tuple(axis for axis in range(weight.ndim) if axis not in kept)
        scale = (np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)).astype(np.float32)
        scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
        return cls(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale)

    def array(self) -> Array:
        """The rounded weight."""
        return np.asarray(self.values.astype(np.float32) * self.scale, np.float32)


@dataclass(frozen=True)
class Four:
    """``(values - zero) * scale`` for each block of a row.

    `packed` is uint8[rows, blocks, 16], two numbers a byte, the first in its low half; `scale` is float32 and `zero`
    uint8, both [rows, blocks]. Rows have `columns` numbers, what is beyond is padding.
    """

    packed: Array
    scale: Array
    zero: Array
    columns: int

    @classmethod
    def of(cls, matrix: Array) -> Four:
        """Round the blocks of the rows of a float32 matrix."""
        rows, columns = matrix.shape
        padded = np.pad(matrix, ((0, 0), (0, -columns % BLOCK)))
        with quiet():
            from onnxruntime.quantization import matmul_nbits_quantizer as library

            options = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False)
            rounder = library.DefaultWeightOnlyQuantizer(options)
            packed, scale, zero = rounder.qbits_block_quant(np.ascontiguousarray(padded.T))
        blocks = padded.shape[1] // BLOCK
        zeros = np.stack([zero & 15, zero >> 4], axis=-1).reshape(rows, -1)[:, :blocks]
        return cls(packed, scale.reshape(rows, blocks), zeros, columns)

    def array(self) -> Array:
        """The rounded matrix."""
        values = np.stack([self.packed & 15, self.packed >> 4], axis=-1).reshape(*self.scale.shape, BLOCK)
        exact = (values.astype(np.float32) - self.zero[..., None]) * self.scale[..., None]
        return np.asarray(exact.reshape(len(exact), -1)[:, : self.columns], np.float32)


def fits_half(weight: Array) -> bool:
    """Whether no number becomes infinite in float16."""
    return weight.size == 0 or bool(np.abs(weight).max() <= _LARGEST["fp16"])


@contextmanager
def quiet() -> Iterator[Any]:
    """The library logs what users of tncompile cannot change, and one of its modules sets up logging when imported."""
    root = logging.getLogger()
    before, level, handlers = logging.root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.setLevel(level)
        root.handlers[:] = handlers
