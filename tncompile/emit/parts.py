"""What a weight may be stored as, and the nodes of constants alone that make it of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from tncompile.emit.folds import Folding
from tncompile.emit.foldwriter import SMALL, Writer
from tncompile.emit.graph import Arranged
from tncompile.ir import Array, Tensor

_FLOPS = 10e9  # ONNX Runtime 1.31 folded at 40 to 110 GFLOP/s on two cores
_BANDWIDTH = 700e6  # and made arrays at 0.8 GB/s on one quiet core
_PRODUCT = 0.2e-6  # seconds that one product of a batched MatMul takes
_SPARSE = 0.5  # of a weight's bytes, at most, that are stored of a sparse one: two more of its size are made at load
_SAMPLE = 1024  # numbers that are looked at first, as most weights have no zeros
_PLACE = np.dtype(np.int32)
_FLOATS = (onnx.DataType.FLOAT, onnx.DataType.DOUBLE, onnx.DataType.FLOAT16)


@dataclass(frozen=True)
class Foldable(ABC):
    """A weight that could be stored as less.

    `values` are the initializers that hold it, one for each arrangement; `saved` the bytes that are saved then;
    `made` those that are made at load, and kept until all is folded; `seconds` the predicted time that takes.
    """

    name: str
    values: tuple[onnx.Value, ...]
    saved: int
    made: int
    seconds: float

    @property
    def parts(self) -> Iterable[Tensor]:
        """Cores that it is made of."""
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
        if saved <= SMALL * len(values):
            return None
        folds = [_folding(value).fold for value in values]
        computed = np.dtype(_computed(core))
        made = sum(fold.made for fold in folds) * computed.itemsize
        if computed != core.data.dtype:  # the parts are cast before, and the result behind
            made += len(values) * (core.recipe.elements * computed.itemsize + core.data.nbytes)
        seconds = sum(fold.flops for fold in folds) / _FLOPS + sum(fold.products for fold in folds) * _PRODUCT
        return Contracted(core.name, tuple(values), saved, made, seconds + made / _BANDWIDTH, core)

    @property
    def parts(self) -> Iterable[Tensor]:
        """Cores that it is made of."""
        assert self.core.recipe is not None
        return self.core.recipe.term.tensors

    def write(self, value: onnx.Value, writer: Writer) -> onnx.Value:
        """The value in which the nodes end that make one of `values`."""
        dtype, computed = str(self.core.array().dtype), _computed(self.core)
        nodes, result = _folding(value).nodes(
            lambda core, axes: writer.part(core, axes, computed), computed, writer.weights
        )
        if computed != dtype:
            nodes.append(onnx.node("Cast", [result], {"to": onnx.DataType.from_numpy(np.dtype(dtype))}))
            result = nodes[-1].outputs[0]
        writer.append(nodes)
        return result


def _folding(value: onnx.Value) -> Folding:
    """How the core that an initializer holds is contracted to its arrangement."""
    arranged = Arranged.of(value)
    assert arranged is not None and arranged.core.recipe is not None
    recipe = arranged.core.recipe
    names = dict(zip((i.name for i in arranged.core.indices), recipe.kept, strict=True))
    return Folding(recipe.term, [[names[n] for n in group] for group in arranged.groups])


def _computed(core: Tensor) -> str:
    """The type in which a core is contracted at load: ONNX Runtime has no kernel that folds float16."""
    dtype = str(core.array().dtype)
    return "float32" if dtype == "float16" else dtype


@dataclass(frozen=True)
class Sparse(Foldable):
    """A weight that is nearly all zeros, stored as its other numbers and their places in row-major order."""

    @staticmethod
    def of(value: onnx.Value) -> Sparse | None:
        """An initializer without its zeros; None where it is not so much smaller."""
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or value.is_graph_input() or value.is_graph_output():
            return None
        if tensor.nbytes <= SMALL or tensor.size > np.iinfo(_PLACE).max:
            return None
        flat: Array = tensor.numpy().reshape(-1)
        each = flat.itemsize + _PLACE.itemsize
        most = _SPARSE * flat.nbytes / each
        sample = flat[:: max(1, flat.size // _SAMPLE)]
        if np.count_nonzero(sample) * flat.size > 2 * most * sample.size:
            return None
        count = int(np.count_nonzero(flat))
        saved = flat.nbytes - each * count
        if count > most or saved <= SMALL:
            return None
        return Sparse(str(value.name), (value,), saved, 3 * flat.nbytes, 3 * flat.nbytes / _BANDWIDTH)

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
        writer.append(nodes)
        return nodes[-1].outputs[0]
