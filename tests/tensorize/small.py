"""Small models that the tests calibrate."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tncompile.frontend.importer import TracedModel, import_exported
from tncompile.frontend.onnx.importer import OnnxModel, import_onnx
from tncompile.frontend.trace import trace

nn = torch.nn


def imported(module: nn.Module, *inputs: torch.Tensor, **options: Any) -> TracedModel:
    """A traced module, in evaluation mode."""
    return import_exported(trace(module.eval(), inputs, **options))


def as_onnx(module: nn.Module, *inputs: torch.Tensor) -> OnnxModel:
    """The same by way of torch's exporter, with a dynamic batch."""
    buffer = io.BytesIO()
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    torch.onnx.export(module.eval(), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False).save(buffer)
    return import_onnx(buffer.getvalue())


def mlp(sizes: Sequence[int] = (48, 64, 40, 10), seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
