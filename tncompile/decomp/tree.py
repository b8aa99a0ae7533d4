"""Networks whose bonds form a tree: one algorithm for SVD, tensor trains, Tucker, hierarchical Tucker and block trains.

A bond cuts the tree, and so the modes, in two; the singular values of the tensor unfolded by that cut say what the
bond carries. A mode may be on cores of both sides, as in block trains: it is then a *batch* of the cut, one unfolding
for each of its values, and a bond of rank r keeps r values of each. The values of a bond are then the root sums of
squares over the batch.

Truncations go from the leaves to the root. Each is an orthogonal projection inside the range of those before, so that
the squared error is exactly the sum of all squares that are left out (Oseledets 2011, theorem 2.2; Vannieuwenhoven et
al. 2012 for Tucker; Grasedyck 2010 for hierarchical Tucker), and at most the number of bonds times that of the best
such network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tncompile.decomp import blocks
from tncompile.decomp.base import Labels, bonds_of
from tncompile.decomp.cut import SAFE, Cut, keep, singular_values, truncate
from tncompile.decomp.ranks import Ranks, Sizes, clamp
from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.ir.evaluate import Labelled, einsum


@dataclass(frozen=True)
class Edge:
    """The bond between a node and the next one towards the root, with the modes that both sides of the cut have."""

    child: int
    parent: int
    bond: str
    batch: tuple[str, ...]
    below: frozenset[str]


@dataclass(frozen=True)
class Tree:
    """The cores' labels, the sizes of modes in the order of the dense tensor, and the core that is the root."""

    labels: Labels
    modes: tuple[tuple[str, int], ...]
    root: int

    @cached_property
    def bonds(self) -> tuple[str, ...]:
        """Names of the bonds."""
        return bonds_of(self.labels, dict(self.modes))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, those below a node before its own. Raises ValueError where the bonds do not form a tree."""
        found: list[tuple[int, int, str]] = []
        seen, todo = {self.root}, [self.root]
        while todo:
            node = todo.pop()
            for bond in self.bonds:
                for other in range(len(self.labels)):
                    if other not in seen and bond in self.labels[node] and bond in self.labels[other]:
                        seen.add(other)
                        todo.append(other)
                        found.append((other, node, bond))
        if len(seen) < len(self.labels) or len(found) != len(self.bonds):
            raise ValueError("the bonds do not form a tree")
        below = {k: {k} for k in seen}
        for child, parent, _ in reversed(found):
            below[parent] |= below[child]
        names = dict(self.modes)
        edges = []
        for child, parent, bond in reversed(found):
            inside = {n for k in below[child] for n in self.labels[k] if n in names}
            outside = {n for k in seen - below[child] for n in self.labels[k] if n in names}
            batch = tuple(n for n in names if n in inside & outside)
            edges.append(Edge(child, parent, bond, batch, frozenset(inside - outside)))
        return tuple(edges)

    def rows(self, node: int, edge: Edge) -> tuple[str, ...]:
        """The labels of one end of an edge that are neither its bond nor its batch."""
        return tuple(n for n in self.labels[node] if n != edge.bond and n not in edge.batch)

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """How many numbers the cores have at some ranks; what is neither mode nor bond has size 1."""
        sizes = {**dict(self.modes), **ranks}
        return sum(math.prod(sizes.get(n, 1) for n in names) for names in self.labels)

    def limits(self, ranks: Sizes) -> dict[str, int]:
        """The rank of each bond above which one of its ends could not use it."""
        sizes = {**dict(self.modes), **ranks}
        return {
            e.bond: min(math.prod(sizes.get(n, 1) for n in self.rows(end, e)) for end in (e.child, e.parent))
            for e in self.edges
        }


@dataclass(frozen=True)
class Result:
    """Cores with the square of the error they make, that of the norm of the tensor, and notes."""

    cores: tuple[Array, ...]
    dropped: float
    norm: float
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The relative error."""
        return math.sqrt(self.dropped) / self.norm if self.norm else 0.0


