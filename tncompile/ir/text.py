"""The text of a program: stable, readable, and it parses back to an equal program.

    program
      input x: float32[batch, 784]
      weight conv.weight: float32[16, 1, 3, 3]
      network h: float32[batch, 1024], layer fc1  # fc1, model.py:12: h = self.fc1(x)
        indices batch=batch, o1=32, o2=32, i1=4, i2=196, r=8
        term
          0 operand x[batch, (i1 i2)]
          1 core fc1.factor_0[i1, o1, r]
          2 core fc1.factor_1[r, i2, o2]
          order ((0 1) 2)
          steps
            3 = gemm(0, 1) -> [batch, i2, o1, r]
            4 = gemm(3, 2) -> [batch, o1, o2]
        term
          0 core fc1.bias[(o1 o2)]
        -> h[batch, (o1 o2)]
      opaque relu: float32[batch, 1024] = aten.relu.default(%h)
      output y = relu

A line ``switch batch <= 8, 64`` says that the next networks, one more than there are limits, compute one value, each
for sizes up to its limit. A network is the sum of its terms; `layer` names the module that it stands for. Brackets
hold one entry for each physical axis; ``(i1 i2)`` is an axis that groups several indices, ``()`` one of size 1. `order`
and the steps number the tensors of their term, then the results of earlier steps. ``slices r=4`` between the two says
that the term is computed in four parts of the index r; ``window i, k -> h, stride=2, dilation=1, padding=1 1``
before them that the operand is read at i = 2*h + k - 1. ``%h`` is a value or a weight; a bare word
in the arguments of an opaque node is a constant of torch's. A name that is not a plain word is a JSON string.
``#`` starts a comment; the one behind a node is its source. The numbers of weights and cores are not in the
text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tncompile.errors import SourceRef
from tncompile.ir.core import Node, Program, Switch, Tensor
from tncompile.ir.cursor import NAME, RESERVED, SPELLING, is_plain_dim
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Arg, Constant, Opaque, Ref, Value
from tncompile.ir.parser import parse
from tncompile.ir.tree import Tree, left_to_right

__all__ = ["dump", "dump_node", "parse"]


def dump(program: Program, sources: bool = True) -> str:
    """The text of a program; without `sources`, no comment says where a node comes from."""
    lines = ["program"]
    lines += [f"  input {_value(v)}" for v in program.inputs]
    for name, array in program.weights.items():
        lines.append(f"  weight {_value(Value(name, str(array.dtype), array.shape))}")
    for node in program.nodes:
        lines += [f"  {line}" for line in _node_lines(node, sources)]
    lines += [f"  output {_name(public)} = {_name(value)}" for public, value in program.outputs]
    return "\n".join(lines) + "\n"


def dump_node(node: Node, sources: bool = True) -> str:
    """The text of one node, as it stands in the text of its program."""
    return "\n".join(_node_lines(node, sources))


def _node_lines(node: Node, sources: bool) -> Iterator[str]:
    layer = f", layer {_name(node.name)}" if node.name else ""
    comment = _comment(node.source) if sources else ""
    if isinstance(node, Opaque):
        args = [_arg(a) for a in node.args] + [f"{_name(k)}={_arg(v)}" for k, v in node.kwargs]
        yield f"opaque {_value(node.output)}{layer} = {_name(node.target)}({', '.join(args)}){comment}"
        return
    if isinstance(node, Switch):
        yield f"switch {_name(node.symbol)} <= {', '.join(map(str, node.limits))}"
        for case in node.cases:
            yield from (f"  {line}" for line in _node_lines(case, sources))
        return
    yield f"network {_value(node.value)}{layer}{comment}"
    # dict keys, not node.indices: the text of a network that gives an index two sizes must show both
    indices = dict.fromkeys(i for t in (node.output, *node.tensors) for i in t.indices)
    if indices:
        yield "  indices " + ", ".join(f"{_name(i.name)}={_dim(i.size)}" for i in indices)
    for term in node.terms:
        yield "  term"
        for position, tensor in enumerate(term.tensors):
            yield f"    {position} {'core' if tensor.is_core else 'operand'} {_tensor(tensor)}"
        for w in term.windows:
            names = f"{_name(w.axis)}, {_name(w.kernel)} -> {_name(w.out)}"
            padding = " ".join(map(str, w.padding))
            yield f"    window {names}, stride={w.stride}, dilation={w.dilation}, padding={padding}"
        if len(term.tensors) > 1 or term.order != left_to_right(range(len(term.tensors))):
            yield f"    order {_tree(term.order)}"
        if term.slices:
            yield "    slices " + ", ".join(f"{_name(s.index)}={s.count}" for s in term.slices)
        if term.steps is not None:
            yield "    steps"
            for number, step in enumerate(term.steps, start=len(term.tensors)):
                result = ", ".join(map(_name, step.order))
                yield f"      {number} = {_name(step.form)}({step.left}, {step.right}) -> [{result}]"
    yield f"  -> {_tensor(node.output)}"


def _name(name: str) -> str:
    return name if NAME.fullmatch(name) else json.dumps(name)


def _dim(dim: Dim) -> str:
    return dim if isinstance(dim, str) and is_plain_dim(dim) else json.dumps(dim)


def _value(value: Value) -> str:
    shape = "" if value.shape is None else f"[{', '.join(map(_dim, value.shape))}]"
    return f"{_name(value.name)}: {_name(value.dtype)}{shape}"


def _tensor(tensor: Tensor) -> str:
    groups = (" ".join(_name(i.name) for i in axis) for axis in tensor.axes)
    axes = (g if len(axis) == 1 else f"({g})" for g, axis in zip(groups, tensor.axes, strict=True))
    return f"{_name(tensor.name)}[{', '.join(axes)}]"


def _tree(tree: Tree) -> str:
    return str(tree) if isinstance(tree, int) else f"({' '.join(map(_tree, tree))})"


def _arg(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{_name(arg.name)}"
    if isinstance(arg, Constant):
        plain = SPELLING.fullmatch(arg.spelling) and arg.spelling not in RESERVED
        return arg.spelling if plain else f"constant {json.dumps(arg.spelling)}"
    if isinstance(arg, tuple):
        return f"[{', '.join(map(_arg, arg))}]"
    if isinstance(arg, str):
        return json.dumps(arg)
    # not repr(): numpy's subclass of float has its own
    return float.__repr__(arg) if isinstance(arg, float) else repr(arg)


def _comment(source: SourceRef) -> str:
    if source == SourceRef():
        return ""
    text = f"{source}: {source.code}" if source.code else str(source)
    return "  # " + "".join(c if c.isprintable() else " " for c in text).strip()
