"""What a weight is contracted with, read from values of the running model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tncompile.ir import Array, Index, Opaque, Program, Ref, Tensor, Term, Window
from tncompile.ir.core import networks_of
from tncompile.ir.evaluate import Labelled, contract, einsum
from tncompile.ir.tree import left_to_right
from tncompile.passes.positions import EMBEDDING
from tncompile.tensorizer.held import Held, held
from tncompile.tensorizer.sites import Part


@dataclass(frozen=True)
class Reading:
    """One layer's input: the tensors between the model's values and the weight, and which of their indices the weight
    contracts. `shared` indices the weight has as well as the layer's output: it is another matrix for each."""

    tensors: tuple[Tensor, ...] = field(repr=False)
    windows: tuple[tuple[Window, int], ...]  # with the size of the kernel
    ins: tuple[Index, ...]
    kept: tuple[str, ...]
    shared: bool
    output: str

    @property
    def values(self) -> tuple[str, ...]:
        """The values that are read."""
        return tuple(dict.fromkeys(t.name for t in self.tensors if not t.is_core))

    def rows(self, values: Mapping[str, Array], most: int, seed: int = 0) -> Array:
        """Inputs of the weight, one a row: ``[rows, *ins]``; of more than `most` a random choice by `seed`."""
        parts = [_labelled(t, values) for t in self.tensors]
        parts = [_slid(part, self.windows) for part in parts]
        ins = [i.name for i in self.ins]
        result, names = contract(parts, left_to_right(range(len(parts))), {*self.kept, *ins})
        present = [n for n in names if n not in ins]
        result = einsum([(result, names)], [*present, *ins])
        shape = result.shape[: len(present)]
        count = math.prod(shape)
        if count > most:
            chosen = np.random.default_rng(seed).choice(count, most, replace=False)
            return np.ascontiguousarray(result[np.unravel_index(np.sort(chosen), shape)])
        return np.ascontiguousarray(result).reshape(count, *result.shape[len(present) :])


@dataclass(frozen=True)
class Lookup:
    """Rows that are gathered from a table: the value that has their numbers."""

    ids: str
    output: str

    @property
    def values(self) -> tuple[str, ...]:
        """The value that is read."""
        return (self.ids,)


def readings(program: Program, parts: Iterable[Part]) -> dict[str, tuple[Reading | Lookup, ...]]:
    """How to read the inputs of some weights, by name, from a program whose layers are kept apart, in the order in
    which it computes the layers.

    A weight with a use whose input cannot be read is left out.
    """
    wanted = {part.name: part for part in parts}
    found: dict[str, list[Reading | Lookup | None]] = {}
    holding: dict[str, list[Held]] = {}
    for one in held(program):
        if one.weight in wanted and wanted[one.weight].held:
            holding.setdefault(one.output, []).append(one)
    for node in program.nodes:
        if isinstance(node, Opaque):
            for one in holding.get(node.output.name, ()):
                found.setdefault(one.weight, []).append(_of_held(one))
            if node.target == EMBEDDING and isinstance(node.args[0], Ref) and isinstance(node.args[1], Ref):
                part = wanted.get(node.args[0].name)
                if part is not None and part.gathered:
                    found.setdefault(part.name, []).append(Lookup(node.args[1].name, node.output.name))
            continue
        for network in networks_of(node):
            outputs = {i.name for i in network.output.indices}
            for term in network.terms:
                for position, tensor in enumerate(term.tensors):
                    part = wanted.get(tensor.name) if tensor.is_core and not term.is_constant else None
                    if part is not None and not part.gathered:
                        reading = _reading(term, position, part, outputs, network.output.name)
                        found.setdefault(part.name, []).append(reading)
    return {
        name: tuple(r for r in uses if r is not None)
        for name, uses in found.items()
        if all(r is not None for r in uses)
    }


def _of_held(one: Held) -> Reading | Lookup | None:
    """How to read what a node contracts with a weight that it holds, or the rows that it gathers; None where the graph
    does not show it."""
    if one.rows is not None:
        return Lookup(one.rows, one.output)
    if one.tensor is None or one.read is None:
        return None
    kept = tuple(i.name for i in one.tensor.indices if i != one.read)
    return Reading((one.tensor,), (), (one.read,), kept, False, one.output)


def _reading(term: Term, position: int, part: Part, outputs: set[str], output: str) -> Reading | None:
    core = term.tensors[position]
    if core.shape != part.array.shape:
        return None
    ins = tuple(i for axis in part.ins for i in core.axes[axis])
    own = {i.name for i in core.indices}
    beside = _beside(term, position)
    tensors = tuple(t for k, t in enumerate(term.tensors) if k in beside)
    behind = {i.name for k, t in enumerate(term.tensors) if k not in (*beside, position) for i in t.indices}
    windows = tuple((w, int(term.indices[w.kernel].size)) for w in term.windows)
    held = {i.name for t in tensors for i in t.indices} | {w.kernel for w, _ in windows}
    dynamic = any(sum(isinstance(i.size, str) for i in axis) > 1 for t in tensors for axis in t.axes)
    if dynamic or not all(i.name in held for i in ins):
        return None
    names = {i.name for i in ins}
    kept = (outputs | own | behind) - names
    shared = bool((own - names) & held)
    return Reading(tensors, windows, ins, tuple(sorted(kept)), shared, output)


def _beside(term: Term, position: int) -> set[int]:
    """Tensors of a term that are between its operands and the core at `position`, which what they lead to is not."""
    found = {k for k, t in enumerate(term.tensors) if not t.is_core}
    inner = {i.name for i in term.tensors[position].indices}
    seen = {i.name for k in found for i in term.tensors[k].indices}
    while True:
        more = {
            k
            for k, t in enumerate(term.tensors)
            if k not in found and k != position and {i.name for i in t.indices} & (seen - inner)
        }
        if not more:
            return found
        found |= more
        seen |= {i.name for k in more for i in term.tensors[k].indices}


def _labelled(tensor: Tensor, values: Mapping[str, Array]) -> Labelled:
    names = tuple(i.name for i in tensor.indices)
    if tensor.is_core:
        return tensor.array(), names
    array = values[tensor.name]
    shape: list[int] = []
    for axis, length in zip(tensor.axes, array.shape, strict=True):
        known = [i.size if isinstance(i.size, int) else None for i in axis]
        rest = length // max(1, math.prod(k for k in known if k is not None))
        shape += [rest if size is None else size for size in known]
    return array.reshape(shape), names


def _slid(part: Labelled, windows: Sequence[tuple[Window, int]]) -> Labelled:
    """A tensor with two indices, of the output and of the kernel, in the place of each that a window reads: a view,
    but for the padding."""
    array, names = part
    for window, kernel in windows:
        if window.axis not in names:
            continue
        axis = names.index(window.axis)
        before, after = window.padding
        cut = slice(max(0, -before), array.shape[axis] - max(0, -after))
        array = array[(slice(None),) * axis + (cut,)]
        if max(window.padding) > 0:
            array = np.pad(array, [(max(0, before), max(0, after)) if k == axis else (0, 0) for k in range(array.ndim)])
        step = array.strides[axis]
        length = (array.shape[axis] - window.dilation * (kernel - 1) - 1) // window.stride + 1
        array = np.lib.stride_tricks.as_strided(
            array,
            (*array.shape[:axis], length, kernel, *array.shape[axis + 1 :]),
            (*array.strides[:axis], step * window.stride, step * window.dilation, *array.strides[axis + 1 :]),
            writeable=False,
        )
        names = (*names[:axis], window.out, window.kernel, *names[axis + 1 :])
    return array, names
