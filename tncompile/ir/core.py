"""The tensor-network IR: indices, tensors, terms, networks, programs. All immutable.

A `Network` is a sum of terms, each one einsum over any number of tensors. Splits and merges of modes are
not operations of their own: an axis of a tensor is a *group* of indices, ``x[batch, (i1 i2 i3)]``, read in
row-major order, and the empty group ``()`` is an axis of size 1. A permute is an output that lists its
indices in another order, an expand an output index that a term does not have, a bias a term made only of
cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tncompile.errors import SourceRef
from tncompile.ir import dims
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Opaque, Value
from tncompile.ir.tree import Tree, left_to_right, map_tree

Array = NDArray[Any]

NETWORK_DTYPES = ("float32", "float64", "float16")
"""What a network may be computed in, as numpy spells it."""


@dataclass(frozen=True)
class Index:
    """A named mode or bond; its size is an int, or a symbolic size (see `tncompile.ir.dims`)."""

    name: str
    size: Dim


Axis = tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a network: a core where `data` is given, else an operand that flows in at run time.

    `axes` has one group of indices for each physical axis. `name` is the weight's name, or the name of the
    value that flows in. An index may stand twice in one tensor (its diagonal is meant). `recipe` says how
    `data` came to be, where it was contracted from smaller cores; `origins` are the weights of the model that it was
    made from, where that is not the weight of this name. Both are no part of equality.
    """

    name: str
    axes: tuple[Axis, ...]
    data: Array | None = None
    recipe: Recipe | None = field(default=None, repr=False)
    origins: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_core(self) -> bool:
        """Whether the tensor is a constant known at compile time."""
        return self.data is not None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the weights of the model that a core was made from: its own, where it is one."""
        return self.origins or (self.name,)

    @property
    def indices(self) -> Axis:
        """All indices, in row-major order."""
        return tuple(index for axis in self.axes for index in axis)

    def form(self, number: Mapping[str, object]) -> object:
        """The axes, each index by its size and what `number` has for its name: equal where only names differ."""
        return tuple(tuple((number.get(i.name), i.size) for i in axis) for axis in self.axes)

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Sizes of the physical axes."""
        return tuple(dims.product(i.size for i in axis) for axis in self.axes)

    def array(self) -> Array:
        """A core's data with one axis for each index."""
        if self.data is None:
            raise ValueError(f"{self.name} is an operand and has no data")
        return self.data.reshape([int(i.size) for i in self.indices])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        return (self.name, self.axes) == (other.name, other.axes) and same_array(self.data, other.data)

    def __hash__(self) -> int:
        return hash((self.name, self.axes))


def sources_of(cores: Iterable[Tensor]) -> tuple[str, ...]:
    """The `sources` of what is made from some cores, each once."""
    return tuple(dict.fromkeys(name for core in cores for name in core.sources))


def same_array(a: Array | None, b: Array | None) -> bool:
    """Equal dtype, shape and elements (NaN equals NaN), or both None."""
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


