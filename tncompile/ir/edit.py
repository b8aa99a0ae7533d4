"""Edits of networks: rename and split indices, put one network into another, merge cores. All return new values."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tncompile.ir import dims
from tncompile.ir.core import Axis, Index, Network, Node, Program, Recipe, Switch, Tensor, Term, Window, sources_of
from tncompile.ir.evaluate import merge
from tncompile.ir.opaque import Opaque
from tncompile.ir.tree import Tree, fold_tree, map_tree
from tncompile.ir.verify import wrong_windows


class CannotEdit(Exception):
    """An edit that does not apply; its text is the reason, for the report."""


def substitute_tensor(tensor: Tensor, mapping: Mapping[str, Axis]) -> Tensor:
    """Put a group of indices in the place of each index that `mapping` names."""
    axes = tuple(tuple(new for index in axis for new in mapping.get(index.name, (index,))) for axis in tensor.axes)
    if axes == tensor.axes:
        return tensor
    return replace(tensor, axes=axes, recipe=_substitute_recipe(tensor, mapping))


def _substitute_recipe(tensor: Tensor, mapping: Mapping[str, Axis]) -> Recipe | None:
    """A core's recipe, whose indices have names of their own, split where the core's own are."""
    recipe = tensor.recipe
    if recipe is None or [i.size for i in recipe.kept] != [i.size for i in tensor.indices]:
        return recipe
    used = {*recipe.term.indices}
    splits: dict[str, Axis] = {}
    for ours, theirs in zip(tensor.indices, recipe.kept, strict=True):
        parts = mapping.get(ours.name, (ours,))
        if len(parts) != 1:
            splits[theirs.name] = _parts(theirs, [p.size for p in parts], used)
    if not splits:
        return recipe
    term = replace(recipe.term, tensors=tuple(substitute_tensor(t, splits) for t in recipe.term.tensors))
    return Recipe(term, tuple(new for index in recipe.kept for new in splits.get(index.name, (index,))))


def _parts(index: Index, sizes: Sequence[dims.Dim], used: set[str]) -> Axis:
    """New indices that an index is split into; `used` has the names that are taken, theirs from now on too."""
    parts = []
    for size in sizes:
        parts.append(Index(fresh(f"{index.name}_1", used), size))
        used.add(parts[-1].name)
    return tuple(parts)


def substitute(network: Network, mapping: Mapping[str, Axis]) -> Network:
    """Replace indices everywhere in a network: a rename (one for one) or a split (one for several)."""
    if not mapping:
        return network
    terms = tuple(_substitute_term(term, mapping) for term in network.terms)
    return replace(network, terms=terms, output=substitute_tensor(network.output, mapping))


def _substitute_term(term: Term, mapping: Mapping[str, Axis]) -> Term:
    steps = term.steps
    if steps is not None:
        names = {old: tuple(i.name for i in new) for old, new in mapping.items()}
        steps = tuple(replace(s, order=tuple(n for old in s.order for n in names.get(old, (old,)))) for s in steps)
    tensors = tuple(substitute_tensor(t, mapping) for t in term.tensors)
    windows = tuple(_substitute_window(w, mapping) for w in term.windows)
    return replace(term, tensors=tensors, steps=steps, windows=windows)


def _substitute_window(window: Window, mapping: Mapping[str, Axis]) -> Window:
    names: list[str] = []
    for name in window.names:
        new = tuple(i.name for i in mapping[name]) if name in mapping else (name,)
        if len(new) != 1:
            raise CannotEdit(f"{name}, over which a window slides, is split")
        names += new
    return replace(window, axis=names[0], kernel=names[1], out=names[2])


def fresh(name: str, taken: Collection[str]) -> str:
    """`name`, or `name` with the first number that makes it new."""
    if name not in taken:
        return name
    stem = re.sub(r"_?\d+$", "", name) or name
    join = "_" if stem[-1:].isdigit() else ""
    return next(n for k in itertools.count(1) if (n := f"{stem}{join}{k}") not in taken)


def fresh_indices(network: Network, taken: Collection[str]) -> Network:
    """Rename a network's indices so that none is in `taken`."""
    used = {*taken}
    mapping: dict[str, Axis] = {}
    for index in network.indices.values():
        name = fresh(index.name, used)
        used.add(name)
        if name != index.name:
            mapping[index.name] = (Index(name, index.size),)
    # two steps, as a new name may be another index's old one
    aside = {old: (Index(f"{new[0].name}\0", new[0].size),) for old, new in mapping.items()}
    back = {new[0].name: (Index(new[0].name[:-1], new[0].size),) for new in aside.values()}
    return substitute(substitute(network, aside), back)


