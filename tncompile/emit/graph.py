"""Writing ONNX nodes for arrays whose axes are groups of named indices.

A `Laid` array is an ONNX value together with what its physical axes mean. Everything a contraction needs is
to bring such an array into other groups (a Reshape) or another order (a Transpose); both are left out where
the array already is as wanted.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as onnx

from tncompile.cost.layouts import AT_LEAST, halfway
from tncompile.errors import UnsupportedError
from tncompile.ir import Array, Dim, Tensor, dims

Group = tuple[str, ...]
Groups = tuple[Group, ...]
Symbols = Mapping[str, tuple[onnx.Value, int, int]]
"""Where the model's inputs show the size of each symbol: a value, its axis, and how many times the size it has."""


_CHANNELS = ((0, 2, 3, 1), (0, 3, 1, 2))
_ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div"}


@dataclass(frozen=True)
class Laid:
    """An ONNX value and, for each of its axes, the names of the indices it runs over (none: size 1)."""

    value: onnx.Value
    axes: Groups

    @property
    def order(self) -> Group:
        """All indices in row-major order."""
        return tuple(name for axis in self.axes for name in axis)


@dataclass(frozen=True)
class Arranged:
    """A core that was contracted at compile time, and the groups of its indices that an initializer holds it in."""

    core: Tensor
    groups: Groups

    def note(self, value: onnx.Value) -> None:
        """Remember on an initializer what it holds, where its core's recipe still says how to make it."""
        recipe = self.core.recipe
        if recipe is not None and [i.size for i in recipe.kept] == [i.size for i in self.core.indices]:
            value.meta.setdefault(_ARRANGED, self)

    @staticmethod
    def of(value: onnx.Value) -> Arranged | None:
        """What was noted on an initializer."""
        found = value.meta.get(_ARRANGED)
        return found if isinstance(found, Arranged) else None


_ARRANGED = "tncompile.arranged"
_LARGE = 1 << 20  # bytes


@dataclass
class Weights:
    """The initializers of a model: equal arrays are stored once.

    `shared` has the arrays that other nodes of the model read as they are, by identity: where such an array
    is wanted in another order, a Transpose of the shared one is emitted, which ONNX Runtime folds at load.
    """

    shared: Mapping[int, onnx.Value] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    values: dict[bytes, onnx.Value] = field(default_factory=dict)

    def add(self, name: str, array: Array) -> onnx.Value:
        """The initializer that holds this array."""
        array = np.asarray(array, order="C")
        return self._add(name, array, lambda: onnx.tensor(array, name=name))

    def arranged(self, name: str, array: Array, perm: Sequence[int], shape: Sequence[int]) -> onnx.Value:
        """The initializer that holds an array transposed, then reshaped.

        A large one is made when it is written, and not kept: all permuted weights at once are a second model.
        """

        def made() -> Array:
            return np.ascontiguousarray(array.transpose(perm)).reshape(shape)

        def lazy() -> onnx.TensorProtocol:
            dtype = onnx.DataType.from_numpy(array.dtype)
            return onnx.LazyTensor(lambda: onnx.tensor(made()), dtype=dtype, shape=onnx.Shape(shape), name=name)

        first = made()
        if array.nbytes < _LARGE or np.may_share_memory(first, array):
            return self._add(name, first, lambda: onnx.tensor(first, name=name))
        return self._add(name, first, lazy)

    def _add(self, name: str, array: Array, content: Callable[[], onnx.TensorProtocol]) -> onnx.Value:
        key = self._key(array)
        if key not in self.values:
            name = next(n for k in range(len(self.taken) + 1) if (n := f"{name}.{k}" if k else name) not in self.taken)
            self.taken.add(name)
            value = content()
            value.name = name
            self.values[key] = onnx.Value(
                name=name,
                type=onnx.TensorType(onnx.DataType.from_numpy(array.dtype)),
                shape=onnx.Shape(array.shape),
                const_value=value,
            )
        return self.values[key]

    def known(self, value: onnx.Value, array: Array) -> None:
        """Use an initializer that is there already wherever its array is wanted."""
        self.values.setdefault(self._key(np.asarray(array, order="C")), value)

    def holds(self, array: Array) -> bool:
        """Whether an initializer has this array."""
        return self._key(np.asarray(array, order="C")) in self.values

    @staticmethod
    def _key(array: Array) -> bytes:
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data)
        digest.update(f"{array.dtype}{array.shape}".encode())
        return digest.digest()


