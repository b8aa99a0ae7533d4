"""The nodes of a graph that are to be quantized, as a model of their own for onnxruntime.quantization, and back.

The library takes whole models: it turns every Gemm into two nodes, forgets metadata, and cannot quantize inside an
``If`` with calibrated ranges. Of a *sheet*, which has the chosen nodes alone, all that comes back is wanted; the values
that it reads and is read for keep their names, so that what comes back takes the nodes' place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tncompile.ir import Array
from tncompile.runtime.quantized_graph import Constants, identity
from tncompile.runtime.quantized_names import Names
from tncompile.runtime.quantized_round import BLOCK, Eight, quiet

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

Ranges = Mapping[str, tuple[float, float]]
"""The least and the largest number seen in each value."""

_LINEAR = ["MatMul", "Gemm"]
_INT8_COMPUTE = 4  # of MatMulNBits: activations are rounded to eight bits, up to nine times as fast


@dataclass(frozen=True)
class Sheet:
    """A model of some nodes, whose values have names of its own: what the library calls a scale may be a value too.

    `names` has the nodes' own names by those.
    """

    model: ModelProto
    names: Mapping[str, str]

    @classmethod
    def of(cls, nodes: Sequence[NodeProto], shown: Collection[str], constants: Constants) -> Sheet:
        """Nodes of one graph, in order; values that others compute are its inputs, those in `shown` its outputs."""
        import onnx

        made = dict.fromkeys(name for node in nodes for name in node.output if name)
        read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
        ours = {name: f"v{number}." for number, name in enumerate([*read, *made])}

        def value(name: str) -> onnx.ValueInfoProto:
            dtype, shape = constants.types.get(name, (onnx.TensorProto.FLOAT, None))
            dims = None if shape is None else [size or None for size in shape]
            return onnx.helper.make_tensor_value_info(ours[name], dtype or onnx.TensorProto.FLOAT, dims)

        arrays = [(ours[name], constants.array(name)) for name in read if name in constants]
        graph = onnx.helper.make_graph(
            nodes,
            "sheet",
            [value(name) for name in read if name not in constants],
            [value(name) for name in made if name in shown],
            [onnx.numpy_helper.from_array(array, name) for name, array in arrays],
        )
        for node in graph.node:
            node.input[:] = [ours.get(name, name) for name in node.input]
            node.output[:] = [ours.get(name, name) for name in node.output]
        model = onnx.helper.make_model(graph, ir_version=10, opset_imports=constants.model.opset_import)
        return cls(model, {ours[name]: name for name in ours})

    def readable(self, name: str) -> str:
        """A name that the library made, with the model's own name in it."""
        found = re.match(r"v\d+\.", name)
        return self.names[found[0]] + name[found.end() :] if found else name


def dynamic(part: Sheet) -> ModelProto:
    """Eight bits, a scale for each channel; activations are quantized as they come. LSTMs have a sheet of their own."""
    import onnx

    with quiet():
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
        from onnxruntime.quantization.quant_utils import QuantizationMode

        model = part.model
        recurrent = any(node.op_type == "LSTM" for node in model.graph.node)
        options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
        types = ["MatMul", "LSTM"]  # a Gemm is made a MatMul and an Add
        quantizer = ONNXQuantizer(
            model, recurrent, False, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None, [],
            [], types, options,
        )  # fmt: skip
        matrices = {node.input[1] for node in quantizer.model.model.graph.node if node.op_type == "MatMul"}
        tensors = [t for t in quantizer.model.model.graph.initializer if t.name in matrices]
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
        quantizer.quantize_model()
    _by_column(quantizer.model.model, weights)
    return _result(quantizer)


