"""Widen the bonds of convolutions to whole blocks of channels, which ONNX Runtime has faster kernels for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.profile import BLOCK
from tncompile.ir import Index, Network, Program, Tensor, Term
from tncompile.ir.edit import map_terms
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import Limits, fastest

_FEW = Limits(max_trials=0, trees=1)


@dataclass(frozen=True)
class Blocks(Pass):
    """Fill up the bonds of convolutions with zeros, to a multiple of eight.

    ```
    term x[b, c, i] A[r=37, c] K[r, k] B[r, o]        window i, k -> h
    ->
    term x[b, c, i] A[r=40, c] K[r, k] B[r, o]        window i, k -> h
    ```

    1. The bond is on three cores or more of a term with windows, and on nothing else: contracted one by one, its
       kernels are applied to each channel alone, for which ONNX Runtime has fast kernels where the channels come in
       whole blocks.
    2. The best way to compute the term is predicted to be faster by `margin`, on average over the batch sizes.

    The value stays what it was: what is added is zero.
    """

    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        return map_terms(program, lambda network, term: self._widened(network, term, context, changes)), changes

    def _widened(self, network: Network, term: Term, context: Context, changes: list[Change]) -> Term:
        bonds = [i for i in _shared_bonds(network, term) if int(i.size) % BLOCK] if term.windows else []
        if not bonds:
            return term
        wide = [Index(i.name, -(-int(i.size) // BLOCK) * BLOCK) for i in bonds]
        widened = replace(term, tensors=tuple(_padded(t, {i.name: i for i in wide}) for t in term.tensors))
        before, after = (fastest(replace(network, terms=(t,)), t, context, _FEW) for t in (term, widened))
        logs = [math.log(new / old) for new, old in zip(after, before, strict=True)]
        gain = math.exp(sum(logs) / len(logs))
        what = ", ".join(f"{a.name} of size {a.size} is {b.size}" for a, b in zip(bonds, wide, strict=True))
        if gain > 1 - self.margin:
            changes.append(Change(network.output.name, what, f"{gain:.2f} times the time predicted", declined=True))
            return term
        changes.append(Change(network.output.name, what, f"filled up with zeros: {gain:.2f} times the time predicted"))
        return widened


def _shared_bonds(network: Network, term: Term) -> list[Index]:
    """Indices of three cores or more, and of nothing else."""
    outside = {i.name for t in (network.output, *term.operands) for i in t.indices} | term.slid
    held = Counter(name for core in term.cores for name in {i.name for i in core.indices})
    return [i for name, i in term.indices.items() if name not in outside and held[name] > 2]


def _padded(tensor: Tensor, wide: dict[str, Index]) -> Tensor:
    """A core with zeros added behind where an index became wider."""
    if tensor.data is None or not any(i.name in wide for i in tensor.indices):
        return tensor
    sizes = [(int(i.size), int(wide.get(i.name, i).size)) for i in tensor.indices]
    axes = tuple(tuple(wide.get(i.name, i) for i in axis) for axis in tensor.axes)
    data = np.pad(tensor.array(), [(0, new - old) for old, new in sizes])
    padded = Tensor(tensor.name, axes, origins=tensor.origins)
    return replace(padded, data=data.reshape([int(size) for size in padded.shape]))
