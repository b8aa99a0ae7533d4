"""Nodes that contract cores into an array of a given arrangement, as `foldplan` has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as onnx

from tncompile.emit.foldplan import Axes, Fold, plan_fold
from tncompile.emit.graph import GraphWriter, Groups, Laid, Weights
from tncompile.ir import Index, Tensor, Term
from tncompile.ir.tree import flatten

Part = Callable[[Tensor, Groups], onnx.Value]
"""Where a core of a fold is, in axes of groups of its indices and without the indices that no group has."""


class Folding:
    """The contraction of a term of cores into an array whose axes are groups of its indices."""

    def __init__(self, term: Term, axes: Iterable[Iterable[Index]]) -> None:
        self._indices = list(term.indices.values())
        self._number = {index.name: k for k, index in enumerate(self._indices)}
        self._tensors = [term.tensors[place] for place in flatten(term.order)]
        tensors = tuple(self._numbers(tensor.indices) for tensor in self._tensors)
        sizes = tuple(int(index.size) for index in self._indices)
        self.fold = plan_fold(tensors, sizes, tuple(map(self._numbers, axes)))

    def nodes(self, part: Part, dtype: str, weights: Weights) -> tuple[list[onnx.Node], onnx.Value]:
        """The nodes that contract the cores, and the value they end in."""
        write = GraphWriter("fold", {index.name: index.size for index in self._indices}, dtype, weights, (), {})
        result = self._write(self.fold, part, write)
        return write.nodes, result

    def _numbers(self, indices: Iterable[Index]) -> tuple[int, ...]:
        return tuple(self._number[index.name] for index in indices)

    def _write(self, fold: Fold, part: Part, write: GraphWriter) -> onnx.Value:
        if not fold.halves:
            return part(self._tensors[fold.places[0]], self._names(fold.axes))
        met = write.op(fold.op, [self._write(half, part, write) for half in fold.halves])
        return write.arrange(Laid(met, self._names(fold.met)), self._names(fold.axes)).value

    def _names(self, axes: Axes) -> Groups:
        return tuple(tuple(self._indices[k].name for k in axis) for axis in axes)