class GraphWriter:
    """Collects the ONNX nodes of one network. `sizes` gives the size of every index name."""

    def __init__(
        self,
        prefix: str,
        sizes: Mapping[str, Dim],
        dtype: str,
        weights: Weights,
        operands: Sequence[Laid],
        symbols: Symbols,
    ) -> None:
        self.prefix = prefix
        self.sizes = sizes
        self.itemsize = np.dtype(dtype).itemsize
        self.weights = weights
        self.operands = operands
        self.symbols = symbols
        self.nodes: list[onnx.Node] = []

    def op(self, op_type: str, inputs: Sequence[onnx.Value], **attributes: Any) -> onnx.Value:
        """Append a node of one output."""
        number = sum(n.op_type == op_type for n in self.nodes)
        name = f"{self.prefix}/{op_type}" + (f"_{number}" if number else "")
        node = onnx.node(op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, values: Sequence[int]) -> onnx.Value:
        """A small integer initializer: a shape or a list of axes."""
        return self.weights.add(name, np.asarray(values, np.int64))

    def size(self, names: Sequence[str]) -> Dim:
        """Product of sizes."""
        return dims.product(self.sizes[n] for n in names)

    def symbolic(self, name: str) -> bool:
        """Whether an index has a size known only at run time."""
        return not isinstance(self.sizes[name], int)

    # ------------------------------------------------------------------------ groups and order

    def regroup(self, laid: Laid, groups: Groups) -> Laid:
        """Reshape to other groups of the same order of indices."""
        if laid.axes == groups:
            return laid
        sizes = [self.size(group) for group in groups]
        shape: list[int | None] = []
        for position, (group, size) in enumerate(zip(groups, sizes, strict=True)):
            if isinstance(size, int):
                shape.append(size)
            elif position < len(laid.axes) and laid.axes[position] == group:
                shape.append(0)  # copied from the input
            else:
                shape.append(None)
        unknown = [k for k, size in enumerate(shape) if size is None]
        if not unknown and shape.count(0) == 1:  # -1 says the same and survives a later Reshape fusion
            shape[shape.index(0)] = -1
        if len(unknown) <= 1:
            fixed = [-1 if size is None else size for size in shape]
            target = self.constant(f"shape_{'x'.join(map(str, fixed)).replace('-1', 'n') or 'scalar'}", fixed)
        else:
            target = self._run_time_shape(shape, groups)
        return Laid(self.op("Reshape", [laid.value, target]), groups)

    def _run_time_shape(self, shape: Sequence[int | None], groups: Groups) -> onnx.Value:
        """Shape arithmetic: only where two or more run-time sizes move, which one -1 cannot express."""
        parts: list[onnx.Value] = []
        for size, group in zip(shape, groups, strict=True):
            if size is not None:
                parts.append(self.constant(f"size_{size}", [size]))
                continue
            factors = [self._run_time_size(n) for n in group if self.symbolic(n)]
            static = dims.product(s for n in group if isinstance(s := self.sizes[n], int))
            if static != 1:
                factors.append(self.constant(f"size_{static}", [int(static)]))
            value = factors[0]
            for factor in factors[1:]:
                value = self.op("Mul", [value, factor])
            parts.append(value)
        return self.op("Concat", parts, axis=0)

    def _run_time_size(self, name: str) -> onnx.Value:
        for operand in self.operands:
            for axis, group in enumerate(operand.axes):
                rest = [n for n in group if n != name]
                if name in group and not any(self.symbolic(n) for n in rest):
                    size = self.op("Shape", [operand.value], start=axis, end=axis + 1)
                    if rest:
                        size = self.op("Div", [size, self.constant(f"size_{self.size(rest)}", [int(self.size(rest))])])
                    return size
        return self._expression(ast.parse(str(self.sizes[name]), mode="eval").body)

    def _expression(self, node: ast.expr) -> onnx.Value:
        """A size that no operand shows on an axis of its own, computed from the model's inputs."""
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return self.op(_ARITHMETIC[type(node.op)], [self._expression(node.left), self._expression(node.right)])
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return self.constant(f"size_{node.value}", [node.value])
        if isinstance(node, ast.Name) and node.id in self.symbols:
            value, axis, times = self.symbols[node.id]
            size = self.op("Shape", [value], start=axis, end=axis + 1)
            return size if times == 1 else self.op("Div", [size, self.constant(f"size_{times}", [times])])
        raise UnsupportedError(f"the size {ast.unparse(node)} cannot be read off the model's inputs")

    def permute(self, laid: Laid, order: Group, image: bool = False) -> Laid:
        """Transpose to another order of indices, with neighbours that stay together as one axis, or in two steps where
        those are faster. Not so where the channels move of an image that a convolution has made or is to read: ONNX
        Runtime moves them as it puts channels in blocks, or back."""
        if laid.order == order:
            return laid
        made = laid.value.producer()
        for move in _CHANNELS if image or (made is not None and made.op_type == "Conv") else ():
            axes = tuple(laid.axes[k] for k in move) if len(laid.axes) == len(move) else ()
            if axes and tuple(name for axis in axes for name in axis) == order:
                return Laid(self.op("Transpose", [laid.value], perm=move), axes)
        sizes = {name: AT_LEAST if self.symbolic(name) else int(self.sizes[name]) for name in laid.order}
        middle = halfway(laid.order, order, sizes, self.itemsize)
        if middle is not None:
            laid = self.permute(laid, middle)
        runs: list[Group] = []
        for name in laid.order:
            if runs and self._joins(runs[-1], name, order):
                runs[-1] = (*runs[-1], name)
            else:
                runs.append((name,))
        if middle is not None:
            runs.append(())  # an axis of size 1, or ONNX Runtime makes one Transpose of both and a Reshape behind
        laid = self.regroup(laid, tuple(runs))
        wanted = sorted(runs, key=lambda run: order.index(run[0]) if run else len(order))
        perm = [runs.index(run) for run in wanted]
        return Laid(self.op("Transpose", [laid.value], perm=perm), tuple(wanted))

    def _joins(self, run: Group, name: str, order: Group) -> bool:
        follows = order.index(name) == order.index(run[-1]) + 1
        return follows and not (self.symbolic(name) and any(map(self.symbolic, run)))

    def arrange(self, laid: Laid, groups: Groups) -> Laid:
        """Bring an array into given groups, in given order."""
        return self.regroup(self.permute(laid, tuple(n for g in groups for n in g)), groups)

    def gather(self, names: Sequence[str], axes: Groups = ()) -> Groups:
        """Few axes for some indices: `axes` where they fit, else one axis, or one for each run-time size."""
        names = tuple(names)
        kept: list[Group] = []
        for axis in axes:
            if names[sum(map(len, kept)) :][: len(axis)] == axis:
                kept.append(axis)
            else:
                break
        if sum(map(len, kept)) == len(names) and (kept or not names):
            return tuple(kept)
        groups: list[Group] = []
        for name in names:
            if groups and not (self.symbolic(name) and any(map(self.symbolic, groups[-1]))):
                groups[-1] = (*groups[-1], name)
            else:
                groups.append((name,))
        return tuple(groups)