@dataclass(frozen=True)
class Step:
    """One pairwise contraction of a scheduled term.

    `left` and `right` number the tensors of the term first, then the results of earlier steps. `form` says
    how it is computed (see `tncompile.cost.schedule`); `order` is the order of the result's indices.
    """

    left: int
    right: int
    form: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """The window of a convolution: an operand is read at ``axis = stride*out + dilation*kernel - padding[0]``.

    All three are names of indices: `axis` of the operand, `kernel` of a core, `out` of the network's output. Where
    `axis` would be outside the operand, which `padding` allows so far before and after it, the operand counts as zero.
    """

    axis: str
    kernel: str
    out: str
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of the indices that it joins: `axis`, `kernel`, `out`."""
        return self.axis, self.kernel, self.out

    def form(self, number: Mapping[str, object]) -> object:
        """The window with what `number` has for each name in its place: equal where only names differ."""
        return tuple(map(number.get, self.names)), self.stride, self.dilation, self.padding

    def length(self, axis: int, kernel: int) -> int:
        """The size of `out` for given sizes of the other two."""
        return (axis + sum(self.padding) - self.dilation * (kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Slice:
    """A term is computed `count` times, each time over a part of the index called `index`.

    The parts are summed where the index is summed, and concatenated where the output has it. They differ by one
    element at most; some are empty where a run-time size is smaller than `count`.
    """

    index: str
    count: int


@dataclass(frozen=True)
class Term:
    """One einsum of a network: every index that the network's output does not have is summed.

    `windows` join indices of its one operand to those of a kernel and of the output: a convolution. `order` is the
    order of contraction (as traced, until the pass `order` has chosen one); `steps` is its schedule, set by that pass.
    `slices` bound its memory (see the pass `limit`); its value is the same without.
    """

    tensors: tuple[Tensor, ...]
    order: Tree = ()
    steps: tuple[Step, ...] | None = None
    slices: tuple[Slice, ...] = ()
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        order = (
            left_to_right(range(len(self.tensors)))
            if self.order == ()
            else map_tree(self.order, lambda position: position)
        )
        object.__setattr__(self, "order", order)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that flow in at run time."""
        return tuple(t for t in self.tensors if not t.is_core)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The constant tensors."""
        return tuple(t for t in self.tensors if t.is_core)

    @property
    def slid(self) -> frozenset[str]:
        """Names of the indices that windows take, although no other tensor nor the output has them."""
        return frozenset(name for w in self.windows for name in (w.axis, w.kernel))

    @property
    def is_constant(self) -> bool:
        """Whether the term has cores only."""
        return not self.operands

    @property
    def indices(self) -> dict[str, Index]:
        """All indices of the term's tensors, by name, in order of first use."""
        return {i.name: i for t in self.tensors for i in t.indices}


@dataclass(frozen=True)
class Recipe:
    """How a core's data came to be: the contraction of `term`, which has cores only, with one axis for each of `kept`.

    Its indices have names of their own: those of the core may be renamed or split, its data stays in this order.
    """

    term: Term
    kept: tuple[Index, ...]

    @staticmethod
    def where_smaller(term: Term, kept: tuple[Index, ...]) -> Recipe | None:
        """The recipe, where the cores have fewer numbers than what is made of them."""
        recipe = Recipe(term, kept)
        return recipe if recipe.elements < math.prod(int(i.size) for i in kept) else None

    @property
    def elements(self) -> int:
        """Numbers in the cores it is made of, each array counted once."""
        return sum({id(core.data): core.data.size for core in self.term.tensors if core.data is not None}.values())


