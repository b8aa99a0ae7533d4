"""Which of ONNX Runtime's kernels a convolution on a CPU runs in."""

from __future__ import annotations

BLOCK = 8
"""Channels that ONNX Runtime keeps side by side in a convolution, on any processor."""

_STRIP = 16  # such channels where vectors are 512 bits wide
_ALIGNED = 4  # channels of an image that is put in blocks come in multiples of so many
_PADDED = 1.35  # how many times as many products as there are may be computed, as channels are filled up to blocks
_FEW = 64  # products for each result from which a kernel over images of few channels is worth its stores


def takes_images(channels: int, strip: int) -> bool:
    """Whether a convolution of images, without groups, is computed without unfolding them: of channels in blocks, of a
    `strip` each, or of fewer channels that lie one after the other."""
    return channels < strip or channels % _ALIGNED == 0


def gains_as_image(groups: int, channels: int, filters: int, taps: int) -> bool:
    """Whether a convolution over one axis is faster over images of one row. `channels`, `filters`: those of a group.

    Kernels over one axis unfold their input and multiply image by image, group by group; those over images do not.
    Measured as pairs of both on one thread: up to 5 times as fast, as where few places are left, and not slower.
    """
    if groups > 1:
        return (channels == filters == 1) or (channels % _STRIP == filters % _STRIP == 0)
    if channels < _STRIP:
        return channels * taps >= _FEW and _filled(filters) <= _PADDED * filters
    return channels % _ALIGNED == 0 and _filled(channels) * _filled(filters) <= _PADDED * channels * filters


def _filled(channels: int) -> int:
    return -(-channels // _STRIP) * _STRIP
