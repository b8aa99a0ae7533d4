"""The ranges of a model's values on calibration data, those inside the branches of plans included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tncompile.errors import TNCompileError, first_line
from tncompile.ir import Array
from tncompile.runtime.quantized_graph import NETWORK
from tncompile.runtime.session import Session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_EDGES = ("ReduceMin", "ReduceMax")


def ranges(
    model: ModelProto, names: Sequence[str], calibration: Sequence[Mapping[str, Array]]
) -> dict[str, tuple[float, float]]:
    """The least and the largest number of each float32 value over all samples, which are inputs by name.

    TNCompileError where there are no samples, where the model does not run on one, or where a value is not finite.
    """
    if not calibration:
        raise TNCompileError("int8-static needs calibration data: give samples of the model's inputs, or choose int8")
    session = Session(_observed(model, names))
    found = dict.fromkeys(names, (np.inf, -np.inf))
    for number, sample in enumerate(calibration):
        try:
            seen = session.run(session.feeds(sample))
        except Exception as error:  # onnxruntime's own have no common base
            raise TNCompileError(
                f"calibration sample {number}: the model does not run on it ({first_line(error)}); give arrays of the "
                "names, types and shapes of its inputs"
            ) from error
        for position, name in enumerate(names):
            low, high = (float(seen[f"{edge}:{position}"]) for edge in _EDGES)
            if not np.isfinite([low, high]).all():
                raise TNCompileError(
                    f"calibration sample {number}: the value {name} is not finite, so it has no range; leave "
                    "such samples out, or choose int8"
                )
            found[name] = (min(found[name][0], low), max(found[name][1], high))
    return found


def _observed(model: ModelProto, names: Sequence[str]) -> bytes:
    """The model with the edges of some values as its only outputs."""
    import onnx

    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    graph = observed.graph
    nodes = _flat(graph.node)
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    for position, name in enumerate(names):
        for edge in _EDGES:
            output = f"{edge}:{position}"
            graph.node.append(onnx.helper.make_node(edge, [name], [output], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    data: bytes = observed.SerializeToString()
    return data


def _flat(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes with both branches of each plan in its place: they compute the same, at any batch size."""
    import onnx

    flat: list[NodeProto] = []
    for node in nodes:
        if node.op_type != "If" or not any(p.key == NETWORK for p in node.metadata_props):
            flat.append(node)
            continue
        for branch in (a.g for a in node.attribute):
            flat += _flat(branch.node)
        (result,) = branch.output
        flat.append(onnx.helper.make_node("Identity", [result.name], list(node.output)))
    return flat
