"""What a weight may be stored as, and the nodes of constants alone that make it of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from tncompile.emit.folds import fold_nodes, scheduled
from tncompile.emit.graph import Arranged, Weights
from tncompile.ir import Array, Tensor

_FLOPS = 10e9  # ONNX Runtime 1.31 folded at 40 to 110 GFLOP/s on two cores
_BANDWIDTH = 150e6  # and wrote results at 90 to 400 MB/s
_WORTH = 4096  # bytes a fold must save: its own nodes and names take about 1 kB in a file
_SPARSE = 0.5  # of a weight's bytes, at most, that are stored of a sparse one: two more of its size are made at load
_SAMPLE = 1024  # numbers that are looked at first, as most weights have no zeros
_PLACE = np.dtype(np.int32)
_FLOATS = (onnx.DataType.FLOAT, onnx.DataType.DOUBLE, onnx.DataType.FLOAT16)


@dataclass(frozen=True)
class Foldable(ABC):
    """A weight that could be stored as less.

    `values` are the initializers that hold it, one for each arrangement; `saved` the bytes that are saved then;
    `seconds` the predicted time to make it at load.
    """

    name: str
    values: tuple[onnx.Value, ...]
    saved: int
    seconds: float

    @property
    def parts(self) -> Iterable[Array]:
        """Arrays that may be in the model anyway."""
        return ()

    @abstractmethod
    def write(self, value: onnx.Value, writer: Writer) -> onnx.Value:
        """The value in which the nodes end that make one of `values`."""


@dataclass(frozen=True)
class Contracted(Foldable):
    """A folded core, stored as the cores that it was made of."""

    core: Tensor

    @staticmethod
    def of(core: Tensor, values: Sequence[onnx.Value]) -> Contracted | None:
        """A core that some initializers hold; None where its parts are not smaller."""
        assert core.recipe is not None and core.data is not None
        saved = len(values) * core.data.nbytes - core.recipe.elements * core.data.itemsize
        if saved <= _WORTH * len(values):
            return None
        schedule = scheduled(core.recipe.term, core.recipe.kept)
        seconds = schedule.flops / _FLOPS + (schedule.bytes + 4 * core.data.size) / _BANDWIDTH
        return Contracted(core.name, tuple(values), saved, len(values) * seconds, core)

    @property
    def parts(self) -> Iterable[Array]:
        """Arrays that may be in the model anyway."""
        assert self.core.recipe is not None
        return [part.data for part in self.core.recipe.term.tensors if part.data is not None]

    def write(self, value: onnx.Value, writer: Writer) -> onnx.Value:
        """The value in which the nodes end that make one of `values`."""
        arranged = Arranged.of(value)
        assert arranged is not None and arranged.core.recipe is not None
        recipe, dtype = arranged.core.recipe, str(arranged.core.array().dtype)
        names = dict(zip((i.name for i in arranged.core.indices), recipe.kept, strict=True))
        axes = tuple(tuple(names[n] for n in group) for group in arranged.groups)
        computed = "float32" if dtype == "float16" else dtype
        parts = [self._part(part, computed, writer) for part in recipe.term.tensors]
        nodes, result = fold_nodes(recipe.term, axes, parts, computed, writer.weights)
        if computed != dtype:
            nodes.append(onnx.node("Cast", [result], {"to": onnx.DataType.from_numpy(np.dtype(dtype))}))
            result = nodes[-1].outputs[0]
        writer.append(nodes, arranged.core.name)
        return result

    @staticmethod
    def _part(part: Tensor, dtype: str, writer: Writer) -> onnx.Value:
        """A part as it is, widened where the fold is computed in a wider type."""
        array: Array = part.array().reshape([int(s) for s in part.shape])
        value = writer.weights.add(part.name, array)
        if str(array.dtype) == dtype:
            return value
        wide = onnx.node("Cast", [value], {"to": onnx.DataType.from_numpy(np.dtype(dtype))})
        writer.append([wide], part.name)
        return wide.outputs[0]


@dataclass(frozen=True)
class Sparse(Foldable):
    """A weight that is nearly all zeros, stored as its other numbers and their places in row-major order."""

    @staticmethod
    def of(value: onnx.Value) -> Sparse | None:
        """An initializer without its zeros; None where it is not so much smaller."""
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or value.is_graph_input() or value.is_graph_output():
            return None
        if tensor.nbytes <= _WORTH or tensor.size > np.iinfo(_PLACE).max:
            return None
        flat: Array = tensor.numpy().reshape(-1)
        each = flat.itemsize + _PLACE.itemsize
        most = _SPARSE * flat.nbytes / each
        sample = flat[:: max(1, flat.size // _SAMPLE)]
        if np.count_nonzero(sample) * flat.size > 2 * most * sample.size:
            return None
        count = int(np.count_nonzero(flat))
        saved = flat.nbytes - each * count
        if count > most or saved <= _WORTH:
            return None
        return Sparse(str(value.name), (value,), saved, 3 * flat.nbytes / _BANDWIDTH)

    def write(self, value: onnx.Value, writer: Writer) -> onnx.Value:
        """The value in which the nodes end that make one of `values`."""
        assert value.const_value is not None
        array: Array = value.const_value.numpy()
        flat = array.reshape(-1)
        (found,) = np.nonzero(flat)
        zero = onnx.tensor(np.zeros(1, array.dtype))

        def add(what: str, numbers: Array) -> onnx.Value:
            return writer.weights.add(f"{self.name}.{what}", numbers)

        length, shape = add("size", np.array([flat.size])), add("shape", np.array(array.shape))
        places, numbers = add("places", found.astype(_PLACE)), add("numbers", flat[found])
        zeros = onnx.node("ConstantOfShape", [length], {"value": zero})
        filled = onnx.node("ScatterElements", [zeros.outputs[0], places, numbers], {"axis": 0})
        nodes = [zeros, filled, onnx.node("Reshape", [filled.outputs[0], shape])]
        writer.append(nodes, self.name)
        return nodes[-1].outputs[0]


class Writer:
    """Names the nodes of folds. Initializers that the model has anyway are used again where a part or a shape equals
    them."""

    def __init__(self, model: onnx.Model, parts: Iterable[Array]) -> None:
        graph = model.graph
        names = {str(v.name) for v in graph.inputs} | {*graph.initializers}
        names |= {str(o.name) for node in graph.all_nodes() for o in node.outputs}
        self.taken = {str(node.name) for node in graph.all_nodes()}
        self.weights = Weights(taken=names)
        self.nodes: list[onnx.Node] = []
        shapes = {part.shape for part in parts}
        for value in graph.initializers.values():
            array = value.const_value
            if array is not None and (array.size <= 8 or tuple(array.shape.numpy()) in shapes):
                self.weights.known(value, array.numpy())

    def append(self, nodes: Sequence[onnx.Node], name: str) -> None:
        """Add the nodes that make a weight of this name."""
        for node in nodes:
            stem = f"fold/{name}/{node.op_type}"
            numbered = (f"{stem}.{k}" if k else stem for k in range(len(self.taken) + 1))
            unique = next(n for n in numbered if n not in self.taken)
            self.taken.add(unique)
            node.name, node.outputs[0].name = unique, f"{unique}:out"
            node.metadata_props["tncompile.fold"] = name
            self.nodes.append(node)
