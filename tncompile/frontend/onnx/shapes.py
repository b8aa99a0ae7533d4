"""Types of the values of an ONNX graph, node by node, with sizes as products of the inputs' symbols.

onnx infers one node at a time and knows a symbolic size by its name only. What computes with sizes (Shape, Gather,
Concat, ... Reshape, as exporters write a view) is followed here: a small integer tensor has *contents* that may be
symbols.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir

from tncompile.frontend.equation import NotMultilinear, einsum
from tncompile.ir import Array, Dim, Value, dims

_SMALL = 1024  # elements of a constant that onnx may look into
_CONTENTS = 64  # elements of an integer tensor whose contents are followed
Shape = tuple[Dim, ...] | None


@dataclass(frozen=True)
class Contents:
    """Elements of an integer or boolean tensor of rank 0 or 1; None where one is not known."""

    items: tuple[Dim | None, ...]
    scalar: bool = False


class Shapes:
    """What is known of the values of one graph; `constants` has those that are known at compile time."""

    def __init__(self, opsets: Mapping[str, int], constants: Mapping[str, Array], symbols: Sequence[str]) -> None:
        self.opsets = opsets
        self.constants = constants
        self.types: dict[str, onnx.TypeProto] = {}
        self.contents: dict[str, Contents] = {}
        self._taken = {*symbols}
        self._imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]

    # ------------------------------------------------------------------------------ what is known

    def value(self, name: str) -> Value:
        """A value's dtype and shape; no shape where the rank is unknown, dtype ``"tuple"`` for what is no tensor."""
        kind = self.types.get(name)
        if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
            return Value(name, "tuple")
        return Value(name, _dtype_name(kind.tensor_type.elem_type), self.shape(name))

    def shape(self, name: str) -> Shape:
        """A tensor's shape, None where it is unknown."""
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return tuple(d.dim_param or int(d.dim_value) for d in kind.tensor_type.shape.dim)

    def set(self, name: str, data_type: int, shape: Sequence[Dim | None] | None) -> None:
        """Note a tensor's type; sizes that are None get names of their own."""
        named = None if shape is None else [self.fresh() if size is None else size for size in shape]
        self.types[name] = onnx.helper.make_tensor_type_proto(data_type, named)

    def fresh(self) -> str:
        """A name for a size that nothing is known of."""
        name = next(n for k in range(len(self._taken) + 1) if (n := f"u{k}") not in self._taken)
        self._taken.add(name)
        return name

    def content(self, name: str) -> Contents | None:
        """The elements of a value, where they are followed."""
        array = self.constants.get(name)
        if array is None:
            return self.contents.get(name)
        if array.dtype.kind not in "iub" or array.ndim > 1 or array.size > _CONTENTS:
            return None
        return Contents(tuple(int(x) for x in array.reshape(-1)), array.ndim == 0)

    # ------------------------------------------------------------------------------ one node

    def infer(self, node: onnx_ir.Node, captured: Sequence[str] = ()) -> None:
        """Note the types of a node's outputs, from those of its inputs and of what its subgraphs read."""
        inferred = self._by_onnx(node, captured)
        for output in node.outputs:
            if output.name:
                self._note(output, inferred.get(output.name))
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        name = node.outputs[0].name if node.outputs else None
        if not name:
            return
        if rule is not None and self.types.get(name) is not None:
            with contextlib.suppress(NotMultilinear, ValueError, IndexError, TypeError):
                found = rule(self, node)
                if found is not None:
                    self.set(name, self.types[name].tensor_type.elem_type, found)
        follow = _FOLLOW.get(node.op_type) if node.domain == "" else None
        if follow is not None:
            with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
                contents = follow(self, node)
                if contents is not None and len(contents.items) <= _CONTENTS:
                    self.contents[name] = contents

    def _note(self, output: onnx_ir.Value, found: onnx.TypeProto | None) -> None:
        """Take what onnx inferred, or what the file says of operators that onnx does not know."""
        name = output.name or ""
        if found is None and output.type is not None:
            found = _without_symbols(onnx_ir.to_proto(output).type)
        if found is None:
            return
        self.types[name] = found
        if found.HasField("tensor_type") and found.tensor_type.HasField("shape"):
            shape = [
                d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in found.tensor_type.shape.dim
            ]
            self.set(name, found.tensor_type.elem_type, shape)

    def _by_onnx(self, node: onnx_ir.Node, captured: Sequence[str]) -> Mapping[str, onnx.TypeProto]:
        domain = node.domain
        read = [v.name for v in node.inputs if v is not None and v.name]
        types = {n: self.types[n] for n in (*read, *captured) if n in self.types}
        if (domain, node.op_type) == ("com.microsoft", "Gelu"):  # of the same shape
            return {node.outputs[0].name or "": types[read[0]]} if read[0] in types else {}
        data = {
            n: onnx.numpy_helper.from_array(array)
            for n in read
            if (array := self.constants.get(n)) is not None and array.size <= _SMALL and array.dtype.kind in "iubf"
        }
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
            found: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
                schema, onnx_ir.to_proto(node), types, data, opset_imports=self._imports
            )
            return {name: _without_symbols(t) for name, t in found.items()} if node.op_type in _BRANCHING else found
        except Exception:  # an unknown operator, or a fault of the model that ONNX Runtime will tell
            return {}


