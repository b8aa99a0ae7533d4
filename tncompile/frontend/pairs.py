"""Complex tensors of a traced graph as real ones, with an axis of 2 behind the others as `torch.view_as_real` has it.

A product of complex tensors becomes one contraction with a constant core, the multiplication table
``table[a, b, c]``: so complex networks stay networks, and the passes decide where the table goes.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from tncompile.errors import UnsupportedError

_aten = torch.ops.aten
Node = torch.fx.Node
_SAME = {
    *(_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.resolve_conj.default),
    *(_aten.neg.default, _aten.view_as_real.default, _aten.view_as_complex.default, _aten.contiguous.default),
}
_DIM_FIRST = {
    *(_aten.select.int, _aten.slice.Tensor, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.transpose.int),
    _aten.permute.default,
}
_SUMS: dict[Any, Any] = {
    **dict.fromkeys((_aten.sum.default, _aten.sum.dim_IntList), _aten.sum.dim_IntList),
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim), _aten.mean.dim),
}
_TRANSFORMS = {_aten.fft_fft.default, _aten.fft_ifft.default, _aten.fft_rfft.default, _aten.fft_irfft.default}
LONGEST_TRANSFORM = 4096
"""A Fourier transform is a product with its matrix, which for more points would be too large."""


def is_complex(node: Any) -> bool:
    """Whether a node's value is a complex tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def as_pairs(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with real tensors only; its graph is edited in place. UnsupportedError for an operation on complex
    numbers that has no rule here."""
    return _Pairs(exported).run()


class _Pairs:
    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        self.graph = exported.graph
        self.pairs: dict[Node, Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.added: list[InputSpec] = []
        self.mode = next(n.meta["val"].fake_mode for n in self.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))

    def run(self) -> torch.export.ExportedProgram:
        """Rewrite every node that has to do with complex numbers."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and is_complex(node):
                node.meta["val"] = self._real(node.meta["val"])
                self.pairs[node] = node
            elif node.op == "output":
                node.args = torch.fx.node.map_arg(node.args, lambda n: self.pairs.get(n, n))
            elif is_complex(node) or any(n in self.pairs for n in node.all_input_nodes):
                self._rewrite(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        exported, signature = self.exported, self.exported.graph_signature
        (results,) = self.graph.output_node().args
        outputs = [
            OutputSpec(s.kind, TensorArgument(n.name) if isinstance(n, Node) else s.arg, s.target)
            for s, n in zip(signature.output_specs, results, strict=True)
        ]
        examples = torch.utils._pytree.tree_map_only(torch.Tensor, _parts, exported.example_inputs)
        return torch.export.ExportedProgram(
            exported.graph_module,
            self.graph,
            ExportGraphSignature([*self.added, *signature.input_specs], outputs),
            {name: _parts(tensor) for name, tensor in exported.state_dict.items()},
            exported.range_constraints,
            exported.module_call_graph,
            examples,
            {**{name: _parts(value) for name, value in exported.constants.items()}, **self.constants},
        )

    def _real(self, value: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return value.new_empty([*value.shape, 2], dtype=value.real.dtype)

    def _rewrite(self, node: Node) -> None:
        if node.target is _aten._assert_tensor_metadata.default:  # of the dtype that is about to go
            self.graph.erase_node(node)
            return
        rule = _RULES.get(node.target)
        self.node = node
        with self.graph.inserting_before(node):
            result = None if rule is None else rule(self, *node.args, **node.kwargs)
        if result is None:
            raise UnsupportedError(
                f"{node.target} on complex numbers is not supported; write it on real and imaginary parts "
                "(torch.view_as_real)"
            )
        if is_complex(node):
            self.pairs[node] = result
        else:
            node.replace_all_uses_with(result)

    # ------------------------------------------------------------------------ building blocks

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
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(name)
            node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
            self.constants[name] = tensor
            self.added.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
        found: Node = next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)
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

    def einsum(self, equation: str, operands: Sequence[Node]) -> Node | None:
        """An einsum in which some operands are complex."""
        left, arrow, output = equation.replace(" ", "").partition("->")
        if not arrow:
            return None
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


def _parts(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_complex():
        return value
    parts = torch.view_as_real(value.detach().resolve_conj()).contiguous()
    return torch.nn.Parameter(parts, value.requires_grad) if isinstance(value, torch.nn.Parameter) else parts


# ------------------------------------------------------------------------------------ rules


def _same(b: _Pairs, x: Node, **_: Any) -> Node | None:
    if b.node.target is _aten.neg.default:
        return b.call(_aten.neg.default, b.pair(x))
    return b.pairs.get(x, x)


def _along(b: _Pairs, x: Node, dim: Any, *rest: Any, **kwargs: Any) -> Node:
    """Operations whose dims count from the end, where there now is one more."""
    target, ndim = b.node.target, x.meta["val"].ndim + (b.node.target is _aten.unsqueeze.default)

    def positive(d: int) -> int:
        return d + ndim if d < 0 else d

    if target is _aten.permute.default:
        return b.call(target, b.pairs[x], [*map(positive, dim), ndim])
    if target is _aten.transpose.int:
        return b.call(target, b.pairs[x], positive(dim), positive(rest[0]))
    dims = [*map(positive, dim)] if isinstance(dim, (list, tuple)) else positive(dim)
    return b.call(target, b.pairs[x], dims, *rest, **kwargs)


def _summed(
    b: _Pairs, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Node | None:
    """A sum or a mean; over all axes where none is named, but never over that of the pair."""
    if dtype is not None and not dtype.is_complex:
        return None
    pair, ndim = b.pair(x), x.meta["val"].ndim
    wanted = None if dtype is None else dtype.to_real()
    if wanted not in (None, pair.meta["val"].dtype):
        pair = b.call(_aten._to_copy.default, pair, dtype=wanted)
    dims = [dim] if isinstance(dim, int) else dim or range(ndim)
    axes = [d + ndim if d < 0 else d for d in dims] if ndim else []
    return b.call(_SUMS[b.node.target], pair, axes, keepdim) if axes else b.call(_aten.clone.default, pair)


def _shaped(b: _Pairs, x: Node, size: Sequence[Any], **_: Any) -> Node:
    return b.call(b.node.target, b.pairs[x], [*size, 2])


def _joined(b: _Pairs, parts: Sequence[Node], dim: int = 0) -> Node:
    ndim = parts[0].meta["val"].ndim + (b.node.target is _aten.stack.default)
    return b.call(b.node.target, [b.pair(p) for p in parts], dim + ndim if dim < 0 else dim)


def _sum(b: _Pairs, x: Node, y: Any, **kwargs: Any) -> Node | None:
    if not isinstance(x, Node) or not isinstance(y, Node):
        return None
    return b.call(b.node.target, b.pair(x), b.pair(y), **kwargs)


def _product(b: _Pairs, x: Any, y: Any) -> Node | None:
    if not isinstance(y, Node):
        return None if isinstance(y, complex) else b.call(b.node.target, b.pairs[x], y)
    if x in b.pairs and y in b.pairs:
        wide = b.call(_aten.unsqueeze.default, b.pairs[x], -1), b.call(_aten.unsqueeze.default, b.pairs[y], -2)
        product = b.call(_aten.mul.Tensor, *wide)
        table = b.table(product.meta["val"].dtype)
        return b.call(_aten.einsum.default, "...ab,abc->...c", [product, table])
    if y in b.pairs and b.node.target is not _aten.mul.Tensor:  # divided by a complex number
        return None
    pair, real = (x, y) if x in b.pairs else (y, x)
    return b.call(b.node.target, b.pairs[pair], b.call(_aten.unsqueeze.default, real, -1))


def _quotient(b: _Pairs, x: Any, y: Any) -> Node | None:
    return None if y in b.pairs else _product(b, x, y)


def _matmul(b: _Pairs, x: Node, y: Node) -> Node | None:
    dims = (x.meta["val"].ndim, y.meta["val"].ndim)
    equation = {(1, 1): "i,i->", (1, 2): "i,ij->j"}.get(dims) or ("...i,i->..." if dims[1] == 1 else "")
    return b.einsum(equation or "...ij,...jk->...ik", [x, y])


def _linear(b: _Pairs, x: Node, weight: Node, bias: Node | None = None) -> Node | None:
    result = b.einsum("...i,oi->...o", [x, weight])
    return result if bias is None or result is None else b.call(_aten.add.Tensor, result, b.pair(bias))


def _part(number: int) -> Callable[..., Node]:
    return lambda b, x: b.call(_aten.select.int, b.pairs[x], -1, number)


def _magnitude(b: _Pairs, x: Node) -> Node:
    pair = b.pairs[x]
    return b.call(_aten.sqrt.default, b.call(_aten.sum.dim_IntList, b.call(_aten.mul.Tensor, pair, pair), [-1]))


def _conjugate(b: _Pairs, x: Node) -> Node:
    signs = torch.tensor([1.0, -1.0], dtype=b.pairs[x].meta["val"].dtype)
    return b.call(_aten.mul.Tensor, b.pairs[x], b.constant("complex_conjugate", signs))


def _converted(b: _Pairs, x: Node, *_: Any, **__: Any) -> Node | None:
    if not is_complex(b.node):
        return None
    pair, wanted = b.pair(x), b.node.meta["val"].dtype.to_real()
    return pair if pair.meta["val"].dtype == wanted else b.call(_aten._to_copy.default, pair, dtype=wanted)


def _built(b: _Pairs, real: Node, imaginary: Node) -> Node:
    return b.call(_aten.stack.default, [real, imaginary], -1)


def _polar(b: _Pairs, magnitude: Node, angle: Node) -> Node:
    parts = [b.call(f, angle) for f in (_aten.cos.default, _aten.sin.default)]
    return _built(b, *(b.call(_aten.mul.Tensor, magnitude, part) for part in parts))


def _transform(b: _Pairs, x: Node, n: int | None = None, dim: int = -1, norm: str | None = None) -> Node | None:
    """A Fourier transform along the last axis as a product with its matrix."""
    value = x.meta["val"]
    size = value.shape[-1]
    if dim not in (-1, value.ndim - 1) or not isinstance(size, int) or size > LONGEST_TRANSFORM:
        return None
    dtype = torch.complex128 if value.dtype in (torch.float64, torch.complex128) else torch.complex64
    each = torch.eye(size, dtype=torch.float64 if x not in b.pairs else torch.complex128)
    function: Any = b.node.target
    matrix = function(each, n, -1, norm)  # [from, to]
    if x in b.pairs:  # what i makes of it too
        matrix = torch.stack([matrix, function(each * 1j, n, -1, norm)], 1)
    if matrix.is_complex():
        matrix = torch.view_as_real(matrix)
    name = f"{function._schema.name.rpartition('::')[2]}_{size}_{n or 'all'}_{norm or 'none'}_{len(matrix.shape)}"
    weight = b.constant(name, matrix.to(torch.float64 if dtype == torch.complex128 else torch.float32).contiguous())
    source = "ja" if x in b.pairs else "j"
    return b.call(
        _aten.einsum.default,
        f"...{source},{source}k{'c' * is_complex(b.node)}->...k{'c' * is_complex(b.node)}",
        [b.pairs.get(x, x), weight],
    )


_RULES: dict[Any, Callable[..., Node | None]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_DIM_FIRST, _along),
    **dict.fromkeys(_SUMS, _summed),
    **dict.fromkeys(_TRANSFORMS, _transform),
    **dict.fromkeys((_aten.view.default, _aten.reshape.default, _aten.expand.default), _shaped),
    **dict.fromkeys((_aten._unsafe_view.default,), _shaped),
    **dict.fromkeys((_aten.cat.default, _aten.stack.default), _joined),
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor), _sum),
    **dict.fromkeys((_aten.mm.default, _aten.bmm.default, _aten.matmul.default, _aten.mv.default), _matmul),
    **dict.fromkeys((_aten._to_copy.default, _aten.to.dtype), _converted),
    **dict.fromkeys((_aten._conj.default, _aten.conj_physical.default), _conjugate),
    _aten.einsum.default: lambda b, equation, operands, **_: b.einsum(equation, operands),
    _aten.mul.Tensor: _product,
    _aten.div.Tensor: _quotient,
    _aten.linear.default: _linear,
    _aten.t.default: lambda b, x: b.call(_aten.transpose.int, b.pairs[x], 0, 1),
    _aten.real.default: _part(0),
    _aten.imag.default: _part(1),
    _aten.abs.default: _magnitude,
    _aten.complex.default: _built,
    _aten.polar.default: _polar,
}