def refine(a: Axis, b: Axis, taken: Collection[str]) -> tuple[dict[str, Axis], dict[str, Axis]]:
    """Split the indices of two groups of equal total size until they agree, position by position.

    Returns the splits of `a` and of `b`; after both, the groups have the same sizes in the same order. An
    index of size 1 without a partner is split into nothing. CannotEdit where the sizes do not nest (4·6
    against 3·8).
    """
    used = {*taken}

    sizes_a: list[list[dims.Dim]] = [[] for _ in a]
    sizes_b: list[list[dims.Dim]] = [[] for _ in b]
    rest_a = [i.size for i in a]
    rest_b = [i.size for i in b]
    p = q = 0
    while p < len(a) or q < len(b):
        left = rest_a[p] if p < len(a) else None
        right = rest_b[q] if q < len(b) else None
        if 1 in (left, right) and left != right:
            p += left == 1
            q += right == 1
            continue
        if left is None or right is None:
            raise CannotEdit(f"modes of sizes {_sizes(a)} and {_sizes(b)} do not nest")
        if left == right:
            taken_size, rest_a[p], rest_b[q] = left, 1, 1
        elif (over := dims.divide(left, right)) is not None:
            taken_size, rest_a[p], rest_b[q] = right, over, 1
        elif (over := dims.divide(right, left)) is not None:
            taken_size, rest_a[p], rest_b[q] = left, 1, over
        else:
            raise CannotEdit(f"modes of sizes {_sizes(a)} and {_sizes(b)} do not nest")
        sizes_a[p].append(taken_size)
        sizes_b[q].append(taken_size)
        p += rest_a[p] == 1
        q += rest_b[q] == 1
    return (
        {i.name: _parts(i, s, used) for i, s in zip(a, sizes_a, strict=True) if len(s) != 1},
        {i.name: _parts(i, s, used) for i, s in zip(b, sizes_b, strict=True) if len(s) != 1},
    )


def _sizes(axis: Axis) -> str:
    return "·".join(str(i.size) for i in axis) or "1"


def inline(consumer: Network, producer: Network, max_terms: int = 64) -> Network:
    """Put `producer` in the place of its value inside `consumer`: the two networks become one.

    ``producer: h = x[b, i] W[i, h]``, ``consumer: y = h[b, (h1 h2)] V[h2, o]`` gives
    ``y = x[b, i] W[i, (h1 h2)] V[h2, o]``. Sums multiply out, so biases pass through the layers behind them.
    CannotEdit where the modes do not nest or the result would have more than `max_terms` terms.
    """
    value = producer.output.name
    consumer = _align(consumer, producer)
    terms: list[Term] = []
    for term in consumer.terms:
        uses = [k for k, t in enumerate(term.tensors) if t.name == value and not t.is_core]
        for choice in itertools.product(range(len(producer.terms)), repeat=len(uses)):
            terms.append(_expand(term, dict(zip(uses, choice, strict=True)), producer, consumer))
            if len(terms) > max_terms:
                raise CannotEdit(f"more than {max_terms} terms")
    return replace(consumer, terms=tuple(terms))


def _align(consumer: Network, producer: Network) -> Network:
    """Split the consumer's indices as far as the producer's output demands (and never the other way round)."""
    while True:
        for tensor in consumer.operands:
            if tensor.name != producer.output.name:
                continue
            for axis, other in zip(tensor.axes, producer.output.axes, strict=True):
                splits, _ = refine(axis, other, consumer.indices)
                if splits:
                    consumer = substitute(consumer, splits)
                    break
            else:
                continue
            break
        else:
            return consumer


