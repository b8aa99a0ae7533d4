"""Nodes of an ONNX graph whose inputs are constant, computed at compile time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir

from tncompile.frontend.equation import NotMultilinear
from tncompile.ir import Array, Value

_KEEP = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"}
"""Left to ONNX Runtime, whose kernels read quantized weights as they are."""

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}

_FREE = 1 << 20
_LIMIT = 1 << 28
"""Bytes of a result that is computed in any case, and of the largest if it is not larger than twice its inputs."""


def may_be_computed(node: onnx_ir.Node) -> bool:
    """Whether a node's result follows from its inputs, and is wanted as numbers."""
    subgraph = any(
        a.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS) for a in node.attributes.values()
    )
    dropout = node.op_type == "Dropout" and len(node.inputs) > 2
    return node.domain == "" and node.op_type not in (_KEEP | _RANDOM) and not subgraph and not dropout


def fits(output: Value, inputs: Sequence[Array], op_type: str) -> bool:
    """Whether a result is small enough to be computed and stored."""
    given = sum(array.nbytes for array in inputs)
    if output.shape is None or not all(isinstance(size, int) for size in output.shape):
        # at most 64 times as much
        return op_type in ("NonZero", "Compress", "Unique") and given <= _FREE
    if output.dtype in ("tuple", "object"):
        return False
    size = math.prod(int(s) for s in output.shape) * np.dtype(output.dtype).itemsize
    return size <= _FREE or (size <= _LIMIT and size <= 2 * given)


def compute(node: onnx_ir.Node, arrays: Mapping[str, Array], opset: int) -> list[Array]:
    """A node's outputs by onnx's own reference. NotMultilinear where that cannot compute it."""
    from onnx.reference import ReferenceEvaluator

    proto = onnx_ir.to_proto(node)
    inputs = [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in dict.fromkeys(proto.input) if n]
    outputs = [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in proto.output if n]
    graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(None, {v.name: arrays[v.name] for v in inputs})
    except Exception as error:  # whatever an operator's reference raises
        raise NotMultilinear(f"{node.op_type} cannot be evaluated: {error}") from error
    if not all(isinstance(array, (np.ndarray, np.generic)) for array in found):
        raise NotMultilinear(f"{node.op_type} gives no tensor")
    return [np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array) for array in found]