@dataclass(frozen=True)
class Network:
    """``output[...] = sum of terms``, each an einsum; a term without some output index is broadcast over it.

    `output` names the value and groups its indices into physical axes; `name` is the layer it stands for
    (``"fc1"``, ``"fc1+fc2"``), empty for what the model itself computes outside its layers.
    """

    name: str
    terms: tuple[Term, ...]
    output: Tensor
    dtype: str
    source: SourceRef = field(default=SourceRef(), compare=False)

    @property
    def label(self) -> str:
        """What to call the network: its layer, or its value where it is not in a layer."""
        return self.name or self.output.name

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all terms."""
        return tuple(t for term in self.terms for t in term.tensors)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Tensors that flow in, one for each use."""
        return tuple(t for t in self.tensors if not t.is_core)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """Constant tensors, one for each use."""
        return tuple(t for t in self.tensors if t.is_core)

    @property
    def moving(self) -> tuple[Term, ...]:
        """The terms that something flows into at run time."""
        return tuple(t for t in self.terms if not t.is_constant)

    @property
    def constants(self) -> tuple[Term, ...]:
        """The terms of cores alone: biases, as a rule."""
        return tuple(t for t in self.terms if t.is_constant)

    @property
    def indices(self) -> dict[str, Index]:
        """All indices by name, those of the output first."""
        return {i.name: i for i in (*self.output.indices, *(i for t in self.tensors for i in t.indices))}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values read, each once, in order of first use."""
        return tuple(dict.fromkeys(t.name for t in self.operands))

    @property
    def value(self) -> Value:
        """The value that the network computes."""
        return Value(self.output.name, self.dtype, self.output.shape)


@dataclass(frozen=True)
class Switch:
    """One value for which several networks compute the same: which of them runs is decided at run time.

    `cases[k]` serves sizes of `symbol` up to `limits[k]`, the last case all beyond; `limits` increase.
    """

    symbol: str
    limits: tuple[int, ...]
    cases: tuple[Network, ...]

    @property
    def output(self) -> Tensor:
        """The tensor that every case computes."""
        return self.cases[0].output

    @property
    def name(self) -> str:
        """The layer it stands for."""
        return self.cases[0].name

    @property
    def label(self) -> str:
        """What to call it, as a network."""
        return self.cases[0].label

    @property
    def dtype(self) -> str:
        """The dtype of the value."""
        return self.cases[0].dtype

    @property
    def source(self) -> SourceRef:
        """Where it comes from in the user's code."""
        return self.cases[0].source

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Tensors that flow in, one for each use in each case."""
        return tuple(t for case in self.cases for t in case.operands)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that any case reads, each once."""
        return tuple(dict.fromkeys(t.name for t in self.operands))

    @property
    def value(self) -> Value:
        """The value that it computes."""
        return self.cases[0].value

    def case(self, size: int) -> Network:
        """The network that runs at one size of the symbol."""
        return self.cases[sum(limit < size for limit in self.limits)]

    @property
    def ranges(self) -> tuple[str, ...]:
        """What each case serves: ``("<=8", "9-64", ">64")``."""
        first = [1, *(limit + 1 for limit in self.limits)]
        inner = [f"{a}-{b}" if a != b else str(a) for a, b in zip(first[1:], self.limits[1:], strict=False)]
        return (f"<={self.limits[0]}", *inner, f">{self.limits[-1]}")


Node = Network | Opaque | Switch


def networks_of(node: Node) -> tuple[Network, ...]:
    """The network that a node is, the cases of a switch, nothing for an opaque node."""
    if isinstance(node, Opaque):
        return ()
    return node.cases if isinstance(node, Switch) else (node,)


@dataclass(frozen=True)
class Program:
    """A traced model: inputs, nodes in order of execution, outputs, and the weights that opaque nodes read.

    `outputs` pairs each public name with the value it shows. `weights` are shared by reference with every
    edit of the program and are never written to; `origins` has the names of those that a weight was made from, where
    passes made it, and `made` the core that it is, with its recipe, where it was contracted from smaller ones. Neither
    is part of equality.
    """

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, str], ...]
    weights: Mapping[str, Array] = field(default_factory=dict)
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    made: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The tensor-network nodes, every case of a switch among them."""
        return tuple(n for node in self.nodes for n in networks_of(node))

    def sources(self, weight: str) -> tuple[str, ...]:
        """Names of the weights of the model that a weight was made from: its own, where it is one."""
        return self.origins.get(weight) or (weight,)

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every input and every node's value, by name."""
        return {v.name: v for v in (*self.inputs, *(n.value for n in self.nodes))}

    @cached_property
    def uses(self) -> dict[str, int]:
        """How often each value is read, by a node (once for each use in a network) or as an output."""
        count: dict[str, int] = {}
        for node in self.nodes:
            names = node.inputs if isinstance(node, Opaque) else [t.name for t in node.operands]
            for name in names:
                count[name] = count.get(name, 0) + 1
        for _, name in self.outputs:
            count[name] = count.get(name, 0) + 1
        return count

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Every weight and every core's data, by name."""
        cores = {t.name: t.data for n in self.networks for t in n.cores if t.data is not None}
        return {**self.weights, **cores}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return (
            (self.inputs, self.nodes, self.outputs) == (other.inputs, other.nodes, other.outputs)
            and self.weights.keys() == other.weights.keys()
            and all(same_array(a, other.weights[k]) for k, a in self.weights.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from tncompile.ir import text

        return text.dump(self)