def _expand(term: Term, choice: Mapping[int, int], producer: Network, consumer: Network) -> Term:
    """One term of the product: each use of the producer replaced by one of the producer's terms."""
    groups: list[list[Tensor]] = []
    orders: list[Tree] = []
    used = {*consumer.indices}
    lost: list[Index] = []
    windows = list(term.windows)
    for position, tensor in enumerate(term.tensors):
        if position not in choice:
            groups.append([tensor])
            orders.append(0)
            continue
        copy = fresh_indices(producer, used)
        mapping: dict[str, Axis] = {}
        for axis, other in zip(tensor.axes, copy.output.axes, strict=True):
            _, splits = refine(axis, other, used | {*copy.indices})
            copy = substitute(copy, splits)
        for axis, other in zip(tensor.axes, copy.output.axes, strict=True):
            mapping |= {theirs.name: (ours,) for ours, theirs in zip(axis, other, strict=True)}
        copy = substitute(copy, mapping)
        chosen = copy.terms[choice[position]]
        used |= {*copy.indices}
        has = {*chosen.indices, *(w.out for w in chosen.windows)}
        lost += [i for i in tensor.indices if i.name not in has]
        groups.append(list(chosen.tensors))
        orders.append(chosen.order)
        windows += chosen.windows

    tensors = [t for group in groups for t in group]
    offsets = list(itertools.accumulate((len(g) for g in groups), initial=0))
    order = map_tree(term.order, lambda p: map_tree(orders[p], lambda q: q + offsets[p]))
    # the sum over an index that nothing is left to carry is a factor of its size
    present = {i.name for t in tensors for i in t.indices} | {i.name for i in consumer.output.indices}
    windows = [w for w in windows if not _reads_all_of(w, lost)]
    present |= {w.axis for w in term.windows}
    for index in dict.fromkeys(lost):
        if index.name in present or index.size == 1:
            continue
        if not isinstance(index.size, int):
            raise CannotEdit(f"a sum over the symbolic size {index.size} of a value that does not depend on it")
        tensors.append(Tensor(f"size_{index.size}", (), np.asarray(index.size, consumer.dtype)))
        order = (order, len(tensors) - 1)
    result = Term(tuple(tensors), order, windows=tuple(windows))
    wrong = wrong_windows(result, consumer.output) if windows else ""
    if wrong:
        raise CannotEdit(f"it would be {wrong}")
    return result


def _reads_all_of(window: Window, lost: Collection[Index]) -> bool:
    """Whether a window slides over what is the same at every place, and nowhere leaves it: a sum over its kernel."""
    return not any(window.padding) and window.axis in {i.name for i in lost}


def drop_tensors(term: Term, positions: Collection[int]) -> Term:
    """A term without some of its tensors, the others renumbered in its order."""
    kept = [p for p in range(len(term.tensors)) if p not in positions]
    number = {old: new for new, old in enumerate(kept)}

    def join(a: Tree | None, b: Tree | None) -> Tree | None:
        return b if a is None else a if b is None else (a, b)

    order = fold_tree(term.order, number.get, join)
    return Term(tuple(term.tensors[p] for p in kept), () if order is None else order, windows=term.windows)


def outside(term: Term, positions: Collection[int], output: Iterable[Index]) -> set[str]:
    """Names of the indices that something other than the tensors at `positions` needs."""
    others = (t for p, t in enumerate(term.tensors) if p not in positions)
    return {i.name for t in others for i in t.indices} | {i.name for i in output} | term.slid


def merged_axes(term: Term, positions: Collection[int], output: Iterable[Index]) -> tuple[Index, ...]:
    """The indices that the contraction of some tensors of a term keeps, in order of first use."""
    needed = outside(term, positions, output)
    found = {i.name: i for p in sorted(positions) for i in term.tensors[p].indices}
    return tuple(i for name, i in found.items() if name in needed)


def merge_tensors(
    term: Term, positions: Collection[int], output: Iterable[Index], dtype: str, shapes_only: bool = False
) -> Term:
    """Contract some cores of a term into one, which takes the place of the first of them.

    The contraction runs in float64, in the order of the term, and is rounded once. A core larger than what it is
    made of keeps its recipe. With `shapes_only` nothing is computed: the new core is all zeros and takes no memory.
    """
    order = drop_tensors(replace(term, steps=None), {*range(len(term.tensors))} - {*positions}).order
    return merge_groups(term, [(tuple(sorted(positions)), order)], output, dtype, shapes_only)


def merge_groups(
    term: Term,
    groups: Sequence[tuple[Sequence[int], Tree]],
    output: Iterable[Index],
    dtype: str,
    shapes_only: bool = False,
) -> Term:
    """`merge_tensors` for several disjoint groups of cores at once, each with an order of its own: the order's leaf k
    is the k-th of the group's ascending positions."""
    held = Counter(name for t in term.tensors for name in {i.name for i in t.indices})
    held.update([*(i.name for i in output), *term.slid])
    tensors = list(term.tensors)
    for positions, order in groups:
        tensors[positions[0]] = _merged([term.tensors[p] for p in positions], order, held, dtype, shapes_only)
    gone = {p for positions, _ in groups for p in positions[1:]}
    return drop_tensors(replace(term, tensors=tuple(tensors), steps=None, slices=()), gone)


