"""Rules for what is computed with complex numbers: sums, products, and the few functions beyond."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from tncompile.frontend.pairs.builder import Builder, Node, rule

_aten = torch.ops.aten
_SUMS: dict[Any, Any] = {
    **dict.fromkeys((_aten.sum.default, _aten.sum.dim_IntList), _aten.sum.dim_IntList),
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim), _aten.mean.dim),
}


# ------------------------------------------------------------------------------------ sums


@rule(*_SUMS)
def _summed(
    b: Builder, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Node | None:
    """A sum or a mean; over all axes where none is named, but never over that of the pair."""
    if dtype is not None and not dtype.is_complex:
        return None
    pair, ndim = b.pair(x), b.value(x).ndim
    wanted = None if dtype is None else dtype.to_real()
    if wanted not in (None, pair.meta["val"].dtype):
        pair = b.call(_aten._to_copy.default, pair, dtype=wanted)
    dims = [dim] if isinstance(dim, int) else dim or range(ndim)
    axes = [d + ndim if d < 0 else d for d in dims] if ndim else []
    return b.call(_SUMS[b.node.target], pair, axes, keepdim) if axes else b.call(_aten.clone.default, pair)


@rule(_aten.add.Tensor, _aten.sub.Tensor)
def _sum(b: Builder, x: Any, y: Any, *, alpha: complex = 1) -> Node:
    dtype = b.node.meta["val"].dtype.to_real()
    left, right = (b.pair(v) if isinstance(v, Node) else b.number(v, dtype) for v in (x, y))
    return b.call(b.node.target, left, right if alpha == 1 else b.times(right, alpha))


@rule(_aten.rsub.Scalar, _aten.rsub.Tensor)
def _reversed(b: Builder, x: Node, y: Any, alpha: complex = 1) -> Node:
    left = b.pair(y) if isinstance(y, Node) else b.number(y, b.node.meta["val"].dtype.to_real())
    return b.call(_aten.sub.Tensor, left, b.pair(x) if alpha == 1 else b.times(b.pair(x), alpha))


@rule(_aten.neg.default)
def _negative(b: Builder, x: Node) -> Node:
    return b.call(_aten.neg.default, b.pair(x))


# ------------------------------------------------------------------------------------ products


def _of_pairs(b: Builder, x: Node, y: Node) -> Node:
    wide = b.call(_aten.unsqueeze.default, x, -1), b.call(_aten.unsqueeze.default, y, -2)
    product = b.call(_aten.mul.Tensor, *wide)
    return b.call(_aten.einsum.default, "...ab,abc->...c", [product, b.table(product.meta["val"].dtype)])


@rule(_aten.mul.Tensor)
def _product(b: Builder, x: Any, y: Any) -> Node:
    if not isinstance(x, Node):
        x, y = y, x
    if not isinstance(y, Node):
        if x in b.pairs:
            return b.times(b.pairs[x], y)
        wide = b.call(_aten.unsqueeze.default, x, -1)  # a real tensor times a complex number
        return b.call(_aten.mul.Tensor, wide, b.number(y, b.node.meta["val"].dtype.to_real()))
    if x in b.pairs and y in b.pairs:
        return _of_pairs(b, b.pairs[x], b.pairs[y])
    pair, real = (x, y) if x in b.pairs else (y, x)
    return b.call(_aten.mul.Tensor, b.pairs[pair], b.call(_aten.unsqueeze.default, real, -1))


@rule(_aten.div.Tensor)
def _quotient(b: Builder, x: Any, y: Any) -> Node:
    if not isinstance(y, Node):
        if isinstance(y, complex):
            return b.times(b.pair(x), 1 / y)
        return b.call(_aten.div.Tensor, b.pairs[x], y)
    if y not in b.pairs:
        return b.call(_aten.div.Tensor, b.pairs[x], b.call(_aten.unsqueeze.default, y, -1))
    return _of_pairs(b, b.pair(x), _inverse(b, y))


@rule(_aten.reciprocal.default)
def _inverse(b: Builder, x: Node) -> Node:
    """The conjugate divided by the square of the magnitude."""
    pair = b.pairs[x]
    square = b.call(_aten.sum.dim_IntList, b.call(_aten.mul.Tensor, pair, pair), [-1], True)
    return b.call(_aten.div.Tensor, _conjugate(b, x), square)


@rule(_aten.pow.Tensor_Scalar)
def _power(b: Builder, x: Node, exponent: Any) -> Node | None:
    if exponent not in (1, 2, 3):
        return None
    result = b.pairs[x]
    for _ in range(int(exponent) - 1):
        result = _of_pairs(b, result, b.pairs[x])
    return result


@rule(_aten.einsum.default)
def _einsum(b: Builder, equation: str, operands: Sequence[Node], **_: Any) -> Node:
    return b.einsum(equation, operands)


@rule(_aten.mm.default, _aten.bmm.default, _aten.matmul.default, _aten.mv.default)
def _matmul(b: Builder, x: Node, y: Node) -> Node:
    dims = (b.value(x).ndim, b.value(y).ndim)
    equation = {(1, 1): "i,i->", (1, 2): "i,ij->j"}.get(dims) or ("...i,i->..." if dims[1] == 1 else "")
    return b.einsum(equation or "...ij,...jk->...ik", [x, y])


@rule(_aten.linear.default)
def _linear(b: Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    result = b.einsum("...i,oi->...o", [x, weight])
    return result if bias is None else b.call(_aten.add.Tensor, result, b.pair(bias))


@rule(_aten.addmm.default, _aten.baddbmm.default, _aten.addmv.default)
def _added(b: Builder, base: Node, x: Node, y: Node, *, beta: complex = 1, alpha: complex = 1) -> Node:
    product = _matmul(b, x, y)
    product = product if alpha == 1 else b.times(product, alpha)
    return b.call(_aten.add.Tensor, product, b.pair(base) if beta == 1 else b.times(b.pair(base), beta))


@rule(_aten.tensordot.default)
def _tensordot(b: Builder, x: Node, y: Node, dims_x: Sequence[int], dims_y: Sequence[int]) -> Node | None:
    ranks = b.value(x).ndim, b.value(y).ndim
    letters = string.ascii_letters
    if sum(ranks) > len(letters) - 4:  # the pairs need some
        return None
    left, right = [*letters[: ranks[0]]], [*letters[ranks[0] : sum(ranks)]]
    for p, q in zip(dims_x, dims_y, strict=True):
        right[q] = left[p]
    summed = {left[p] for p in dims_x}
    output = [c for c in (*left, *right) if c not in summed]
    return b.einsum(f"{''.join(left)},{''.join(right)}->{''.join(output)}", [x, y])


@rule(_aten.outer.default, _aten.ger.default)
def _outer(b: Builder, x: Node, y: Node) -> Node:
    return b.einsum("i,j->ij", [x, y])


@rule(_aten.dot.default)
def _dot(b: Builder, x: Node, y: Node) -> Node:
    return b.einsum("i,i->", [x, y])


@rule(_aten.vdot.default)
def _vdot(b: Builder, x: Node, y: Node) -> Node:
    return b.call(_aten.sum.dim_IntList, _of_pairs(b, _conjugate(b, x), b.pairs[y]), [0])


@rule(_aten.trace.default)
def _trace(b: Builder, x: Node) -> Node:
    return b.einsum("ii->", [x])


@rule(_aten.kron.default)
def _kron(b: Builder, x: Node, y: Node) -> Node | None:
    """The axes of both side by side, then as one."""
    rank = max(b.value(x).ndim, b.value(y).ndim)
    letters = string.ascii_lowercase
    left, right = letters[rank - b.value(x).ndim : rank], letters[2 * rank - b.value(y).ndim : 2 * rank]
    output = "".join(c for k in range(rank) for c in (letters[k], letters[rank + k]) if c in left + right)
    wide = b.einsum(f"{left},{right}->{output}", [x, y])
    sizes = [n if isinstance(n, int) else -1 for n in b.value(b.node).shape]
    return b.call(_aten.reshape.default, wide, [*sizes, 2]) if sizes.count(-1) <= 1 else None


@rule(_aten.linalg_multi_dot.default)
def _multi_dot(b: Builder, matrices: Sequence[Node]) -> Node:
    letters, terms = string.ascii_lowercase, []
    for k, matrix in enumerate(matrices):
        both = letters[k : k + 2]
        terms.append(both if b.value(matrix).ndim == 2 else both[1:] if k == 0 else both[:1])
    output = "".join(c for c in terms[0][:-1] + terms[-1][1:])
    return b.einsum(f"{','.join(terms)}->{output}", matrices)


# ------------------------------------------------------------------------------------ functions


@rule(_aten._conj.default, _aten.conj_physical.default)
def _conjugate(b: Builder, x: Node) -> Node:
    signs = torch.tensor([1.0, -1.0], dtype=b.pairs[x].meta["val"].dtype)
    return b.call(_aten.mul.Tensor, b.pairs[x], b.constant("complex_conjugate", signs))


@rule(_aten.abs.default)
def _magnitude(b: Builder, x: Node) -> Node:
    pair = b.pairs[x]
    return b.call(_aten.sqrt.default, b.call(_aten.sum.dim_IntList, b.call(_aten.mul.Tensor, pair, pair), [-1]))


@rule(_aten.linalg_vector_norm.default)
def _norm(b: Builder, x: Node, *rest: Any, **kwargs: Any) -> Node | None:
    return None if kwargs else b.call(_aten.linalg_vector_norm.default, _magnitude(b, x), *rest)


@rule(_aten.exp.default)
def _exponential(b: Builder, x: Node) -> Node:
    parts = [b.call(_aten.select.int, b.pairs[x], -1, number) for number in (0, 1)]
    around = [b.call(f, parts[1]) for f in (_aten.cos.default, _aten.sin.default)]
    scale = b.call(_aten.unsqueeze.default, b.call(_aten.exp.default, parts[0]), -1)
    return b.call(_aten.mul.Tensor, scale, b.call(_aten.stack.default, around, -1))
