"""Weights stored as less than they are: nodes of constants alone, which ONNX Runtime folds at load.

An initializer that was contracted at compile time (`tncompile.ir.Recipe`) may be replaced by its parts and the
MatMul, Transpose and Reshape nodes that contract them; one that is nearly all zeros, as a bank of filters or a pruned
layer, by its other numbers and a ScatterElements that puts them in their places. These nodes stand in the main graph,
whoever reads them, so that the session sees a plain initializer: it is prepacked, also where a branch of an ``If``
reads it. ONNX Runtime has no limit on the size of what it folds, but no kernel that folds float16: such parts are
contracted in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as onnx

from tncompile.emit.foldwriter import Writer
from tncompile.emit.graph import Arranged
from tncompile.emit.parts import Contracted, Foldable, Sparse
from tncompile.ir import Tensor

LOAD_LIMIT = 0.5
"""Seconds that folding may add to the load of a model, unless asked for."""

_WORTH = 1 / 8
"""Of the bytes that are made at load to have a weight, those that must be saved in the file, unless asked for."""


def foldable(model: onnx.Model) -> list[Foldable]:
    """The weights of a model that could be stored as less, those first that save most for their time."""
    found: dict[int, tuple[Tensor, list[onnx.Value]]] = {}
    others: list[onnx.Value] = []
    for value in model.graph.initializers.values():
        arranged = Arranged.of(value)
        if arranged is None:
            others.append(value)
        else:
            found.setdefault(id(arranged.core.data), (arranged.core, []))[1].append(value)
    result: list[Foldable] = []
    for core, values in found.values():
        contracted = Contracted.of(core, values)
        if contracted is not None:
            result.append(contracted)
        else:
            others += values
    result += [sparse for value in others if (sparse := Sparse.of(value)) is not None]
    return sorted(result, key=lambda c: c.seconds / c.saved)


def affordable(found: Sequence[Foldable], limit: float = LOAD_LIMIT) -> list[Foldable]:
    """As many of them, from the first on, as may be folded within `limit` seconds, but none that is hardly smaller for
    all that is made of it."""
    taken: list[Foldable] = []
    for weight in found:
        if weight.saved >= _WORTH * weight.made and sum(w.seconds for w in taken) + weight.seconds <= limit:
            taken.append(weight)
    return taken


def store_small(model: onnx.Model, chosen: Iterable[Foldable]) -> None:
    """Replace the initializers of some weights by less and the nodes that make them. Edits the model."""
    chosen = list(chosen)
    graph = model.graph
    parts = [part for weight in chosen for part in weight.parts for _ in weight.values]
    writer = Writer(model, parts, {str(value.name) for weight in chosen for value in weight.values})
    for weight in chosen:
        for value in weight.values:
            result = weight.write(value, writer)
            result.type, result.shape = value.type, value.shape
            onnx.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
            result.name = graph.initializers.pop(str(value.name)).name
    for value in writer.weights.values.values():
        if value.name not in graph.initializers:
            graph.register_initializer(value)
    graph.insert_before(graph[0], writer.nodes)
