"""Inputs of the right kind and size. They serve timing: what the models make of them does not matter."""

from __future__ import annotations

import torch


def digits(count: int, side: int = 8) -> torch.Tensor:
    """Handwritten digits of scikit-learn, count x 1 x side x side, between 0 and 1."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:count] / 16, dtype=torch.float32)[:, None]
    if side == images.shape[-1]:
        return images
    return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def photos(count: int, side: int) -> torch.Tensor:
    """Square parts of the two photos of scikit-learn, count x 3 x side x side, of mean 0 and spread 1 per channel."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(image.copy()).permute(2, 0, 1).float() for image in load_sample_images().images]
    squares = [p[:, :400, 80:480] for p in pictures]
    chosen = torch.stack([squares[k % len(squares)] for k in range(count)])
    scaled = torch.nn.functional.interpolate(chosen, size=(side, side), mode="bilinear", align_corners=False)
    return (scaled - scaled.mean((0, 2, 3), keepdim=True)) / scaled.std((0, 2, 3), keepdim=True)


def sound(count: int, length: int) -> torch.Tensor:
    """Windows of a voice-like sum of harmonics with some noise, count x length, of mean 0 and spread 1 each."""
    time = torch.arange(count * length) / 16000
    tone = sum(torch.sin(2 * torch.pi * 140 * k * time) / k for k in range(1, 8))
    windows = (tone + 0.1 * torch.randn(count * length)).reshape(count, length)
    return (windows - windows.mean(1, keepdim=True)) / windows.std(1, keepdim=True)


SENTENCES = (
    "The train to the coast leaves at half past nine.",
    "Rain is expected in the north by the evening.",
    "He repaired the old clock with a single screw.",
    "Tensor networks factorize large arrays into small cores.",
    "Two cats were asleep on the warm roof.",
    "The committee postponed its decision until spring.",
    "Bread, olives and cheese were on the table.",
    "Nobody had expected the bridge to hold.",
)
