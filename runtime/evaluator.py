"""onnx's own evaluator, with operators that it has wrong, not in full, or too slow for real models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from tncompile.cost.search import einsum_path
from tncompile.ir import Array


def evaluator(model: onnx.ModelProto) -> Any:
    """An `onnx.reference.ReferenceEvaluator`.

    Einsums are contracted pair by pair; GatherElements is right for every shape, and BatchNormalization before
    operator set 14 is inference; convolutions and max pooling are PyTorch's, in the dtype of what they read: onnx's
    take 100 times the time, and unroll the whole image.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
    from onnx.reference.ops import op_conv, op_conv_transpose, op_max_pool

    theirs: Any = op_conv.Conv, op_conv_transpose.ConvTranspose, op_max_pool.MaxPool

    class Einsum(OpRun):
        def _run(self, *args: Array, equation: str = "") -> tuple[Array]:
            equation = equation.replace(" ", "")
            path = einsum_path(equation, [array.shape for array in args])
            tensors = [torch.from_numpy(np.array(array)) for array in args]
            return (torch.ops.aten.einsum.default(equation, tensors, path=path).numpy(),)

    class GatherElements(OpRun):
        def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
            axis %= data.ndim
            part = data[tuple(slice(None) if k == axis else slice(n) for k, n in enumerate(indices.shape))]
            return (np.take_along_axis(part, indices, axis),)

    class BatchNormalization(OpRun):
        def _run(
            self,
            x: Array,
            *parameters: Array,
            epsilon: float | None = None,
            momentum: float | None = None,
            training_mode: int | None = None,
            spatial: int | None = None,
            is_test: int | None = None,
        ) -> tuple[Array]:
            if training_mode or spatial == 0:
                raise NotImplementedError("BatchNormalization in training mode")
            scale, bias, mean, variance = (p.reshape(-1, *(1,) * (x.ndim - 2)) for p in parameters)
            return ((scale * (x - mean) / np.sqrt(variance + (epsilon or 1e-5)) + bias).astype(x.dtype),)

    class Conv(theirs[0]):  # type: ignore[misc]
        def _run(self, x: Array, w: Array, b: Array | None = None, **options: Any) -> tuple[Array]:
            windows = Windows.of(x, **(options | {"kernel_shape": w.shape[2:]}))
            return (windows.convolution(windows.padded(x), w, b, transposed=False).numpy(),)

    class ConvTranspose(theirs[1]):  # type: ignore[misc]
        def _run(self, x: Array, w: Array, b: Array | None = None, **options: Any) -> tuple[Array]:
            if (
                options.get("output_shape")
                or any(options.get("output_padding") or ())
                or str(options.get("auto_pad")).startswith("SAME")
            ):
                return (super()._run(x, w, b, **options)[0],)
            windows = Windows.of(x, **(options | {"kernel_shape": w.shape[2:]}))
            whole = windows.convolution(torch.from_numpy(np.array(x)), w, b, transposed=True)
            return (torch.nn.functional.pad(whole, [-size for size in windows.padding]).numpy(),)

    class MaxPool(theirs[2]):  # type: ignore[misc]
        def _run(self, x: Array, **options: Any) -> tuple[Array, ...]:
            same = str(options.get("auto_pad")).startswith("SAME") and max(options.get("dilations") or [1]) > 1
            if same or options.get("ceil_mode") or len(self.output) > 1 or x.ndim > 5 or x.dtype.kind != "f":
                return tuple(super()._run(x, **options))
            windows, kernel = Windows.of(x, **options), options["kernel_shape"]
            pool: Any = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[x.ndim - 3]
            return (pool(windows.padded(x, -np.inf), kernel, windows.strides, 0, windows.dilations).numpy(),)

    operators = [Einsum, GatherElements, BatchNormalization, Conv, ConvTranspose, MaxPool]
    return ReferenceEvaluator(model, new_ops=operators)


@dataclass(frozen=True)
class Windows:
    """Where a kernel is laid on an image; `padding` is before and after each axis, the last axis first."""

    strides: Sequence[int]
    dilations: Sequence[int]
    padding: Sequence[int]
    groups: int

    @staticmethod
    def of(
        x: Array,
        kernel_shape: Sequence[int],
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        auto_pad: str | None = None,
        group: int | None = None,
        **_: Any,
    ) -> Windows:
        """The windows that the attributes of an operator speak of."""
        axes, pads = range(x.ndim - 2), None if auto_pad == "VALID" else pads
        strides, dilations = strides or [1 for _ in axes], dilations or [1 for _ in axes]
        before = [pads[k] if pads else 0 for k in axes]
        after = [pads[k + len(axes)] if pads else 0 for k in axes]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel_shape, dilations, strict=True)]
            missing = [
                max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(x.shape[2:], strides, spans, strict=True)
            ]
            before = [(size + (auto_pad == "SAME_LOWER")) // 2 for size in missing]
            after = [size - first for size, first in zip(missing, before, strict=True)]
        return Windows(strides, dilations, [size for k in reversed(axes) for size in (before[k], after[k])], group or 1)

    def padded(self, x: Array, value: float = 0.0) -> torch.Tensor:
        """An image with its padding."""
        return torch.nn.functional.pad(torch.from_numpy(np.array(x)), [*self.padding], value=value)

    def convolution(self, x: torch.Tensor, w: Array, b: Array | None, transposed: bool) -> torch.Tensor:
        """A convolution without padding."""
        bias = None if b is None else torch.from_numpy(np.array(b))
        weight, zeros = torch.from_numpy(np.array(w)), [0 for _ in self.strides]
        return torch.convolution(x, weight, bias, self.strides, zeros, self.dilations, transposed, zeros, self.groups)
