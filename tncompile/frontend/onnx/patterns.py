"""What old exporters wrote in small operators, as the one operator that ONNX has for it since.

ONNX Runtime finds these patterns too, but only where nothing else has taken their parts for networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.ir import Array

_GELU_SINCE = 20


def recognize(model: onnx_ir.Model) -> None:
    """Put LayerNormalization and Gelu in the place of their parts, in the main graph."""
    graph = model.graph
    found = False
    for node in list(graph):
        if node.domain == "" and node.op_type == "Sqrt":
            found |= _layer_norm(graph, node)
        elif node.domain == "" and node.op_type == "Erf":
            found |= _gelu(model, node)
    if found:
        onnx_passes.RemoveUnusedNodesPass()(model)


def _layer_norm(graph: onnx_ir.Graph, sqrt: onnx_ir.Node) -> bool:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps) * scale + bias`` along the last axis.

    Conditions: scale and bias are constant vectors as long as that axis, eps is a constant.
    """
    add = _made_by(sqrt.inputs[0], "Add")
    variance, epsilon = _split(add)
    mean_of_squares = _made_by(variance, "ReduceMean")
    square = _made_by(mean_of_squares.inputs[0], "Pow", "Mul") if mean_of_squares else None
    deviation = square.inputs[0] if square else None
    sub = _made_by(deviation, "Sub")
    mean = _made_by(sub.inputs[1], "ReduceMean") if sub else None
    if epsilon is None or square is None or sub is None or mean is None or mean_of_squares is None:
        return False
    squared = _number(square.inputs[1]) == 2 if square.op_type == "Pow" else square.inputs[1] is deviation
    if not squared or mean.inputs[0] is not sub.inputs[0] or not (_last(mean) and _last(mean_of_squares)):
        return False
    div = _only_reader(sqrt.outputs[0], "Div")
    scaled = _only_reader(div.outputs[0], "Mul") if div and div.inputs[0] is deviation else None
    _, scale = _vector(scaled)
    shifted = _only_reader(scaled.outputs[0], "Add") if scaled else None
    _, bias = _vector(shifted)
    if scale is None or bias is None or shifted is None or scale.const_value is None or bias.const_value is None:
        return False
    length = scale.const_value.size
    shape = sub.inputs[0].shape if sub.inputs[0] is not None else None
    if length != bias.const_value.size or length == 1 or (shape is not None and shape[-1] not in (None, length)):
        return False
    attributes = {"axis": -1, "epsilon": epsilon}
    whole = onnx_ir.node("LayerNormalization", [sub.inputs[0], scale, bias], attributes, name=shifted.name)
    _replace(graph, shifted, whole)
    return True


def _gelu(model: onnx_ir.Model, erf: onnx_ir.Node) -> bool:
    """``x * (1 + erf(x / sqrt(2))) / 2``, in whatever order its factors stand."""
    inner = _made_by(erf.inputs[0], "Div", "Mul")
    x, factor = _split(inner)
    wanted = math.sqrt(2) if inner is not None and inner.op_type == "Div" else math.sqrt(0.5)
    plus = _only_reader(erf.outputs[0], "Add")
    _, one = _split(plus)
    if x is None or factor is None or abs(factor - wanted) > 1e-4 or one != 1 or plus is None:
        return False
    first = _only_reader(plus.outputs[0], "Mul")
    if first is None:
        return False
    other = next((v for v in first.inputs if v is not plus.outputs[0]), None)
    half = _made_by(other, "Mul")
    last: onnx_ir.Node | None = first
    if other is x or _number(other) == 0.5:
        last = _only_reader(first.outputs[0], "Mul")
        rest = next((v for v in last.inputs if v is not first.outputs[0]), None) if last else None
        if not (_number(rest) == 0.5 if other is x else rest is x):
            return False
    elif half is None or _split(half) != (x, 0.5):
        return False
    if last is None:
        return False
    domain = "" if model.opset_imports[""] >= _GELU_SINCE else "com.microsoft"
    if domain:
        model.opset_imports.setdefault(domain, 1)
    _replace(model.graph, last, onnx_ir.node("Gelu", [x], domain=domain, name=last.name))
    return True


# ------------------------------------------------------------------------------------ matching


def _made_by(value: onnx_ir.Value | None, *kinds: str) -> onnx_ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def _only_reader(value: onnx_ir.Value, kind: str) -> onnx_ir.Node | None:
    """The node of a kind that alone reads a value which the model does not show."""
    readers = {id(use.node): use.node for use in value.uses()}
    (node,) = readers.values() if len(readers) == 1 else (None,)
    return node if node is not None and not value.is_graph_output() and _is(node, kind) else None


def _is(node: onnx_ir.Node, kind: str) -> bool:
    return node.domain == "" and node.op_type == kind


def _array(value: onnx_ir.Value | None) -> Array | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _number(value: onnx_ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = _array(value)
    return None if array is None or array.dtype.kind not in "fiu" else float(array.reshape(()))


def _pairs(node: onnx_ir.Node | None) -> Iterator[tuple[onnx_ir.Value | None, onnx_ir.Value | None]]:
    if node is not None and len(node.inputs) == 2:
        yield node.inputs[0], node.inputs[1]
        if node.op_type != "Div":
            yield node.inputs[1], node.inputs[0]


def _split(node: onnx_ir.Node | None) -> tuple[onnx_ir.Value | None, float | None]:
    """The value and the number that a node joins; None for both where it does not."""
    return next(((a, n) for a, b in _pairs(node) if (n := _number(b)) is not None), (None, None))


def _vector(node: onnx_ir.Node | None) -> tuple[onnx_ir.Value | None, onnx_ir.Value | None]:
    """The value and the constant vector that a node joins."""
    return next(
        ((a, b) for a, b in _pairs(node) if b and b.const_value is not None and len(b.const_value.shape) == 1),
        (None, None),
    )


def _last(mean: onnx_ir.Node) -> bool:
    """Whether a ReduceMean is along the last axis alone, which it keeps."""
    axes = _array(mean.inputs[1]) if len(mean.inputs) > 1 else None
    keep = mean.attributes.get("keepdims")
    return axes is not None and axes.tolist() == [-1] and (keep is None or keep.value == 1)


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    """Put a node in the place of another, whose value it takes the name and type of."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
