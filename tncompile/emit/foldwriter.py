"""The nodes that make weights of their parts, and where those parts are in the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence

import numpy as np
import onnx_ir as onnx

from tncompile.emit.graph import GraphWriter, Groups, Laid, Weights
from tncompile.ir import Array, Tensor
from tncompile.ir.evaluate import merge

SMALL = 4096
"""Bytes that are not worth nodes: those of a fold and their names take about 1 kB in a file."""


class Writer:
    """Collects the nodes of folds and the initializers that they read. `parts` are the cores of all folds, one that
    several read as often. Initializers that the model has anyway are used again where a part or a shape equals them,
    but for those called `replaced`."""

    def __init__(self, model: onnx.Model, parts: Iterable[Tensor] = (), replaced: Container[str] = ()) -> None:
        graph = model.graph
        names = {str(v.name) for v in graph.inputs} | {*graph.initializers}
        names |= {str(o.name) for node in graph.all_nodes() for o in node.outputs}
        taken = names | {str(node.name) for node in graph.all_nodes()}
        prefixes = (f"fold.{k}/" if k else "fold/" for k in range(len(taken) + 1))
        self._prefix = next(p for p in prefixes if not any(name.startswith(p) for name in taken))
        self._folds = 0
        self.weights = Weights(taken=names)
        self.nodes: list[onnx.Node] = []
        parts = list(parts)
        self._uses = Counter(id(part.data) for part in parts)
        self._arranged: dict[tuple[int, tuple[tuple[int, ...], ...], str], onnx.Value] = {}
        shapes = {tuple(int(size) for size in part.shape) for part in parts}
        for name, value in graph.initializers.items():
            array = value.const_value
            if array is None or name in replaced:
                continue
            if array.size <= 8 or tuple(array.shape.numpy()) in shapes:
                self.weights.known(value, array.numpy())

    def part(self, core: Tensor, axes: Groups, dtype: str) -> onnx.Value:
        """A core of a fold in some axes, widened where `dtype` is a wider type than its own.

        The file holds it as it is wanted, but one that something else in the model reads too once, as it is, unless it
        is as small as the nodes that move it.
        """
        indices = {index.name: index for index in core.indices}  # one that stands twice is a diagonal
        sizes = {name: int(index.size) for name, index in indices.items()}
        order = [name for axis in axes for name in axis]
        whole = sorted(order) == sorted(index.name for index in core.indices)
        as_is = core.array().reshape([int(size) for size in core.shape])
        if whole and as_is.nbytes > SMALL and (self._uses[id(core.data)] > 1 or self.weights.holds(as_is)):
            return self._shared(core, as_is, axes, dtype)
        if whole:
            kept, array = [*sizes], as_is.reshape([*sizes.values()])
        else:  # not rounded to a narrower type: a sum may be larger than all of it
            kept = [name for name in sizes if name in order]
            array = merge([core], 0, [indices[name] for name in kept]).astype(dtype)
        shape = [math.prod(sizes[name] for name in axis) for axis in axes]
        return self._widened(self.weights.arranged(core.name, array, [kept.index(n) for n in order], shape), dtype)

    def _shared(self, core: Tensor, as_is: Array, axes: Groups, dtype: str) -> onnx.Value:
        names = [index.name for index in core.indices]
        key = id(core.data), tuple(tuple(map(names.index, axis)) for axis in axes), dtype
        if key not in self._arranged:
            value = self._widened(self.weights.add(core.name, as_is), dtype)
            write = GraphWriter("fold", {i.name: i.size for i in core.indices}, dtype, self.weights, (), {})
            laid = Laid(value, tuple(tuple(index.name for index in axis) for axis in core.axes))
            order = [name for axis in axes for name in axis]
            if order != names:  # in one step, as each keeps what it makes
                laid = write.regroup(laid, tuple((name,) for name in names))
                perm = [names.index(name) for name in order]
                laid = Laid(write.op("Transpose", [laid.value], perm=perm), tuple((name,) for name in order))
            self._arranged[key] = write.regroup(laid, axes).value
            self.append(write.nodes)
        return self._arranged[key]

    def _widened(self, value: onnx.Value, dtype: str) -> onnx.Value:
        target = onnx.DataType.from_numpy(np.dtype(dtype))
        if value.dtype == target:
            return value
        wide = onnx.node("Cast", [value], {"to": target})
        self.append([wide])
        return wide.outputs[0]

    def append(self, nodes: Sequence[onnx.Node]) -> None:
        """Add the nodes that make a weight. As they are gone once a session has started, they have short names: each is
        in the file twice, and in memory more often."""
        for number, node in enumerate(nodes):
            node.name = f"{self._prefix}{self._folds}/{number}"
            node.outputs[0].name = f"{node.name}:out"
        self.nodes += nodes
        self._folds += 1
