"""One form for all ONNX models: no functions, constants as initializers, an operator set that we write too."""

from __future__ import annotations

import warnings

import onnx
import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.errors import LoadError, UnsupportedError
from tncompile.frontend.onnx.patterns import recognize

OPSET = 18
"""The oldest operator set that has what we write: reductions with axes as inputs, Shape of a part."""

_IR_VERSION = 8
_LIMIT = 2**31 - 2**20  # what one protobuf message holds


def prepare(proto: onnx.ModelProto, folder: str = "") -> onnx_ir.Model:
    """A checked model with its functions inlined, at operator set `OPSET` or the later one that it has.

    External data are mapped from `folder` into memory where they are read. LoadError for what cannot be read,
    UnsupportedError where the operator set cannot be upgraded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that say nothing
            model = onnx_ir.from_proto(proto)
        if folder:
            onnx_ir.external_data.set_base_dir(model.graph, folder)
        onnx_passes.InlinePass()(model)
    except Exception as error:  # whatever a strange model makes it raise
        raise LoadError(f"not a model that can be read ({_reason(error)})") from error
    opset = model.opset_imports.setdefault("", OPSET)
    if opset < OPSET:
        model = _upgraded(model, opset)
    onnx_passes.RemoveInitializersFromInputsPass()(model)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    recognize(model)
    return model


def _upgraded(model: onnx_ir.Model, opset: int) -> onnx_ir.Model:
    """The model at `OPSET` by onnx's converter; what that does not keep is taken from the original."""
    try:
        converted = onnx_ir.from_proto(onnx.version_converter.convert_version(whole(model), OPSET))
    except UnsupportedError:
        raise
    except Exception as error:  # RuntimeError, and what its C++ raises
        raise UnsupportedError(
            f"written for operator set {opset}, and onnx cannot convert it to {OPSET} ({_reason(error)}); "
            f"export it again for operator set {OPSET} or later"
        ) from error
    inputs = {value.name: value for value in converted.graph.inputs}
    converted.graph.inputs[:] = [inputs[v.name] for v in model.graph.inputs if v.name in inputs]
    for before, after in zip(
        (*model.graph.inputs, *model.graph.outputs), (*converted.graph.inputs, *converted.graph.outputs), strict=True
    ):
        after.type, after.shape = before.type, before.shape
    converted.graph.name, converted.graph.doc_string = model.graph.name, model.graph.doc_string
    converted.metadata_props.update(model.metadata_props)
    converted.domain, converted.model_version = model.domain, model.model_version
    converted.doc_string = model.doc_string
    return converted


def whole(model: onnx_ir.Model) -> onnx.ModelProto:
    """A model as one message, external data in it. UnsupportedError for over 2 GB."""
    size = sum(t.nbytes for value in model.graph.initializers.values() if (t := value.const_value) is not None)
    if size > _LIMIT:
        raise UnsupportedError(f"holds {size / 1e9:.1f} GB of weights; at most 2 GB are supported")
    copy = model.clone()
    embed(copy)
    return onnx_ir.to_proto(copy)


def embed(model: onnx_ir.Model) -> None:
    """Let a model hold its external data itself; they stay mapped into memory."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                value.const_value = _inside(value.const_value)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == onnx_ir.AttributeType.TENSOR:
                    tensor = attribute.as_tensor()
                    if isinstance(tensor, onnx_ir.ExternalTensor):
                        node.attributes[name] = onnx_ir.AttrTensor(name, _inside(tensor))


def _inside(tensor: onnx_ir.ExternalTensor) -> onnx_ir.TensorProtocol:
    return onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if lines and "Assertion" in lines[-1] else 0][:200] if lines else type(error).__name__