def decompose(tensor: Array, tree: Tree, ranks: Ranks, memory: int = blocks.MEMORY) -> Result:
    """The cores of a tensor that has one axis for each mode of the tree.

    Where the tensor takes more than `memory` bytes it is read in blocks, and only the first truncation is made
    from all of it. Raises TNCompileError for numbers that are not finite, and what `Ranks.choose` does.
    """
    notes: tuple[str, ...] = ()
    if ranks.given is not None:
        wanted, notes = clamp(ranks.named(tree.bonds), tree.limits)
        ranks = replace(ranks, given=tuple(wanted[b] for b in tree.bonds))
    if blocks.too_large(tensor, memory):
        result = _out_of_core(tensor, tree, ranks, memory)
    else:
        result = _in_memory(tensor, tree, ranks)
    return replace(result, notes=notes + result.notes)


def _in_memory(tensor: Array, tree: Tree, ranks: Ranks) -> Result:
    names = tuple(n for n, _ in tree.modes)
    whole: Labelled = (np.ascontiguousarray(tensor, dtype=np.float64), names)
    norm = float(np.linalg.norm(whole[0]))
    if not math.isfinite(norm):
        raise TNCompileError("the tensor has values that are not finite: it cannot be factorized")
    picks: dict[str, int | Callable[[Array], int]] = {}
    if ranks.given is None and len(tree.edges) == 1:
        bond = tree.bonds[0]
        picks[bond] = lambda values: ranks.choose({bond: values}, tree.parameters, norm)[bond]
    else:
        exact = ranks.parameters is None and (ranks.error or 0.0) ** 2 <= SAFE
        spectra = {} if ranks.given is not None else _spectra(whole, tree, exact)
        picks.update(
            ranks.named(tree.bonds)
            if ranks.given is not None
            else clamp(ranks.choose(spectra, tree.parameters, norm), tree.limits)[0]
        )
    cores: dict[int, Array] = {}
    dropped, notes = 0.0, []
    for edge in tree.edges:
        rows = tree.rows(edge.child, edge)
        matrix, back = _unfold(whole, edge.batch, rows)
        pick = picks[edge.bond]
        if ranks.given is None and pick == matrix.shape[1]:  # all of it is known to be needed
            cut = keep(matrix)
        else:
            cut = truncate(matrix, pick, nearly=ranks.given is not None)
        rank = cut.left.shape[2]
        if ranks.given is not None and isinstance(pick, int) and rank < pick:
            notes.append(f"rank {pick} of {edge.bond} is {rank}: the rest would be zeros")
        dropped += cut.dropped
        whole = back(cut.rest, edge.bond)
        left = _named(cut.left, edge.batch, rows, edge.bond, {**dict(tree.modes), **_ranks(cores, tree)})
        cores[edge.child] = _arranged(left, tree.labels[edge.child])
    cores[tree.root] = _arranged(whole, tree.labels[tree.root])
    return Result(tuple(cores[k] for k in range(len(tree.labels))), dropped, norm, tuple(notes))


