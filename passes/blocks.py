"""Widen the bonds of convolutions to whole blocks of channels, which ONNX Runtime has faster kernels for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from tncompile.cost.kernels import BLOCK
from tncompile.ir import Index, Network, Program, Tensor, Term
from tncompile.ir.edit import map_terms
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import Limits, fastest

_FEW = Limits(max_trials=0, trees=1)


@dataclass(frozen=True)
class Blocks(Pass):
    """Fill up the bonds of convolutions with zeros, to a multiple of eight, and give kernels that have none a bond.

    ```
    term x[b, c, i] A[r=37, c] K[r, k] B[r, o]        window i, k -> h
    ->
    term x[b, c, i] A[r=40, c] K[r, k] B[r, o]        window i, k -> h

    term x[b, c, i] A[r=37, c] K[k] B[r, o]           window i, k -> h
    ->
    term x[b, c, i] A[r=40, c] K[r=40, k] B[r, o]     window i, k -> h
    ```

    1. The bond is on three cores or more of a term with windows, and on nothing else: contracted one by one, its
       kernels are applied to each channel alone, for which ONNX Runtime has fast kernels where the channels come in
       whole blocks.
    2. A kernel all of whose indices are windows' is repeated along a bond of two cores: by itself it would be applied
       to as many images of one channel.
    3. The best way to compute the term is predicted to be faster by `margin`, on average over the batch sizes; in a
       compact context its cores have no more numbers than `margin` on top.

    The value stays what it was: what is added is zero.
    """

    margin: float = 0.1

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        return map_terms(program, lambda network, term: self._widened(network, term, context, changes)), changes

    def _widened(self, network: Network, term: Term, context: Context, changes: list[Change]) -> Term:
        ways = list(_ways(network, term)) if term.windows else []
        if context.compact:
            ways = [(what, way) for what, way in ways if _numbers(way) <= (1 + self.margin) * _numbers(term)]
        if not ways:
            return term
        before, *after = (
            fastest(replace(network, terms=(t,)), t, context, _FEW) for t in (term, *(w for _, w in ways))
        )
        gains = [math.exp(fmean(math.log(new / old) for new, old in zip(a, before, strict=True))) for a in after]
        gain, (what, widened) = min(zip(gains, ways, strict=True), key=lambda found: found[0])
        declined = gain > 1 - self.margin
        changes.append(Change(network.output.name, what, f"{gain:.2f} times the time predicted", declined=declined))
        return term if declined else widened


def _ways(network: Network, term: Term) -> Iterator[tuple[str, Term]]:
    """The term with its bonds filled up, and with a lone kernel along each of its bonds; what was done, and to what."""
    filled, what = _filled(network, term)
    if what:
        yield what, filled
    for position, kernel in enumerate(term.tensors):
        if not kernel.is_core or not _is_lone(term, kernel):
            continue
        for bond in _bonds(network, term, 2):
            tensors = [*term.tensors]
            tensors[position] = _repeated(kernel, bond)
            spread, more = _filled(network, replace(term, tensors=tuple(tensors)))
            yield "; ".join(filter(None, (f"{kernel.name} repeated along {bond.name}", more))), spread


def _filled(network: Network, term: Term) -> tuple[Term, str]:
    bonds = [i for i in _bonds(network, term, 3) if int(i.size) % BLOCK]
    wide = {i.name: Index(i.name, -(-int(i.size) // BLOCK) * BLOCK) for i in bonds}
    what = ", ".join(f"{i.name} of size {i.size} filled up to {wide[i.name].size} with zeros" for i in bonds)
    return replace(term, tensors=tuple(_padded(t, wide) for t in term.tensors)), what


def _bonds(network: Network, term: Term, cores: int) -> list[Index]:
    """Indices of so many cores or more, and of nothing else."""
    outside = {i.name for t in (network.output, *term.operands) for i in t.indices} | term.slid
    held = Counter(name for core in term.cores for name in {i.name for i in core.indices})
    return [i for name, i in term.indices.items() if name not in outside and held[name] >= cores]


def _numbers(term: Term) -> int:
    return sum(core.data.size for core in term.cores if core.data is not None)


def _is_lone(term: Term, kernel: Tensor) -> bool:
    """Whether all indices of a core are those that windows slide with, which no other core may have, each once."""
    names = [i.name for i in kernel.indices]
    return bool(names) and len({*names}) == len(names) and {*names} <= {w.kernel for w in term.windows}


def _repeated(kernel: Tensor, bond: Index) -> Tensor:
    """A core with one more index in front, along which it is the same."""
    data = np.broadcast_to(kernel.array(), (int(bond.size), *(int(i.size) for i in kernel.indices))).copy()
    axes = ((bond,), *((i,) for i in kernel.indices))
    return Tensor(kernel.name, axes, data, origins=kernel.sources)


def _padded(tensor: Tensor, wide: dict[str, Index]) -> Tensor:
    """A core with zeros added behind where an index became wider."""
    if tensor.data is None or not any(i.name in wide for i in tensor.indices):
        return tensor
    sizes = [(int(i.size), int(wide.get(i.name, i).size)) for i in tensor.indices]
    axes = tuple(tuple(wide.get(i.name, i) for i in axis) for axis in tensor.axes)
    data = np.pad(tensor.array(), [(0, new - old) for old, new in sizes])
    padded = Tensor(tensor.name, axes, origins=tensor.origins)
    return replace(padded, data=data.reshape([int(size) for size in padded.shape]))
