"""Small ONNX models and exact references for the tests of quantizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.helpers import nodes_of, session_of
from tncompile.ir import Array

LIMIT = 2.0**-24
"""The largest relative error of one rounding in float32."""


def node(kind: str, reads: str, output: str, network: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node of a network, with the metadata that the emitter writes; `reads` has names apart by blanks."""
    made = helper.make_node(kind, reads.split(), [output], f"{output}/{kind}", **attributes)
    if network:
        made.metadata_props.add(key="tncompile.network", value=network)
        made.metadata_props.add(key="tncompile.layer", value=f"layer of {network}")
    return made


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Array],
    x: Sequence[Any],
    y: Sequence[Any],
    dtype: int = onnx.TensorProto.FLOAT,
) -> bytes:
    """A model from `x` to `y` of given shapes; its weights in float32, sizes in int64."""
    arrays = {k: np.asarray(v, np.float32 if v.dtype.kind == "f" else np.int64) for k, v in weights.items()}
    inputs = [helper.make_tensor_value_info("x", dtype, x)]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, y)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, k) for k, a in arrays.items()])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    model.metadata_props.add(key="tncompile.program", value="program")
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def numbers(*shape: int, seed: int = 0) -> Array:
    """Normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model: bytes, **feeds: Array) -> Array:
    """The first output in float64."""
    return np.asarray(session_of(model, layouts=False).run(None, feeds)[0], np.float64)


def step(values: Array) -> float:
    """What lies between two neighbours where a range that includes 0 has 256 of them."""
    return float(max(values.max(), 0) - min(values.min(), 0)) / 255


def operators(model: bytes) -> list[str]:
    """Operators of all graphs as written."""
    return [n.op_type for n in nodes_of(onnx.load_model_from_string(model).graph)]
