"""Hypothesis strategies that draw networks and programs; `verify` accepts all that they draw.

Sizes are small and the index space of a network is bounded, so that nothing has to be skipped. Numbers are
multiples of 1/8 between -1 and 1, so that small sums of products are exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tncompile.errors import SourceRef
from tncompile.ir import (
    Array,
    Axis,
    Dim,
    Index,
    Network,
    Opaque,
    Program,
    Slice,
    Step,
    Switch,
    Tensor,
    Term,
    Tree,
    Value,
    dims,
)
from tncompile.ir.core import Node
from tncompile.ir.opaque import Arg, Constant, Ref

SPACE = 4096
"""Upper bound of the product of all static index sizes that a network adds to those of its operands."""

SYMBOLS: dict[str, int] = {"batch": 3, "seq": 2}
"""The symbolic sizes that strategies draw, with values to evaluate them at."""

TOPOLOGIES = ("chain", "ring", "tree", "hyperedge", "free")


T = TypeVar("T")


class Draw(Protocol):
    """What draws from a strategy: `draw` of a composite strategy, or `data.draw` of a test."""

    def __call__(self, strategy: SearchStrategy[T], label: Any = None) -> T: ...


# --- names -------------------------------------------------------------------------------------------------

plain_names = st.from_regex(r"[a-z][a-z0-9_]{0,3}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True)
odd_names = st.one_of(
    st.sampled_from(["/layer/MatMul_output_0", "onnx::MatMul_12", "a*b", "0.weight", 'say "x"', "a, b", "[0]", "#"]),
    st.sampled_from(
        ["", " ", "->", "term", "order", "core", "indices", "slices", "steps", "é", "new\nline", "back\\slash"]
    ),
    st.text(max_size=6),
)
names = st.one_of(plain_names, plain_names, odd_names)


def fresh_name(draw: Draw, taken: set[str], from_: SearchStrategy[str] = names) -> str:
    """A name that is not taken; it is from now on."""
    name = draw(from_)
    while name in taken:
        name += "'" if len(name) % 2 else "2"
    taken.add(name)
    return name


# --- numbers and shapes ------------------------------------------------------------------------------------


def numbers(shape: Sequence[int], dtype: str, seed: int) -> Array:
    """Multiples of 1/8 between -1 and 1."""
    return np.asarray(np.random.default_rng(seed).integers(-8, 9, shape) / 8, dtype)


def feeds(values: Sequence[Value], seed: int = 0, symbols: Mapping[str, int] = SYMBOLS) -> dict[str, Array]:
    """Numbers for values that flow in."""
    shapes = [[dims.evaluate(d, symbols) for d in v.shape or ()] for v in values]
    return {v.name: numbers(s, v.dtype, seed + k) for k, (v, s) in enumerate(zip(values, shapes, strict=True))}


sizes = st.integers(1, 3)
static_dims = st.sampled_from([1, 2, 3, 4, 6, 8])
readable_dims: SearchStrategy[Dim] = st.one_of(
    static_dims, static_dims, st.sampled_from(["batch", "seq", "2*batch", "(seq + 1)", "4*(seq + 1)*batch"])
)
shapes: SearchStrategy[tuple[Dim, ...]] = st.lists(readable_dims, max_size=3).map(tuple)


def factor_dim(draw: Draw, dim: Dim) -> list[Dim]:
    """Sizes whose product is `dim`, in any order, with a 1 among them now and then."""
    if isinstance(dim, str):
        integer, names = dims._factors(dim)
        if draw(st.booleans()):
            return [dim]
        return draw(st.permutations([*factor_dim(draw, integer), *names.elements()]))
    parts: list[Dim] = []
    while dim > 1:
        divisor = draw(st.sampled_from([d for d in range(2, dim + 1) if dim % d == 0]))
        parts.append(divisor)
        dim //= divisor
    if draw(st.integers(0, 5)) == 0:
        parts.insert(draw(st.integers(0, len(parts))), 1)
    return parts


# --- networks ----------------------------------------------------------------------------------------------


@dataclass
class Builder:
    """Draws one network: the indices of all its terms, and the names that are taken in its program."""

    draw: Draw
    dtype: str
    taken: set[str] = field(default_factory=set)
    known: list[tuple[str, Array]] = field(default_factory=list)
    index_names: SearchStrategy[str] = plain_names
    pool: dict[str, Index] = field(default_factory=dict)
    space: int = 1
    used: set[str] = field(default_factory=set)

    def index(self, size: Dim | None = None) -> Index:
        """A new index, of size 1 where the index space is used up."""
        if size is None:
            size = self.draw(sizes) if self.space * 3 <= SPACE else 1
        if isinstance(size, int):
            self.space *= size
        index = Index(fresh_name(self.draw, self.used, self.index_names), size)
        self.pool[index.name] = index
        return index

    def index_of(self, size: Dim) -> Index:
        """An index of a given size, old or new."""
        old = [i for i in self.pool.values() if i.size == size]
        if old and (self.space > SPACE or self.draw(st.booleans())):
            return self.draw(st.sampled_from(old))
        return self.index(size)

    def axes_of(self, shape: Sequence[Dim]) -> tuple[Axis, ...]:
        """Groups of indices with the sizes of `shape`."""
        return tuple(tuple(self.index_of(size) for size in factor_dim(self.draw, dim)) for dim in shape)

    def group(self, indices: Sequence[Index]) -> tuple[Axis, ...]:
        """Indices in any order, grouped into axes, with an empty group now and then."""
        axes: list[list[Index]] = []
        for index in self.draw(st.permutations(list(indices))):
            if axes and self.draw(st.integers(0, 3)) == 0:
                axes[-1].append(index)
            else:
                axes.append([index])
        if self.draw(st.integers(0, 7)) == 0:
            axes.insert(self.draw(st.integers(0, len(axes))), [])
        return tuple(map(tuple, axes))

    def array(self, shape: Sequence[Dim]) -> Array:
        """New numbers for a core."""
        return numbers([int(d) for d in shape], self.dtype, self.draw(st.integers(0, 2**16)))

    def core(self, bonds: Sequence[Index]) -> Tensor:
        """A core with some bonds, indices of other tensors, indices of its own; sometimes a tied weight."""
        tied = [(n, a) for n, a in self.known if str(a.dtype) == self.dtype and a.size]
        if tied and self.draw(st.integers(0, 7)) == 0:
            name, array = self.draw(st.sampled_from(tied))
            return Tensor(name, self.axes_of(array.shape), array)
        indices = list(bonds)
        static = [i for i in self.pool.values() if isinstance(i.size, int)]
        for _ in range(self.draw(st.integers(0, 2))):
            shared = bool(static) and self.draw(st.booleans())
            indices.append(self.draw(st.sampled_from(static)) if shared else self.index())
        # an index that stands twice is kept now and then, for it means a diagonal
        if self.draw(st.integers(0, 4)):
            indices = list(dict.fromkeys(indices))
        axes = self.group(indices[:6])
        name = fresh_name(self.draw, self.taken)
        tensor = Tensor(name, axes)
        data = self.array(tensor.shape)
        self.known.append((name, data))
        return Tensor(name, axes, data)

    def bonds(self, count: int) -> list[list[Index]]:
        """For each of `count` tensors, its bonds in a network of some topology."""
        kind = self.draw(st.sampled_from(TOPOLOGIES))
        ends: list[list[int]]
        if kind == "tree":
            ends = [[self.draw(st.integers(0, n - 1)), n] for n in range(1, count)]
        elif kind == "hyperedge":
            ends = [list(range(count))]
        elif kind == "free":
            some = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True)
            ends = self.draw(st.lists(some, max_size=4))
        else:
            ends = [[n, n + 1] for n in range(count - 1)] + ([[count - 1, 0]] if kind == "ring" else [])
        bonds = [(self.index(), set(e)) for e in ends]
        return [[index for index, e in bonds if n in e] for n in range(count)]

    def term(self, operands: Sequence[Value], cores: int) -> Term:
        """One term that reads `operands`."""
        tensors = [Tensor(v.name, self.axes_of(v.shape or ())) for v in operands]
        tensors += [self.core(b) for b in self.bonds(cores)] if cores else []
        tensors = self.draw(st.permutations(tensors))
        return Term(tuple(tensors), order_of(self.draw, len(tensors)))

    def output(self, name: str, terms: Sequence[Term]) -> Tensor:
        """Some indices of the terms, and now and then one that no term has."""
        present = list({i.name: i for t in terms for i in t.indices.values()}.values())
        chosen = [i for i in present if self.draw(st.booleans())][:6]
        if self.draw(st.integers(0, 5)) == 0:
            chosen.append(self.index())
        return Tensor(name, self.group(chosen))


def order_of(draw: Draw, count: int) -> Tree:
    """Any contraction order of so many tensors, of two branches or more at each place."""
    trees: list[Tree] = list(range(count))
    while len(trees) > 1:
        width = 3 if len(trees) > 2 and draw(st.integers(0, 5)) == 0 else 2
        chosen = draw(st.permutations(range(len(trees))))[:width]
        merged = tuple(trees[k] for k in chosen)
        trees = [t for k, t in enumerate(trees) if k not in chosen] + [merged]
    return trees[0] if trees else ()


def schedule_of(draw: Draw, term: Term, output: Axis) -> Term:
    """The term with steps that contract it pair by pair in any order."""
    kept = {i.name for i in output}
    live = {p: [*dict.fromkeys(i.name for i in t.indices)] for p, t in enumerate(term.tensors)}
    steps = []
    while len(live) > 1:
        left, right = draw(st.permutations(sorted(live)))[:2]
        pair = dict.fromkeys((*live.pop(left), *live.pop(right)))
        result = [n for n in pair if n in kept or any(n in other for other in live.values())]
        steps.append(Step(left, right, draw(st.sampled_from(["gemm", "matmul", "mul", "odd form"])), tuple(result)))
        live[len(term.tensors) + len(steps) - 1] = result
    return Term(term.tensors, term.order, tuple(steps), slices_of(draw, term, kept))


def slices_of(draw: Draw, term: Term, output: set[str]) -> tuple[Slice, ...]:
    """Slices of some indices that the term shares with the output or between its tensors."""
    holders = {n: sum(n in {i.name for i in t.indices} for t in term.tensors) for n in term.indices}
    shared = [i for n, i in term.indices.items() if n in output or holders[n] > 1]
    most = {i.name: i.size if isinstance(i.size, int) else 9 for i in shared}
    long = [n for n, size in most.items() if size > 1]
    chosen = draw(st.lists(st.sampled_from(long), max_size=2, unique=True)) if long else []
    return tuple(Slice(n, draw(st.integers(2, most[n]))) for n in chosen)


def draw_network(
    builder: Builder,
    values: Sequence[Value],
    name: str,
    read: Sequence[Value] = (),
    max_tensors: int = 8,
    max_terms: int = 3,
    scheduled: bool = False,
) -> Network:
    """A network over some of `values`, and over all of `read`."""
    draw = builder.draw
    terms = []
    for number in range(draw(st.integers(1, max_terms))):
        operands = list(read) if number == 0 else []
        room = min(3, max_tensors) - len(operands)
        if values and room > 0:
            operands += draw(st.lists(st.sampled_from(list(values)), max_size=room))
        cores = draw(st.integers(0 if operands else 1, max(1, max_tensors - len(operands))))
        terms.append(builder.term(operands, min(cores, max_tensors - len(operands))))
    output = builder.output(name, terms)
    if scheduled:
        terms = [schedule_of(draw, t, output.indices) for t in terms]
    source = draw(st.sampled_from([SourceRef(), SourceRef("net.fc1", "model.py", 12, "y = self.fc1(x)")]))
    layer = draw(st.sampled_from(["", name, "net.fc1"]))
    return Network(layer, tuple(terms), output, builder.dtype, source)


def draw_switch(draw: Draw, network: Network, symbol: str) -> Switch:
    """A switch of some networks that compute the same as one does, in other orders and with other index names."""
    limits = sorted(draw(st.sets(st.integers(1, 99), min_size=1, max_size=3)))
    return Switch(symbol, tuple(limits), (network, *(draw_case(draw, network) for _ in limits)))


def draw_case(draw: Draw, network: Network) -> Network:
    """The same sum of terms: its terms and their tensors in another order, perhaps with other index names."""
    suffix = draw(st.sampled_from(["", "_2"]))

    def renamed(tensor: Tensor) -> Tensor:
        axes = tuple(tuple(Index(i.name + suffix, i.size) for i in axis) for axis in tensor.axes)
        return replace(tensor, axes=axes)

    output = renamed(network.output)
    terms = []
    for term in draw(st.permutations(network.terms)):
        tensors = draw(st.permutations([renamed(t) for t in term.tensors]))
        new = Term(tuple(tensors), order_of(draw, len(tensors)))
        terms.append(new if term.steps is None else schedule_of(draw, new, output.indices))
    return replace(network, terms=tuple(terms), output=output)


def values_of(dtype: str, names: Sequence[str] = ("x", "z")) -> SearchStrategy[tuple[Value, ...]]:
    """Values of any readable shapes."""
    return st.tuples(*(st.builds(Value, st.just(name), st.just(dtype), shapes) for name in names))


@st.composite
def networks(
    draw: DrawFn,
    dtype: str = "float64",
    name: str = "y",
    max_tensors: int = 8,
    max_terms: int = 3,
    inputs: SearchStrategy[tuple[Value, ...]] | None = None,
    index_names: SearchStrategy[str] = plain_names,
) -> tuple[tuple[Value, ...], Network]:
    """A network and the values that may flow into it.

    Chains, trees, rings, hyperedges and loose tensors; several terms; grouped axes; repeated indices; size-1
    indices; symbolic sizes; tied cores; output indices that some term, or none, has.
    """
    values = draw(values_of(dtype) if inputs is None else inputs)
    builder = Builder(draw, dtype, {name, *(v.name for v in values)}, index_names=index_names)
    return values, draw_network(builder, values, name, max_tensors=max_tensors, max_terms=max_terms)


# --- programs ----------------------------------------------------------------------------------------------

floats = st.floats(allow_nan=False) | st.just(math.nan)
odd_dims: SearchStrategy[Dim] = st.one_of(
    st.integers(0, 2**40),
    readable_dims,
    st.sampled_from(["Max(1, seq)", "seq**2", "(seq + 1)//2"]),
    st.text(max_size=5),
)


def arguments(references: Sequence[str]) -> SearchStrategy[Arg]:
    """Arguments of an opaque node."""
    spelling = st.sampled_from(["torch.float32", "torch.strided", "None", "inf", "device(type='cpu')"]) | st.text(
        max_size=5
    )
    leaves: list[SearchStrategy[Any]] = [
        st.none(), st.booleans(), st.integers(), floats, st.text(max_size=8), spelling.map(Constant),
    ]  # fmt: skip
    if references:
        leaves += [st.sampled_from(list(references)).map(Ref)] * 3
    return st.recursive(st.one_of(leaves), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def draw_opaque(draw: Draw, references: Sequence[str], name: str) -> Opaque:
    """An opaque node with any arguments and any value."""
    target = draw(st.sampled_from(["aten.relu.default", "operator.getitem", "aten._softmax.default", "odd target"]))
    args = tuple(draw(st.lists(arguments(references), max_size=3)))
    keys = st.sampled_from(["dim", "dtype", "alpha", "odd key"])
    kwargs = tuple(draw(st.dictionaries(keys, arguments(references), max_size=2)).items())
    value = draw(
        st.one_of(
            shapes.map(lambda s: Value(name, "float32", s)),
            st.lists(odd_dims, max_size=3).map(lambda s: Value(name, "int64", tuple(s))),
            st.sampled_from(["scalar", "tuple"]).map(lambda d: Value(name, d)),
        )
    )
    source = draw(st.sampled_from([SourceRef(), SourceRef(module="act"), SourceRef("", "model.py", 7)]))
    return Opaque(draw(st.sampled_from([name, "act.1", ""])), target, args, kwargs, value, source)


@st.composite
def programs(draw: DrawFn, scheduled: bool = False, max_nodes: int = 4) -> Program:
    """A program of networks, switches and opaque nodes with odd names, weights and outputs."""
    taken: set[str] = set()

    def new() -> str:
        return fresh_name(draw, taken)

    dtypes = st.sampled_from(["float32", "float32", "float64"])
    values = [Value(new(), draw(dtypes), draw(shapes)) for _ in range(draw(st.integers(0, 3)))]
    inputs = tuple(values)
    weights = {
        new(): numbers(draw(st.lists(sizes, max_size=3)), draw(st.sampled_from(["float32", "int64"])), seed)
        for seed in range(draw(st.integers(0, 2)))
    }
    known = list(weights.items())
    symbols = [s for s in SYMBOLS if any(dims.shows(d, s) for v in inputs for d in v.shape or ())]
    nodes: list[Node] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        name = new()
        if draw(st.booleans()):
            dtype = draw(dtypes)
            builder = Builder(draw, dtype, taken, known, index_names=names)
            readable = [v for v in values if v.dtype == dtype and v.shape is not None]
            network = draw_network(builder, readable, name, max_tensors=4, max_terms=2, scheduled=scheduled)
            switched = symbols and draw(st.integers(0, 3)) == 0
            nodes.append(draw_switch(draw, network, draw(st.sampled_from(symbols))) if switched else network)
        else:
            nodes.append(draw_opaque(draw, [*(v.name for v in values), *weights], name))
        values.append(nodes[-1].value)
    shown = draw(st.lists(st.sampled_from(values), max_size=3)) if values else []
    public: set[str] = set()
    outputs = tuple((fresh_name(draw, public), v.name) for v in shown)
    return Program(inputs, tuple(nodes), outputs, weights)
