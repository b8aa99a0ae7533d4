"""What the pretrained cases are for, as one number each: higher is better, and 0.01 less is a drop of 1 %.

Each function takes ``run``, which is called as the module is, with tensors, and gives its output as a tensor or an
array. It is deterministic and judges on data that is not for calibration. ``tncompile tensorize --metric
benchmarks.pretrained_metrics:search_digits`` chooses by other data than those it is judged on.

A drop is the eager model's number less that of the model at hand. Accuracies and agreements are shares of 1. A pitch
error is counted in semitones, so that 0.01 is one cent: a fifth of what trained listeners can tell apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import pretrained_data as data

Run = Callable[..., Any]

#: Photos on which a network for ImageNet is compared with the original.
PHOTOS = 200
TONES = 96


def digits(run: Run, part: data.Part = "test") -> float:
    """The share of 9,000 handwritten digits that are read right."""
    images, labels = data.digits(part)
    return _share(_batches(run, 250, images).argmax(1) == labels)


def photos(run: Run, part: data.Part = "test") -> float:
    """The share of parts of photos to which the original gives the same of its 1,000 classes."""
    return _share(_batches(run, 20, _photos(part)).argmax(1) == _classes(part))


def sentiment(run: Run, part: data.Part = "test") -> float:
    """How often a linear probe on the embeddings, fitted to 600 film snippets, tells of 600 others who liked it."""
    from sklearn.linear_model import LogisticRegression

    _, train, test = data.snippets(part)
    (seen, liked), (unseen, truth) = (
        (_batches(run, 40, *data.tokens([text for text, _ in part])).double().numpy(), [y for _, y in part])
        for part in (train, test)
    )
    return float(LogisticRegression(max_iter=1000, C=10.0).fit(seen, liked).score(unseen, truth))


def pitch(run: Run, part: data.Part = "test") -> float:
    """Minus the mean error of the pitch of harmonic sounds, in semitones.

    The pitch is the mean of the nine bins around the strongest, weighted by their output, as the network's authors
    take it.
    """
    sounds, frequencies = data.tones(part, TONES)
    bins = _batches(run, 16, sounds).double()
    cents = 20.0 * torch.arange(bins.shape[1], dtype=torch.float64) + 1997.3794084376191
    near = (torch.arange(bins.shape[1]) - bins.argmax(1, keepdim=True)).abs() <= 4
    weights = bins * near
    found = (weights * cents).sum(1) / weights.sum(1)
    errors = (found - 1200 * torch.log2(frequencies / 10)).abs() / 100
    return -float(errors.mean())


def _batches(run: Run, size: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The outputs for all inputs, `size` rows at a time."""
    with torch.no_grad():
        parts = [torch.as_tensor(run(*rows)) for rows in zip(*(torch.split(x, size) for x in inputs), strict=True)]
    return torch.cat(parts)


def _share(right: torch.Tensor) -> float:
    return float(np.mean(right.numpy()))


@functools.cache
def _photos(part: data.Part) -> torch.Tensor:
    return data.photos(part, PHOTOS)


@functools.cache
def _classes(part: data.Part) -> torch.Tensor:
    """The classes that the original gives to the photos."""
    from benchmarks.models import CASES

    return _batches(CASES["efficientnet_lite0"].load().module, 20, _photos(part)).argmax(1)


# What a search may look at: the same numbers on data that the functions above do not see. Photos, digits and sounds are
# of the kind to calibrate on, snippets are others still.

search_digits = functools.partial(digits, part="calibration")
search_photos = functools.partial(photos, part="calibration")
search_sentiment = functools.partial(sentiment, part="calibration")
search_pitch = functools.partial(pitch, part="calibration")
