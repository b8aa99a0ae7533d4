"""Run-time sizes."""

from __future__ import annotations

import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import Editor, shape_of


def sizes_from_inputs(graph: onnx_ir.Graph) -> int:
    """Sizes read off a value inside -> off an input of the model; the number of places.

        Shape(y, start=k, end=k+1)  ->  Shape(x, start=j, end=j+1)        where both axes are the same dimension

    A value that is read for its size alone need not be computed, and may become part of a fused node.

    Condition: the dimension has a name, which an axis of an input has too.
    """
    places = {d: (x, k) for x in reversed(graph.inputs) for k, d in enumerate(shape_of(x) or ()) if isinstance(d, str)}
    count = 0
    for node in [n for n in graph if match.is_op(n, "Shape")]:
        shape = shape_of(node.inputs[0])
        start, end = match.attribute(node, "start", 0), match.attribute(node, "end")
        if shape is None or end != start + 1 or start < 0 or node.inputs[0] in graph.inputs:
            continue
        place = places.get(shape[start])
        if place is None:
            continue
        value, axis = place
        size = Editor(graph).node("Shape", [value], node, (1,), start=axis, end=axis + 1)
        match.replace(node.outputs[0], size)
        count += 1
    return count
