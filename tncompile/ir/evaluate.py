"""Numbers of networks and of groups of cores, in float64, along a given order of pairwise contractions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tncompile.ir import dims
from tncompile.ir.core import Array, Index, Network, Tensor, Term, Window
from tncompile.ir.tree import Tree, flatten, fold_tree, left_to_right

Labelled = tuple[Array, tuple[str, ...]]


def einsum(operands: Sequence[Labelled], output: Sequence[str]) -> Array:
    """`numpy.einsum` over named indices; an index may repeat in one operand."""
    number: dict[str, int] = {}
    args: list[Any] = []
    for array, names in operands:
        args += [array, [number.setdefault(name, len(number)) for name in names]]
    return np.asarray(np.einsum(*args, [number[name] for name in output], optimize=len(operands) > 1))


def contract(operands: Sequence[Labelled], tree: Tree, output: Collection[str]) -> Labelled:
    """Contract labelled arrays pair by pair along `tree`.

    Every index outside `output` is summed as soon as nothing else needs it. Pairwise, so that neither the
    number of indices (numpy allows 52 in one einsum) nor an unlucky left-to-right order is a limit.
    """
    pending: dict[str, int] = {}
    for position in flatten(tree):
        for name in set(operands[position][1]):
            pending[name] = pending.get(name, 0) + 1

    def needed(name: str) -> bool:
        return name in output or pending[name] > 0

    def pair(a: Labelled, b: Labelled) -> Labelled:
        names = dict.fromkeys((*a[1], *b[1]))
        for part in (a, b):
            for name in set(part[1]):
                pending[name] -= 1
        kept = tuple(name for name in names if needed(name))
        for name in kept:
            pending[name] += 1
        return einsum([a, b], kept), kept

    result, names = fold_tree(tree, operands.__getitem__, pair)
    kept = tuple(n for n in dict.fromkeys(names) if n in output)
    return (result, names) if kept == names else (einsum([(result, names)], kept), kept)


def labelled(tensor: Tensor, array: Array | None = None) -> Labelled:
    """A core's data (or `array`, an operand's value) in float64, one axis for each index."""
    data = tensor.data if array is None else array
    if data is None:
        raise ValueError(f"{tensor.name} is an operand and has no data")
    return np.asarray(data, np.float64), tuple(i.name for i in tensor.indices)


def merge(tensors: Sequence[Tensor], order: Tree, keep: Iterable[Index]) -> Array:
    """The contraction of some cores: a float64 array with one axis for each index of `keep`, in that order."""
    keep = tuple(keep)
    parts = [(a.reshape([int(i.size) for i in t.indices]), n) for t, (a, n) in ((t, labelled(t)) for t in tensors)]
    result, names = contract(parts, order, {i.name for i in keep})
    return einsum([(result, names)], [i.name for i in keep])


def evaluate(
    network: Network, operands: Mapping[str, Array] | None = None, symbols: Mapping[str, int] | None = None
) -> Array:
    """The value of a network for given operands, in float64, in the network's own contraction order.

    `symbols` gives the sizes of symbolic indices; those that stand alone on an axis of an operand are
    read off that operand.
    """
    operands = operands or {}
    sizes = dict(symbols or {})
    for tensor in network.operands:
        for axis, length in zip(tensor.axes, operands[tensor.name].shape, strict=True):
            if len(axis) == 1 and isinstance(axis[0].size, str) and axis[0].size.isidentifier():
                sizes.setdefault(axis[0].size, length)

    def size(index: Index) -> int:
        return dims.evaluate(index.size, sizes)

    total: Array = np.zeros([size(i) for i in network.output.indices])
    for term in network.terms:
        total = total + evaluate_term(term, network.output.indices, operands, size)
    return total.reshape([int(np.prod([size(i) for i in axis], dtype=np.int64)) for axis in network.output.axes])


def evaluate_term(
    term: Term, output: Sequence[Index], operands: Mapping[str, Array], size: Callable[[Index], int]
) -> Array:
    """A term's value with one axis for each index of `output`, of size 1 where the term lacks the index."""
    parts = []
    for tensor in term.tensors:
        array, names = labelled(tensor, None if tensor.is_core else operands[tensor.name])
        parts.append((array.reshape([size(i) for i in tensor.indices]), names))
    order = term.order
    if term.windows:
        sizes = {i.name: size(i) for i in (*term.indices.values(), *output)}
        parts += [(pattern(w, sizes), w.names) for w in term.windows]
        order = left_to_right([order, *range(len(term.tensors), len(parts))])
    result, names = contract(parts, order, {i.name for i in output})
    present = [i.name for i in output if i.name in names]
    shape = [size(i) if i.name in names else 1 for i in output]
    return einsum([(result, names)], present).reshape(shape)


def pattern(window: Window, sizes: Mapping[str, int]) -> Array:
    """The tensor ``[axis, kernel, out]`` that is 1 where a window reads the operand, else 0: with it a convolution is
    an einsum (arXiv:2307.02275, section 3)."""
    axis, kernel, out = (np.arange(sizes[name]) for name in window.names)
    read = window.stride * out + window.dilation * kernel[:, None] - window.padding[0]
    return np.asarray(axis[:, None, None] == read, np.float64)