_BRANCHING = ("If", "Loop", "Scan")


def _without_symbols(found: onnx.TypeProto) -> onnx.TypeProto:
    """A type that a subgraph declares: a symbol there need not be one of ours."""
    if found.HasField("tensor_type") and found.tensor_type.HasField("shape"):
        for dim in found.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    return found


def _dtype_name(data_type: int) -> str:
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)))


# ------------------------------------------------------------------------------------ arithmetic of sizes


def add(a: Dim, b: Dim) -> Dim:
    """``a + b``."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else f"({a} + {b})"


def subtract(a: Dim, b: Dim) -> Dim:
    """``a - b``."""
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return 0 if a == b else a if b == 0 else f"({a} - {b})"


def divide(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` as ONNX divides sizes; None by 0."""
    if b == 0:
        return None
    exact = dims.divide(a, b)
    if exact is not None:
        return exact
    if "-" in f"{a}{b}":
        return None  # ONNX rounds towards zero
    return a // b if isinstance(a, int) and isinstance(b, int) else f"({a} // {b})"


# ------------------------------------------------------------------------------------ shapes


def _attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _input(node: onnx_ir.Node, position: int) -> str:
    value = node.inputs[position] if position < len(node.inputs) else None
    return "" if value is None else value.name or ""


def _reshape(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    before, target = s.shape(_input(node, 0)), s.content(_input(node, 1))
    if target is None:
        return None
    copies = not _attribute(node, "allowzero", 0)
    shape: list[Dim | None] = []
    for k, item in enumerate(target.items):
        shape.append((before[k] if before is not None else None) if item == 0 and copies else item)
    if -1 in shape:
        rest = [size for size in shape if size != -1]
        position = shape.index(-1)
        known = [size for size in rest if size is not None]
        whole = before is not None and len(known) == len(rest)
        shape[position] = dims.divide(dims.product(before or ()), dims.product(known)) if whole else None
    elif shape.count(None) == 1 and before is not None:
        known = [size for size in shape if size is not None]
        shape[shape.index(None)] = dims.divide(dims.product(before), dims.product(known))
    return shape


def _expand(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    before, target = s.shape(_input(node, 0)), s.content(_input(node, 1))
    if before is None or target is None:
        return None
    rank = max(len(before), len(target.items))
    given, wanted = ((*(1,) * (rank - len(items)), *items) for items in (before, target.items))
    return [_joined(a, b) for a, b in zip(given, wanted, strict=True)]


def _joined(a: Dim | None, b: Dim | None) -> Dim | None:
    """The size that two sizes broadcast to."""
    if b in (1, a):
        return a
    return b if a == 1 or isinstance(b, int) else a if isinstance(a, int) else None


def _constant_of_shape(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    target = s.content(_input(node, 0))
    return None if target is None else target.items


def _concat(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    shapes = [s.shape(_input(node, k)) for k in range(len(node.inputs))]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    axis = _attribute(node, "axis", 0) % len(known[0])
    result: list[Dim | None] = list(known[0])
    for k in range(len(result)):
        if k != axis:
            result[k] = next((shape[k] for shape in known if isinstance(shape[k], int)), known[0][k])
    total = known[0][axis]
    for shape in known[1:]:
        total = add(total, shape[axis])
    result[axis] = total
    return result


def _einsum(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    names = [_input(node, k) for k in range(len(node.inputs))]
    shapes = [s.shape(n) for n in names]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    equation = einsum(_attribute(node, "equation", ""), names, [len(shape) for shape in known])
    sizes: dict[Any, Dim] = {}
    for (_, labels), shape in zip(equation.terms[0].factors, known, strict=True):
        for label, size in zip(labels, shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size
    return [sizes[label] for label in equation.output]


def _slice(s: Shapes, node: onnx_ir.Node) -> Sequence[Dim | None] | None:
    """The whole of a symbolic mode is that mode; a part from its start, or without its end, is known too."""
    before, inferred = s.shape(_input(node, 0)), s.shape(node.outputs[0].name or "")
    starts, ends = s.content(_input(node, 1)), s.content(_input(node, 2))
    if before is None or inferred is None or starts is None or ends is None:
        return None
    axes = s.content(_input(node, 3)) if _input(node, 3) else Contents(tuple(range(len(starts.items))))
    steps = s.content(_input(node, 4)) if _input(node, 4) else Contents((1,) * len(starts.items))
    if axes is None or steps is None:
        return None
    result: list[Dim | None] = list(before)
    for start, end, axis, step in zip(starts.items, ends.items, axes.items, steps.items, strict=True):
        assert isinstance(axis, int)
        size = before[axis]
        if isinstance(size, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int):
            result[axis] = len(range(*slice(start, end, step).indices(size))) if step > 0 else inferred[axis]
        elif start == 0 and step == 1 and (end == size or (isinstance(end, int) and end >= 2**31 - 1)):
            result[axis] = size
        else:
            result[axis] = None
    return result


_RULES: dict[str, Callable[[Shapes, onnx_ir.Node], Sequence[Dim | None] | None]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Concat": _concat,
    "Einsum": _einsum,
    "Slice": _slice,
}


# ------------------------------------------------------------------------------------ contents


def _shape_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    shape = s.shape(_input(node, 0))
    if shape is None:
        return None
    return Contents(shape[_attribute(node, "start", 0) : _attribute(node, "end", None)])


def _gather_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    data, wanted = s.content(_input(node, 0)), s.content(_input(node, 1))
    if data is None or wanted is None or data.scalar:
        return None
    return Contents(tuple(data.items[i] if isinstance(i, int) else None for i in wanted.items), wanted.scalar)


def _slice_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    data = s.content(_input(node, 0))
    parts = [s.content(_input(node, k)) for k in (1, 2)]
    step = s.content(_input(node, 4)) if _input(node, 4) else Contents((1,))
    if data is None or step is None or any(p is None or len(p.items) != 1 for p in (*parts, step)):
        return None
    start, end, by = (p.items[0] for p in (*parts, step) if p is not None)
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(by, int)):
        return None
    return Contents(data.items[start:end:by]) if by > 0 else None


def _concat_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    parts = [s.content(_input(node, k)) for k in range(len(node.inputs))]
    shapes = [s.shape(_input(node, k)) for k in range(len(node.inputs))]
    items: list[Dim | None] = []
    for part, shape in zip(parts, shapes, strict=True):
        if part is not None:
            items += part.items
        elif shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            items += [None] * shape[0]
        else:
            return None
    return Contents(tuple(items))


def _same_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    """Cast to integers, Identity, Squeeze, Unsqueeze, Reshape: the same elements."""
    data, output = s.content(_input(node, 0)), s.value(node.outputs[0].name or "")
    if data is None or output.shape is None or len(output.shape) > 1 or np.dtype(output.dtype).kind not in "iub":
        return None
    return Contents(data.items, not output.shape)


def _elementwise(function: Callable[[Dim, Dim], Dim | None]) -> Callable[[Shapes, onnx_ir.Node], Contents | None]:
    def follow(s: Shapes, node: onnx_ir.Node) -> Contents | None:
        a, b = s.content(_input(node, 0)), s.content(_input(node, 1))
        if a is None or b is None:
            return None
        count = max(len(a.items), len(b.items))
        left, right = (x.items * count if len(x.items) == 1 else x.items for x in (a, b))
        pairs = zip(left, right, strict=True)
        items = tuple(None if x is None or y is None else function(x, y) for x, y in pairs)
        return Contents(items, a.scalar and b.scalar)

    return follow


def _equal(a: Dim, b: Dim) -> Dim | None:
    if a == b:
        return 1
    # a size is no negative number; whether a symbol is some other number is not known
    return 0 if all(isinstance(x, int) for x in (a, b)) or any(isinstance(x, int) and x < 0 for x in (a, b)) else None


def _where_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    condition, a, b = (s.content(_input(node, k)) for k in range(3))
    if condition is None or a is None or b is None:
        return None
    count = max(len(x.items) for x in (condition, a, b))
    choice, left, right = (x.items * count if len(x.items) == 1 else x.items for x in (condition, a, b))
    items = tuple(None if c is None else x if c else y for c, x, y in zip(choice, left, right, strict=True))
    return Contents(items, condition.scalar and a.scalar and b.scalar)


def _fill_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    shape, value = s.content(_input(node, 0)), _attribute(node, "value", None)
    if shape is None or value is None or len(shape.items) > 1:
        return None
    array = value.numpy()
    count = shape.items[0] if shape.items else 1
    if array.dtype.kind not in "iub" or not isinstance(count, int) or count > _CONTENTS:
        return None
    return Contents((int(array.reshape(-1)[0]),) * count, not shape.items)


def _product_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    data = s.content(_input(node, 0))
    output = s.shape(node.outputs[0].name or "")
    if data is None or output is None or None in data.items or output not in ((), (1,)):
        return None
    return Contents((dims.product(x for x in data.items if x is not None),), not output)


def _size_content(s: Shapes, node: onnx_ir.Node) -> Contents | None:
    shape = s.shape(_input(node, 0))
    return None if shape is None else Contents((dims.product(shape),), True)


_FOLLOW: dict[str, Callable[[Shapes, onnx_ir.Node], Contents | None]] = {
    "Shape": _shape_content,
    "Size": _size_content,
    "Gather": _gather_content,
    "Slice": _slice_content,
    "Concat": _concat_content,
    "Cast": _same_content,
    "Identity": _same_content,
    "Squeeze": _same_content,
    "Unsqueeze": _same_content,
    "Reshape": _same_content,
    "Add": _elementwise(add),
    "Sub": _elementwise(subtract),
    "Mul": _elementwise(lambda a, b: dims.product((a, b))),
    "Div": _elementwise(divide),
    "Equal": _elementwise(_equal),
    "Where": _where_content,
    "ConstantOfShape": _fill_content,
    "ReduceProd": _product_content,
}