def _out_of_core(tensor: Array, tree: Tree, ranks: Ranks, memory: int) -> Result:
    """The first leaf from blocks; what is left is the same problem without that leaf, and fits."""
    names = tuple(n for n, _ in tree.modes)
    if not tree.edges or tree.edges[0].batch:
        raise TNCompileError(f"a tensor of {tensor.size:,} numbers does not fit the memory of {memory:,} bytes")
    if ranks.given is None and ranks.error is None and len(tree.edges) > 1:
        raise TNCompileError(
            "a tensor larger than memory needs given ranks or an error: its singular values are not all known"
        )
    edge = tree.edges[0]
    rows = tuple(n for n in tree.rows(edge.child, edge) if n in names)
    others = tuple(n for n in names if n not in rows)
    rank = ranks.named(tree.bonds)[edge.bond] if ranks.given is not None else None
    if ranks.parameters is not None:
        per_rank = tree.parameters({edge.bond: 1})
        rank = max(1, min(ranks.parameters // per_rank, tree.limits({edge.bond: 1})[edge.bond]))
    share = (ranks.error or 0.0) / math.sqrt(len(tree.edges))
    view = np.transpose(tensor, [names.index(n) for n in (*rows, *others)])
    try:
        left, rest, dropped, whole = blocks.split(view, len(rows), rank, share, memory)
    except blocks.TooLargeError:
        if len(tree.edges) == 1:
            raise
        return _merged(tensor, tree, ranks, memory)
    sizes = {**dict(tree.modes), edge.bond: left.shape[1]}
    core = _arranged(
        (left.reshape([sizes[n] for n in (*rows, edge.bond)]), (*rows, edge.bond)), tree.labels[edge.child]
    )
    left_over = rest.reshape([sizes[n] for n in (edge.bond, *others)])
    smaller = Tree(
        tuple(names for k, names in enumerate(tree.labels) if k != edge.child),
        tuple((n, sizes[n]) for n in (edge.bond, *others)),
        tree.root - (edge.child < tree.root),
    )
    inner = ranks
    if ranks.given is not None:
        inner = replace(ranks, given=tuple(ranks.named(tree.bonds)[b] for b in smaller.bonds))
    elif ranks.error is not None:
        norm2 = float(np.vdot(rest, rest))
        allowed = max(ranks.error**2 * whole - dropped, 0.0)
        inner = replace(ranks, error=min(math.sqrt(allowed / norm2), 0.999999) if norm2 else 0.0)
    if smaller.bonds:
        rest_result = _in_memory(left_over, smaller, inner)
    else:
        rest_result = Result((_arranged((left_over, (edge.bond, *others)), smaller.labels[0]),), 0.0, 0.0)
    cores = list(rest_result.cores)
    cores.insert(edge.child, core)
    return Result(tuple(cores), dropped + rest_result.dropped, math.sqrt(whole), rest_result.notes)


def _merged(tensor: Array, tree: Tree, ranks: Ranks, memory: int) -> Result:
    """Out of core with the first leaf and its parent as one core, which is split afterwards.

    For a leaf whose rank is so near to the size of its modes that nothing is saved by cutting it off.
    """
    edge = tree.edges[0]
    leaf, parent = tree.labels[edge.child], tree.labels[edge.parent]
    both = (*(n for n in leaf if n != edge.bond), *(n for n in parent if n != edge.bond))
    at = edge.parent - (edge.child < edge.parent)
    labels = [names for k, names in enumerate(tree.labels) if k != edge.child]
    labels[at] = both
    coarse = Tree(tuple(labels), tree.modes, tree.root - (edge.child < tree.root))
    outer, inner = ranks, Ranks()
    if ranks.given is not None:
        named = ranks.named(tree.bonds)
        outer = replace(ranks, given=tuple(named[b] for b in coarse.bonds))
        inner = Ranks(given=named[edge.bond])
    found = _out_of_core(tensor, coarse, outer, memory)
    cores = list(canonical(found.cores, replace(coarse, root=at)))
    part = _in_memory(cores[at], Tree((leaf, parent), tuple(zip(both, cores[at].shape, strict=True)), 1), inner)
    cores[at] = part.cores[1]
    cores.insert(edge.child, part.cores[0])
    error = math.sqrt(found.dropped) + math.sqrt(part.dropped)
    return Result(tuple(cores), error**2, found.norm, found.notes + part.notes)


def _spectra(whole: Labelled, tree: Tree, exact: bool) -> dict[str, Array]:
    """The singular values of the tensor at each cut, in the order of `Tree.bonds`.

    Where they need not be exact, those below 1e-8 of the largest are noise, in large matrices.
    """
    found = {}
    for edge in tree.edges:
        matrix, _ = _unfold(whole, edge.batch, [n for n in whole[1] if n in edge.below])
        found[edge.bond] = singular_values(matrix, exact)
    return {bond: found[bond] for bond in tree.bonds}


def canonical(cores: Sequence[Array], tree: Tree) -> tuple[Array, ...]:
    """The same tensor, every core but the root an isometry towards the root."""
    moved = list(cores)
    for edge in tree.edges:
        _shift(moved, tree, edge, edge.child, edge.parent)
    return tuple(moved)


def sweep(
    cores: Sequence[Array], tree: Tree, ranks: Mapping[str, int] | None = None
) -> tuple[Result, dict[str, Array]]:
    """Singular values at all bonds, and the cores truncated to `ranks` where given.

    The root's core moves to each leaf and back; on the way back its bond is cut. So all later cuts lie on one side of
    each, and the squared error is the sum of what they leave out.
    """
    moved = list(canonical(cores, tree))
    norm = float(np.linalg.norm(moved[tree.root]))
    spectra: dict[str, Array] = {}
    dropped = 0.0
    children: dict[int, list[Edge]] = {}
    for edge in tree.edges:
        children.setdefault(edge.parent, []).append(edge)
    todo: list[tuple[Edge, bool]] = [(e, False) for e in children.get(tree.root, [])]
    while todo:
        edge, returning = todo.pop()
        if returning:
            pick: int | Callable[[Array], int] = len if ranks is None else ranks[edge.bond]
            cut = _shift(moved, tree, edge, edge.child, edge.parent, pick)
            assert cut is not None
            spectra[edge.bond] = cut.values
            dropped += cut.dropped
        else:
            _shift(moved, tree, edge, edge.parent, edge.child)
            todo.append((edge, True))
            todo += [(e, False) for e in children.get(edge.child, [])]
    return Result(tuple(moved), dropped, norm), {bond: spectra[bond] for bond in tree.bonds}


def _shift(
    cores: list[Array],
    tree: Tree,
    edge: Edge,
    source: int,
    target: int,
    pick: int | Callable[[Array], int] | None = None,
) -> Cut | None:
    """Make the core at one end of an edge an isometry and the other one the carrier; with `pick`, truncate."""
    rows = tree.rows(source, edge)
    names = tree.labels[source]
    kept: Labelled = (cores[source], names)
    matrix, _ = _unfold(kept, edge.batch, rows)
    cut = None
    if pick is None:
        left, rest = np.linalg.qr(matrix)
    else:
        cut = truncate(matrix, pick)
        left, rest = cut.left, cut.rest
    sizes = dict(zip(names, cores[source].shape, strict=True))
    cores[source] = _arranged(_named(left, edge.batch, rows, edge.bond, sizes), names)
    factor = rest.reshape(*[sizes[n] for n in edge.batch], rest.shape[1], rest.shape[2])
    new = f"{edge.bond} new"
    renamed = tuple(new if n == edge.bond else n for n in tree.labels[target])
    cores[target] = einsum(
        [(factor, (*edge.batch, new, edge.bond)), (cores[target], tree.labels[target])],
        renamed,
    )
    return cut


def _unfold(
    tensor: Labelled, batch: Sequence[str], rows: Sequence[str]
) -> tuple[Array, Callable[[Array, str], Labelled]]:
    """``[batch, rows, columns]`` of a labelled tensor, and the way back for ``[batch, rank, columns]``."""
    array, names = tensor
    sizes = dict(zip(names, array.shape, strict=True))
    rows = [n for n in rows if n in sizes]
    columns = [n for n in names if n not in rows and n not in batch]
    order = [names.index(n) for n in (*batch, *rows, *columns)]
    shape = [math.prod(sizes[n] for n in part) for part in (batch, rows, columns)]

    def back(rest: Array, bond: str) -> Labelled:
        new = (*batch, bond, *columns)
        return rest.reshape([rest.shape[1] if n == bond else sizes[n] for n in new]), new

    return np.ascontiguousarray(array.transpose(order)).reshape(shape), back


def _named(left: Array, batch: Sequence[str], rows: Sequence[str], bond: str, sizes: Mapping[str, int]) -> Labelled:
    """An isometry ``[batch, rows, rank]`` with one axis for each label."""
    names = (*batch, *(n for n in rows if n in sizes))
    return left.reshape([*(sizes[n] for n in names), left.shape[2]]), (*names, bond)


def _arranged(tensor: Labelled, names: Sequence[str]) -> Array:
    """A labelled tensor in another order, with axes of size 1 for the names that it lacks."""
    array, have = tensor
    present = [n for n in names if n in have]
    result = array.transpose([have.index(n) for n in present])
    for position, name in enumerate(names):
        if name not in have:
            result = np.expand_dims(result, position)
    return np.ascontiguousarray(result)


def _ranks(cores: Mapping[int, Array], tree: Tree) -> Sizes:
    """The sizes of the bonds of the cores that are done."""
    return {
        n: size
        for k, core in cores.items()
        for n, size in zip(tree.labels[k], core.shape, strict=True)
        if n in tree.bonds
    }
