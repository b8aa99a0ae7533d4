"""The ways to make a pretrained model smaller that tncompile is measured against, one ONNX file each."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tncompile.errors import TNCompileError
from tncompile.frontend.trace import trace
from tncompile.ir import Array
from tncompile.runtime.rivals import export_plain, quiet

Arrays = dict[str, Array]

#: Of the parameters of each layer that singular values are kept for.
SHARES = (0.9, 0.75, 0.5, 0.33)

#: Rows that static quantization is calibrated on at once.
ROWS = 16

#: The smaller side of the smallest matrix that is decomposed: first layers and last ones that are smaller save nothing.
SMALLEST = 16

#: The operators that hold a model's weights, where the others are to stay in float.
WEIGHTED = ("Conv", "Gemm", "MatMul")


def export(module: nn.Module, inputs: Sequence[torch.Tensor], path: Path) -> None:
    """What torch.onnx.export writes, for any batch size. TNCompileError where that fixes the batch."""
    with quiet():
        exported = trace(module, inputs)
    if not exported.range_constraints:
        raise TNCompileError("traced for one batch size only")
    export_plain(exported, path)


# ------------------------------------------------------------------------------------ quantized


def quantize_dynamic(model: Path, path: Path) -> None:
    """int8 weights, by channel, and activations scaled at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _preprocessed(model) as source:
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)


def quantize_static(model: Path, path: Path, calibration: Arrays, operators: Sequence[str] = ()) -> None:
    """int8 weights, by channel, and uint8 activations scaled by what calibration saw.

    As the documentation has it for processors with VNNI. `operators` are the only ones to quantize; all where empty.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = rows(calibration, ROWS)

        def get_next(self) -> Arrays | None:
            return next(self.feeds, None)

    with _preprocessed(model) as source:
        quantize_static(
            source,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators) or None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


@contextlib.contextmanager
def _preprocessed(model: Path) -> Iterator[Path]:
    """The model with its shapes inferred and optimized, as both quantizers want it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder, "prepared.onnx")
        try:
            quant_pre_process(model, path)
        except Exception:  # where shapes cannot be inferred symbolically: the documentation's own way out
            quant_pre_process(model, path, skip_symbolic_shape=True)
        yield path


def rows(arrays: Arrays, size: int) -> Iterator[Arrays]:
    """So many rows of all arrays at a time; a rest is left out."""
    count = min(len(a) for a in arrays.values())
    for start in range(0, count - size + 1, size):
        yield {name: np.ascontiguousarray(a[start : start + size]) for name, a in arrays.items()}


# ------------------------------------------------------------------------------------ singular values


def low_rank(module: nn.Module, share: float) -> nn.Module:
    """Every linear layer and convolution as two, with this share of its parameters: its largest singular values.

    A convolution becomes one with few output channels, then a 1 x 1. What would not become smaller stays.
    """

    def split(layer: nn.Module) -> nn.Module | None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        matrix = weight.detach().flatten(1)
        rank = int(share * matrix.numel() / sum(matrix.shape))
        if not 0 < rank < min(matrix.shape):
            return None
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        root = s[:rank].sqrt()
        inner = (root[:, None] * v[:rank]).to(weight.dtype).reshape(rank, *weight.shape[1:])
        outer = (u[:, :rank] * root).to(weight.dtype)
        first, second = _pair(layer, rank)
        first.weight = nn.Parameter(inner)
        second.weight = nn.Parameter(outer.reshape(second.weight.shape))
        second.bias = layer.bias
        return nn.Sequential(first, second)

    return replaced(module, split)


def _pair(layer: nn.Module, rank: int) -> tuple[Any, Any]:
    """Two layers in the place of one, their weights to be set."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    first: Any = copy.deepcopy(layer)  # whatever subclass it is: padding may be its own
    first.bias, first.out_channels = None, rank
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[first.weight.ndim]
    return first, kind(rank, int(layer.out_channels), 1)  # type: ignore[arg-type]


def replaced(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy with each linear layer and full convolution replaced by what is made of it, if anything."""
    result = copy.deepcopy(module)
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if replaceable(child) and (new := make(child)) is not None:
                setattr(parent, name, new)
    return result.eval().requires_grad_(False)


def replaceable(layer: nn.Module) -> bool:
    """Whether a layer is worth it: linear, or a convolution of all channels with all, and not tiny."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.groups == 1 and min(layer.weight.flatten(1).shape) >= SMALLEST
    return isinstance(layer, nn.Linear) and min(layer.weight.shape) >= SMALLEST


# ------------------------------------------------------------------------------------ tensorly-torch


def tensorized(module: nn.Module, form: str, share: float, implementation: str) -> nn.Module:
    """Every linear layer and convolution as tensorly-torch decomposes it, with this share of its parameters.

    `form` is ``"tt"`` (of a matrix: block TT) or ``"tucker"``; `implementation` is the library's.
    """
    import tltorch

    def decompose(layer: nn.Module) -> nn.Module | None:
        options = {"rank": share, "implementation": implementation}
        if isinstance(layer, nn.Linear):
            return _checked(
                tltorch.FactorizedLinear.from_linear(
                    layer,
                    factorization="blocktt" if form == "tt" else form,
                    n_tensorized_modes=3 if min(layer.weight.shape) >= 64 else 2,
                    bias=layer.bias is not None,
                    **options,
                ),
                layer,
            )
        new = _checked(tltorch.FactorizedConv.from_conv(layer, factorization=form, **options), layer)
        padding = getattr(layer, "static_padding", None)  # of a subclass that pads by itself
        return new if new is None or padding is None else nn.Sequential(padding, new)

    return replaced(module, decompose)


def _checked(new: Any, layer: nn.Module) -> nn.Module | None:
    """The new layer where it is smaller."""
    assert isinstance(new, nn.Module)
    return new if parameters(new) < parameters(layer) else None


def parameters(module: nn.Module) -> int:
    """How many numbers a module holds."""
    return sum(p.numel() for p in module.parameters())


def share_for(module: nn.Module, size: int, dense: int) -> float:
    """The share of the parameters of each layer that makes a file of `dense` bytes one of `size`.

    TNCompileError where everything else is larger than that already.
    """
    layers = 4 * sum(parameters(m) for m in module.modules() if replaceable(m))
    share = 1 - (dense - size) / layers
    if share <= 0.01:
        raise TNCompileError(f"what is not in linear layers and convolutions takes more than {size / 1e6:.2f} MB")
    return min(share, 1.0)