def _merged(cores: Sequence[Tensor], order: Tree, held: Mapping[str, int], dtype: str, shapes_only: bool) -> Tensor:
    """One core for several; `held` counts the tensors that have each index, with the output."""
    inside = Counter(name for core in cores for name in {i.name for i in core.indices})
    found = {i.name: i for core in cores for i in core.indices}
    keep = tuple(i for name, i in found.items() if held[name] > inside[name])
    if shapes_only:
        data = np.broadcast_to(np.zeros((), dtype), [int(i.size) for i in keep])
    else:
        with np.errstate(over="ignore"):  # a float16 product may not fit: for the caller to see
            data = merge(cores, order, keep).astype(dtype)
    recipe = None if shapes_only else Recipe.where_smaller(Term(tuple(cores), order), keep)
    return Tensor(merged_name([c.name for c in cores]), tuple((i,) for i in keep), data, recipe, sources_of(cores))


def in_order(core: Tensor, first: Iterable[Index]) -> Tensor:
    """A core of one axis an index with those of its indices that `first` has behind the others, in that order."""
    places = {index.name: place for place, index in enumerate(first)}
    order = sorted(range(len(core.axes)), key=lambda axis: places.get(core.indices[axis].name, -1))
    return permuted(core, order)


def permuted(core: Tensor, order: Sequence[int]) -> Tensor:
    """A core with its indices in another order, one axis for each."""
    indices, recipe = core.indices, core.recipe
    if recipe is not None:
        kept = len(recipe.kept) == len(indices)
        recipe = Recipe(recipe.term, tuple(recipe.kept[k] for k in order)) if kept else None
    return replace(core, axes=tuple((indices[k],) for k in order), data=core.array().transpose(order), recipe=recipe)


def merged_name(names: Sequence[str]) -> str:
    """``fc.factor_0*factor_1`` for the product of ``fc.factor_0`` and ``fc.factor_1``."""
    parts = list(dict.fromkeys(part for name in names for part in _factors_of(name)))
    stem = parts[0].rpartition(".")[0]
    short = [parts[0], *(p.removeprefix(f"{stem}.") if stem else p for p in parts[1:])]
    return "*".join(short) if len(short) <= 6 else f"{short[0]}*...{len(short) - 2}...*{short[-1]}"


def _factors_of(name: str) -> list[str]:
    first, *rest = name.split("*")
    stem = first.rpartition(".")[0]
    return [first, *(r if "." in r or not stem else f"{stem}.{r}" for r in rest)]


def _numbered(name: str, taken: Collection[str]) -> str:
    """``name.2``, ``name.3``, ...: the first that is new."""
    return next(n for k in itertools.count(2) if (n := f"{name}.{k}") not in taken)


def unique_cores(program: Program) -> Program:
    """Rename cores so that one name means one array, as the verifier demands."""
    owner: dict[str, object] = dict(program.weights)
    by_id: dict[int, str] = {id(a): n for n, a in program.weights.items()}

    def renamed(t: Tensor) -> Tensor:
        if t.data is not None and owner.setdefault(t.name, t.data) is not t.data:
            name = by_id.get(id(t.data)) or _numbered(t.name, owner)
            owner[name] = t.data
            t = replace(t, name=name, origins=t.sources)
        if t.data is not None:
            by_id.setdefault(id(t.data), t.name)
        return t

    def visit(network: Network) -> Network:
        terms = (replace(term, tensors=tuple(map(renamed, term.tensors))) for term in network.terms)
        return replace(network, terms=tuple(terms))

    return replace(program, nodes=tuple(map_networks(node, visit) for node in program.nodes))


def map_terms(program: Program, edit: Callable[[Network, Term], Term]) -> Program:
    """A program with every term of every network replaced, and one name for one array again."""

    def visit(network: Network) -> Network:
        return replace(network, terms=tuple(edit(network, term) for term in network.terms))

    return unique_cores(replace(program, nodes=tuple(map_networks(node, visit) for node in program.nodes)))


def map_networks(node: Node, edit: Callable[[Network], Network]) -> Node:
    """A node with its network, or every case of its switch, replaced; an opaque node as it is."""
    if isinstance(node, Opaque):
        return node
    return replace(node, cases=tuple(map(edit, node.cases))) if isinstance(node, Switch) else edit(node)
