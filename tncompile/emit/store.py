"""Folded layers stored as the cores they were made of: nodes of constants alone, which ONNX Runtime folds at load.

An initializer that was contracted at compile time (`tncompile.ir.Recipe`) may be replaced by its parts and the
MatMul, Transpose and Reshape nodes that contract them. They stand in the main graph, whoever reads them, so that
the session sees a plain initializer: it is prepacked, also where a branch of an ``If`` reads it. ONNX Runtime has no
limit on the size of what it folds, but no kernel that folds float16: such parts are contracted in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from tncompile.emit.folds import fold_nodes, scheduled
from tncompile.emit.graph import Arranged, Weights
from tncompile.ir import Array, Tensor

LOAD_LIMIT = 0.5
"""Seconds that folding may add to the load of a model, unless asked for."""

_FLOPS = 10e9  # ONNX Runtime 1.31 folded at 40 to 110 GFLOP/s on two cores
_BANDWIDTH = 150e6  # and wrote results at 90 to 400 MB/s
_WORTH = 4096  # bytes a fold must save: its own nodes and names take about 1 kB in a file


@dataclass(frozen=True)
class Foldable:
    """One folded core that could be stored as its parts.

    `values` are the initializers that hold it, one for each arrangement; `saved` the bytes that its parts are
    smaller; `seconds` the predicted time to fold it at load.
    """

    core: Tensor
    values: tuple[onnx.Value, ...]
    saved: int
    seconds: float


def foldable(model: onnx.Model) -> list[Foldable]:
    """The folded cores of a model whose parts are smaller, those first that save most for their time."""
    found: dict[int, tuple[Tensor, list[onnx.Value]]] = {}
    for value in model.graph.initializers.values():
        arranged = Arranged.of(value)
        if arranged is not None:
            found.setdefault(id(arranged.core.data), (arranged.core, []))[1].append(value)
    result = []
    for core, values in found.values():
        assert core.recipe is not None and core.data is not None
        saved = len(values) * core.data.nbytes - core.recipe.elements * core.data.itemsize
        if saved > _WORTH * len(values):
            result.append(Foldable(core, tuple(values), saved, len(values) * _seconds(core)))
    return sorted(result, key=lambda c: c.seconds / c.saved)


def affordable(found: Sequence[Foldable], limit: float = LOAD_LIMIT) -> list[Foldable]:
    """As many of them, from the first on, as may be folded within `limit` seconds."""
    taken: list[Foldable] = []
    for core in found:
        if sum(c.seconds for c in taken) + core.seconds <= limit:
            taken.append(core)
    return taken


def store_as_cores(model: onnx.Model, chosen: Iterable[Foldable]) -> None:
    """Replace the initializers of some cores by their parts and the nodes that contract those. Edits the model."""
    chosen = list(chosen)
    graph = model.graph
    writer = _Writer(model, [part for c in chosen for part in _parts(c.core)])
    for core in chosen:
        for value in core.values:
            result = writer.fold(value)
            onnx.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
            graph.initializers.pop(str(value.name))
    for value in writer.weights.values.values():
        if value.name not in graph.initializers:
            graph.register_initializer(value)
    graph.insert_before(graph[0], writer.nodes)


def _parts(core: Tensor) -> Iterable[Tensor]:
    return core.recipe.term.tensors if core.recipe is not None else ()


class _Writer:
    """Writes fold nodes. Initializers that the model has anyway are used again where a part or a shape equals them."""

    def __init__(self, model: onnx.Model, parts: Collection[Tensor]) -> None:
        graph = model.graph
        names = {str(v.name) for v in graph.inputs} | {*graph.initializers}
        names |= {str(o.name) for node in graph.all_nodes() for o in node.outputs}
        self.taken = {str(node.name) for node in graph.all_nodes()}
        self.weights = Weights(taken=names)
        self.nodes: list[onnx.Node] = []
        shapes = {part.data.shape for part in parts if part.data is not None}
        for value in graph.initializers.values():
            array = value.const_value
            if array is not None and (array.size <= 8 or tuple(array.shape.numpy()) in shapes):
                self.weights.known(value, array.numpy())

    def fold(self, value: onnx.Value) -> onnx.Value:
        """The value that the fold of an arranged core ends in."""
        arranged = Arranged.of(value)
        assert arranged is not None and arranged.core.recipe is not None
        recipe, dtype = arranged.core.recipe, str(arranged.core.array().dtype)
        names = dict(zip((i.name for i in arranged.core.indices), recipe.kept, strict=True))
        axes = tuple(tuple(names[n] for n in group) for group in arranged.groups)
        computed = "float32" if dtype == "float16" else dtype
        parts = [self._part(part, computed) for part in recipe.term.tensors]
        nodes, result = fold_nodes(recipe.term, axes, parts, computed, self.weights)
        if computed != dtype:
            nodes.append(onnx.node("Cast", [result], {"to": onnx.DataType.from_numpy(np.dtype(dtype))}))
            result = nodes[-1].outputs[0]
        self._append(nodes, arranged.core.name)
        result.type, result.shape = value.type, value.shape
        return result

    def _part(self, part: Tensor, dtype: str) -> onnx.Value:
        """A part as it is, widened where the fold is computed in a wider type."""
        array: Array = part.array().reshape([int(s) for s in part.shape])
        value = self.weights.add(part.name, array)
        if str(array.dtype) == dtype:
            return value
        wide = onnx.node("Cast", [value], {"to": onnx.DataType.from_numpy(np.dtype(dtype))})
        self._append([wide], part.name)
        return wide.outputs[0]

    def _append(self, nodes: Sequence[onnx.Node], name: str) -> None:
        for node in nodes:
            stem = f"fold/{name}/{node.op_type}"
            numbered = (f"{stem}.{k}" if k else stem for k in range(len(self.taken) + 1))
            unique = next(n for n in numbered if n not in self.taken)
            self.taken.add(unique)
            node.name, node.outputs[0].name = unique, f"{unique}:out"
            node.metadata_props["tncompile.fold"] = name
            self.nodes.append(node)


def _seconds(core: Tensor) -> float:
    """Predicted seconds to fold a core at load."""
    assert core.recipe is not None and core.data is not None
    schedule = scheduled(core.recipe.term, core.recipe.kept)
    return schedule.flops / _FLOPS + (schedule.bytes + 4 * core.data.size) / _BANDWIDTH
