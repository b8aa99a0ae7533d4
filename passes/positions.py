"""Which mode of which row a model gathers: arithmetic on ids, read from a program and written into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.errors import SourceRef
from tncompile.ir import Array, Node, Opaque, Program, Ref, Tensor, Value
from tncompile.ir.edit import fresh, permuted, unique_cores
from tncompile.ir.opaque import Arg

EMBEDDING, INDEX, INDEX_SELECT = "aten.embedding.default", "aten.index.Tensor", "aten.index_select.default"
FLOOR, REMAINDER = ("aten.floor_divide.default", "aten.floor_divide.Scalar"), "aten.remainder.Scalar"
_IDS = ("int64", "int32")


@dataclass(frozen=True)
class Position:
    """``ids // stride % modulus``, without the last where `modulus` is None: then it reaches to the end."""

    ids: str
    stride: int = 1
    modulus: int | None = None

    def before(self, other: Position, size: int) -> Position | None:
        """The position in the modes of both as one, `other`'s of a `size` being the inner ones; None where they are
        not neighbours."""
        if self.ids != other.ids or other.modulus != size or self.stride != other.stride * size:
            return None
        return Position(self.ids, other.stride, None if self.modulus is None else self.modulus * size)


def read(name: str, nodes: Mapping[str, Node]) -> Position:
    """What an integer value is of the ids it was computed from."""
    node = nodes.get(name)
    if not isinstance(node, Opaque) or len(node.args) != 2 or node.kwargs:
        return Position(name)
    source, number = node.args
    if not isinstance(source, Ref) or not isinstance(number, int) or number < 1 or node.output.dtype not in _IDS:
        return Position(name)
    inner = read(source.name, nodes)
    if node.target in FLOOR and (inner.modulus is None or inner.modulus % number == 0):
        return Position(inner.ids, inner.stride * number, None if inner.modulus is None else inner.modulus // number)
    if node.target == REMAINDER and (inner.modulus is None or inner.modulus % number == 0):
        return Position(inner.ids, inner.stride, number)
    return Position(name)


@dataclass(frozen=True)
class Gather:
    """``source[..., ids, ...]``: rows of a tensor along `axes`, at run-time ids of one shape, one for each axis.

    The axes of the ids stand at `at` in the result, in the place of all of `axes`.
    """

    source: str
    axes: tuple[int, ...]
    ids: tuple[Value, ...]
    at: int


def gather_of(node: Node, values: Mapping[str, Value]) -> Gather | None:
    """The gather that a node is; None for any other. `values` are those of the program."""
    if not isinstance(node, Opaque) or not node.args or not isinstance(node.args[0], Ref):
        return None
    source, rest = node.args[0].name, node.args[1:]
    picks: dict[int, Arg] = {}
    if node.target == EMBEDDING:
        picks[0] = rest[0]
    elif node.target == INDEX_SELECT and isinstance(rest[0], int) and node.output.shape is not None:
        picks[rest[0] % len(node.output.shape)] = rest[1]
    elif node.target == INDEX and isinstance(rest[0], tuple):
        picks = {axis: pick for axis, pick in enumerate(rest[0]) if pick is not None}
    ids = [values.get(pick.name) if isinstance(pick, Ref) else None for pick in picks.values()]
    known = tuple(value for value in ids if value is not None and value.dtype in _IDS and value.shape is not None)
    if not known or len(known) < len(ids) or len({value.shape for value in known}) > 1:
        return None
    axes = tuple(picks)
    together = axes == tuple(range(axes[0], axes[0] + len(axes)))
    return Gather(source, axes, known, axes[0] if together else 0)


def tables_of(program: Program) -> dict[str, tuple[str, Array]]:
    """Names and arrays of the weights of two axes that rows are gathered from, by the value of the rows."""
    found = {}
    for node in program.nodes:
        if isinstance(node, Opaque) and node.target == EMBEDDING and isinstance(node.args[0], Ref):
            name = node.args[0].name
            if name in program.weights and program.weights[name].ndim == 2:
                found[node.output.name] = (name, program.weights[name])
    return found


class Writer:
    """Adds gathers of rows, and the arithmetic on ids that they need, before a node of a program; each once."""

    def __init__(self, program: Program) -> None:
        self.values = dict(program.values)
        self.weights: dict[str, Array] = dict(program.weights)
        self.origins = dict(program.origins)
        self.made = dict(program.made)
        self._taken = {*self.values, *program.arrays}
        self._known: dict[object, str] = {}
        self._tables: dict[object, str] = {}

    def program(self, program: Program, nodes: Sequence[Node]) -> Program:
        """The program with other nodes, and the weights that they gather from."""
        nodes = tuple(nodes)
        return unique_cores(replace(program, nodes=nodes, weights=self.weights, origins=self.origins, made=self.made))

    def name(self, wanted: str) -> str:
        """A name that nothing has yet."""
        name = fresh(wanted, self._taken)
        self._taken.add(name)
        return name

    def table(self, core: Tensor, modes: Sequence[str]) -> tuple[str, Tensor]:
        """The weight that has a core's modes `modes`, in that order, as rows, and the core with those indices first.

        The weight has two axes: the modes, and all else.
        """
        first = [i for name in modes for i in core.indices if i.name == name]
        rest = [i for i in core.indices if i.name not in modes]
        order = [core.indices.index(i) for i in (*first, *rest)]
        key = (id(core.data), tuple(order), len(modes), tuple(i.size for i in core.indices))
        if key not in self._tables:
            turned = permuted(core, order)
            array = turned.array().reshape(math.prod(int(i.size) for i in first), -1)
            kept = core.data is not None and array.shape == core.data.shape and order == sorted(order)
            name = core.name if kept else f"{core.name}.rows"
            if not kept or self.weights.get(name) is not core.data:
                name = self.name(name) if name in self.weights or not kept else name
                array = core.data if kept and core.data is not None else np.array(array, order="C")
                self.weights[name] = array
                self.origins[name] = core.sources
                if turned.recipe is not None:
                    self.made[name] = replace(turned, name=name, axes=(tuple(first), tuple(rest)), data=array)
            self._tables[key] = name
        rows_of = replace(core, axes=(tuple(first), tuple(rest)), data=None, recipe=None, origins=())
        return self._tables[key], rows_of

    def rows(self, weight: str, ids: str, wanted: str, layer: str, source: SourceRef) -> tuple[Opaque, Value]:
        """The node that gathers rows of a weight, and its value: [*shape of ids, columns]."""
        array, shape = self.weights[weight], self.values[ids].shape or ()
        value = Value(self.name(wanted), str(array.dtype), (*shape, array.shape[1]))
        self.values[value.name] = value
        return Opaque(layer, EMBEDDING, (Ref(weight), Ref(ids)), (), value, source), value

    def position(self, parts: Sequence[tuple[Position, int]], like: Opaque | None = None) -> tuple[list[Opaque], str]:
        """The nodes that compute a row-major position in several modes (each with its size), and its value."""
        joined: list[tuple[Position, int]] = []
        for part, size in parts:
            both = joined[-1][0].before(part, size) if joined else None
            if both is not None:
                joined[-1] = (both, joined[-1][1] * size)
            else:
                joined.append((part, size))
        nodes: list[Opaque] = []
        layer, source = (like.name, like.source) if like is not None else ("", SourceRef())

        def call(target: str, value: str, *args: Arg) -> str:
            key = (target, value, args)
            if key not in self._known:
                ids = self.values[value]
                output = Value(self.name(f"{target.split('.')[1]}_{value}"), ids.dtype, ids.shape)
                self.values[output.name] = output
                self._known[key] = output.name
                nodes.append(Opaque(layer, target, (Ref(value), *args), (), output, source))
            return self._known[key]

        total: str | None = None
        for part, size in joined:
            value = part.ids if part.stride == 1 else call(FLOOR[0], part.ids, part.stride)
            if part.modulus is not None:
                value = call(REMAINDER, value, part.modulus)
            if total is None:
                total = value
            else:
                total = call("aten.add.Tensor", call("aten.mul.Tensor", total, size), Ref(value))
        assert total is not None
        return nodes, total