def _by_column(model: ModelProto, weights: Mapping[str, Array]) -> None:
    """A scale for each column of each matrix, where the library has been asked for one of all.

    It takes a column at a time, which is slow, and of a stack of matrices has scales that ONNX Runtime does not take.
    """
    import onnx

    tensors = {t.name: t for t in model.graph.initializer}
    for name, weight in weights.items():
        eight = Eight.of(weight, [axis for axis in range(weight.ndim) if axis != weight.ndim - 2])
        scale = eight.scale if weight.ndim > 2 else eight.scale.reshape(-1)
        zero = np.zeros(scale.shape, np.int8)
        for suffix, array in (("quantized", eight.values), ("scale", scale), ("zero_point", zero)):
            tensor = tensors[f"{name}_{suffix}"]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def static(part: Sheet, ranges: Ranges) -> ModelProto:
    """Eight bits, a scale for each channel; activations by their ranges, those that a matrix product makes excepted."""
    with quiet():
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        seen = {
            ours: TensorData(lowest=np.float32(ranges[name][0]), highest=np.float32(ranges[name][1]))
            for ours, name in part.names.items()
            if name in ranges
        }
        model = part.model
        types = sorted({node.op_type for node in model.graph.node})
        options = {"OpTypesToExcludeOutputQuantization": _LINEAR}
        quantizer = QDQQuantizer(
            model, True, False, QuantType.QInt8, QuantType.QUInt8, TensorsData(CalibrationMethod.MinMax, seen), [], [],
            types, options,
        )  # fmt: skip
        quantizer.quantize_model()
        return _result(quantizer)


def four(part: Sheet) -> ModelProto:
    """Four bits in blocks, widened as the product is computed."""
    with quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as library
        from onnxruntime.quantization.onnx_model import ONNXModel

        model = part.model
        ONNXModel(model).replace_gemm_with_matmul()
        options = library.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=False, accuracy_level=_INT8_COMPUTE
        )
        quantizer = library.MatMulNBitsQuantizer(model, algo_config=options)
        quantizer.process()
        return _result(quantizer)


def _result(quantizer: Any) -> ModelProto:
    model: ModelProto = quantizer.model.model
    return model


def back(
    nodes: Sequence[NodeProto], part: Sheet, quantized: ModelProto, constants: Constants, names: Names
) -> dict[str, list[NodeProto]]:
    """What takes the place of each node of a sheet, by its identity; with its metadata, and names that are new."""
    graph = quantized.graph
    ours = {name: alias for alias, name in part.names.items()}
    renamed = {alias: name for alias, name in part.names.items() if name not in constants}
    for tensor in sorted(graph.initializer, key=lambda t: t.name):
        alias, tensor.name = tensor.name, part.readable(tensor.name)
        known = constants.initializers.get(part.names.get(alias, ""))
        renamed[alias] = tensor.name if _same(known, tensor) else names.initializer(tensor)
    producers = {name: node for node in graph.node for name in node.output if name}
    done: set[str] = set()
    result: dict[str, list[NodeProto]] = {}
    for node in nodes:
        found: list[NodeProto] = []
        for output in filter(None, node.output):
            _collect(ours[output], producers, done, found)
        for new in found:
            if not new.metadata_props:
                new.metadata_props.extend(node.metadata_props)
            if new.name != node.name:
                new.name = names.node(part.readable(new.name or node.name))
            renamed |= {o: names.value(part.readable(o)) for o in new.output if o and o not in renamed}
        result[identity(node)] = found
    for new in (new for found in result.values() for new in found):
        new.input[:] = [renamed.get(name, name) for name in new.input]
        new.output[:] = [renamed.get(name, name) for name in new.output]
    return result


def _same(known: TensorProto | None, tensor: TensorProto) -> bool:
    import onnx

    if known is None or known.data_type != tensor.data_type:
        return False
    old, new = (onnx.numpy_helper.to_array(t) for t in (known, tensor))
    return np.array_equal(old, new)


def _collect(name: str, producers: Mapping[str, NodeProto], done: set[str], found: list[NodeProto]) -> None:
    """The nodes that a value needs and nobody has taken yet, inputs first."""
    waiting = [(name, False)]
    while waiting:
        value, ready = waiting.pop()
        node = producers.get(value)
        if node is None:
            continue
        if ready:
            if identity(node) not in done:
                done.add(identity(node))
                found.append(node)
        elif identity(node) not in done:
            waiting.append((value, True))
            waiting.extend((read, False) for read in reversed(node.input))
