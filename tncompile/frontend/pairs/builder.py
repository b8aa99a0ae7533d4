"""What the rules for complex operations build with: real nodes in the place of one node of the graph."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

_aten = torch.ops.aten
Node = torch.fx.Node
Rule = Callable[..., Node | None]
"""From a `Builder` and the arguments of a node to the real node in its place; None where it cannot be."""

R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[R], R]:
    """Make a function the rule of some operators."""

    def add(function: R) -> R:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return add


class NoRule(Exception):
    """Why a rule has no real node for what it is given; for the user."""


def is_complex(node: Any) -> bool:
    """Whether a node's value is a complex tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


class Builder:
    """The graph while it is rewritten: `node` is the one in whose place new ones are built.

    `pairs` has what came in the place of each complex node, `values` the complex tensor that an input or a weight was;
    `constants` and `added` are new to the program.
    """

    node: Node

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.pairs: dict[Node, Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.values: dict[Node, torch.Tensor] = {}
        self.numbers: dict[tuple[complex, torch.dtype], Node] = {}
        self.placeholders: dict[str, Node] = {}
        self.added: list[InputSpec] = []
        self.mode = next(n.meta["val"].fake_mode for n in graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node in the place of the one that is being rewritten."""
        node: Node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            value = target(*values[0], **values[1])
        kept = {k: v for k, v in self.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta = {**kept, "val": value}
        return node

    def constant(self, name: str, tensor: torch.Tensor) -> Node:
        """A constant of the model; those of one name and dtype are one."""
        name = f"{name}_{str(tensor.dtype).removeprefix('torch.')}"
        if name not in self.constants:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.placeholder(name)
            node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
            self.constants[name], self.placeholders[name] = tensor, node
            self.added.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
        return self.placeholders[name]

    def value(self, x: Node) -> torch.Tensor:
        """What a node of the graph was before it was rewritten."""
        found: torch.Tensor = self.values[x] if x in self.values else x.meta["val"]
        return found

    def pair(self, x: Any) -> Node:
        """A complex node's pair; of a real node with 0."""
        if x in self.pairs:
            return self.pairs[x]
        unit = self.constant("complex_unit", torch.tensor([1.0, 0.0], dtype=x.meta["val"].dtype))
        return self.call(_aten.mul.Tensor, self.call(_aten.unsqueeze.default, x, -1), unit)

    def table(self, dtype: torch.dtype) -> Node:
        """The multiplication table ``[a, b, c]``."""
        numbers = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]]
        return self.constant("complex_product", torch.tensor(numbers, dtype=dtype))

    def number(self, value: complex, dtype: torch.dtype) -> Node:
        """A number as a pair."""
        key = (complex(value), dtype)
        if key not in self.numbers:
            numbers = torch.tensor([value.real, value.imag], dtype=dtype)
            self.numbers[key] = self.constant(f"complex_number_{len(self.numbers)}", numbers)
        return self.numbers[key]

    def times(self, pair: Node, value: complex) -> Node:
        """A pair times a number."""
        if not value.imag:
            return self.call(_aten.mul.Tensor, pair, value.real)
        number = self.number(value, pair.meta["val"].dtype)
        product = self.call(_aten.mul.Tensor, self.call(_aten.unsqueeze.default, pair, -1), number)
        return self.call(_aten.einsum.default, "...ab,abc->...c", [product, self.table(pair.meta["val"].dtype)])

    def einsum(self, equation: str, operands: Sequence[Node]) -> Node:
        """An einsum in which some operands are complex."""
        left, arrow, output = equation.replace(" ", "").partition("->")
        if not arrow:
            output = "".join(sorted(c for c in {*left} - {*",."} if left.count(c) == 1))
            output = "..." * ("..." in left) + output
        free = [c for c in string.ascii_letters if c not in equation]
        terms, nodes = left.split(","), [self.pairs.get(x, x) for x in operands]
        part = ""
        for position, x in enumerate(operands):
            if x not in self.pairs:
                continue
            letter = free.pop()
            terms[position] += letter
            if part:
                terms.append(part + letter + free[-1])
                nodes.append(self.table(nodes[position].meta["val"].dtype))
                letter = free.pop()
            part = letter
        return self.call(_aten.einsum.default, f"{','.join(terms)}->{output}{part}", nodes)
