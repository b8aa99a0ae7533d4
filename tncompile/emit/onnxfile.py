"""An ONNX model ready to be written: one message of bytes, or a small one and the weights of a data file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.errors import TNCompileError, VerificationError, first_line
from tncompile.frontend.mapped import release_pages

EXTERNAL_FROM = 1_500_000_000
"""Bytes of weights from which on they go to a file of their own: one protobuf message holds at most 2 GB."""

_LEAST = 4096  # bytes; shapes and other small constants stay in the model, where shape inference sees them
_PAGE = 4096  # large weights begin a page, so that they can be mapped
_LINE = 64
_LOCATION = "model.onnx.data"


@dataclass(frozen=True)
class OnnxFile:
    """A model's message, and the weights that are not in it: each tensor and where it begins in the data file.

    Weights are made when they are written, one at a time, where they are permuted copies of the model's.
    """

    message: bytes
    weights: tuple[tuple[int, onnx_ir.TensorProtocol], ...] = ()

    @property
    def external(self) -> bool:
        """Whether there is a data file."""
        return bool(self.weights)

    @property
    def data(self) -> bytes:
        """The whole model in one message. TNCompileError where there is a data file."""
        if self.external:
            raise TNCompileError("the model's weights are in a file of their own; save it and read the files")
        return self.message

    @property
    def data_size(self) -> int:
        """Bytes of the data file."""
        return max((offset + tensor.nbytes for offset, tensor in self.weights), default=0)

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return len(self.message) + self.data_size

    def message_for(self, location: str) -> bytes:
        """The message for a data file of this name, in the same folder."""
        if not self.external:
            return self.message
        model = onnx.ModelProto.FromString(self.message)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        message: bytes = model.SerializeToString(deterministic=True)
        return message

    def write_data(self, file: BinaryIO) -> None:
        """Write the data file's contents."""
        for offset, tensor in self.weights:
            file.write(b"\0" * (offset - file.tell()))
            file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            release_pages()


def pack(model: onnx_ir.Model, external: bool = False, strict: bool = True) -> OnnxFile:
    """A model as a file, the same for the same model; its weights apart where `external` or where they are too many.

    VerificationError where `onnx.checker` refuses the model; where `strict`, also for shapes that are not those that
    onnx infers.
    """
    try:
        onnx_passes.CheckerPass(full_check=strict)(model)
    except (onnx_ir.passes.PassError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = first_line(error.__cause__ or error)
        raise VerificationError(f"the emitted model is not valid ONNX, a fault of tncompile: {reason}") from error
    if not external and weight_bytes(model) < EXTERNAL_FROM:
        return OnnxFile(_message(model))
    large = [v for v in model.graph.initializers.values() if v.const_value is not None]
    large = [v for v in large if v.const_value is not None and v.const_value.nbytes >= _LEAST]
    tensors = tuple(_placed(v.const_value for v in large if v.const_value is not None))
    try:
        for value, (offset, tensor) in zip(large, tensors, strict=True):
            value.const_value = onnx_ir.ExternalTensor(
                _LOCATION,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
        return OnnxFile(_message(model), tensors)
    finally:
        for value, (_, tensor) in zip(large, tensors, strict=True):
            value.const_value = tensor


def packed_size(model: onnx_ir.Model, external: bool = False) -> int:
    """Bytes that `pack` would make of a model, without its checks."""
    if external or weight_bytes(model) >= EXTERNAL_FROM:
        return pack(model, external).size
    return int(onnx_ir.to_proto(model).ByteSize())


def weight_bytes(model: onnx_ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _message(model: onnx_ir.Model) -> bytes:
    message: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return message


def _placed(tensors: Iterator[onnx_ir.TensorProtocol]) -> Iterator[tuple[int, onnx_ir.TensorProtocol]]:
    end = 0
    for tensor in tensors:
        step = _PAGE if tensor.nbytes >= 1 << 20 else _LINE
        offset = -(-end // step) * step
        yield offset, tensor
        end = offset + tensor.nbytes
