"""The products of a term in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tncompile.emit.module.steps import Product, Turn

Tensor = torch.Tensor


def product(step: Product, left: Tensor, right: Tensor) -> Tensor:
    """The contraction of two tensors that have one axis for each index."""
    result = _product(step, left, right)
    return result if step.laid is None else result.permute(step.laid).contiguous()


def add_product(step: Product, left: Tensor, right: Tensor, total: Tensor) -> bool:
    """Add a contraction to a total that lies as its result does, in place; whether one call does that."""
    if step.form != "matmul" or step.batch or step.laid is not None or not total.is_contiguous():
        return False
    left, right = _turned(left, step.turns[0]), _turned(right, step.turns[1])
    k = step.summed
    m, summed, n = math.prod(left.shape[: left.ndim - k]), math.prod(right.shape[:k]), math.prod(right.shape[k:])
    total.view(m, n).addmm_(_as(left, m, summed), _as(right, summed, n))
    return True


def _product(step: Product, left: Tensor, right: Tensor) -> Tensor:
    left, right = _turned(left, step.turns[0]), _turned(right, step.turns[1])
    a, b = left.shape, right.shape
    r, k = step.batch, step.summed
    if step.form == "outer_last":
        rows, columns, kept = a[: left.ndim - r], b[: right.ndim - r], a[left.ndim - r :]
        m, n, size = math.prod(rows), math.prod(columns), math.prod(kept)
        return _shaped(_as(left, m, 1, size) * _as(right, 1, n, size), (*rows, *columns, *kept))
    kept, rows, columns = a[:r], a[r : left.ndim - k], b[r + k :]
    m, n, size, summed = math.prod(rows), math.prod(columns), math.prod(kept), math.prod(b[r : r + k])
    if step.form == "outer":
        result = _as(left, size, m, 1) * _as(right, size, 1, n)
    elif not r:
        result = torch.mm(_as(left, m, summed), _as(right, summed, n))
    elif not rows and not columns:
        result = (_as(left, size, summed) * _as(right, size, summed)).sum(1)
    else:
        result = torch.bmm(_as(left, size, m, summed), _as(right, size, summed, n))
    return _shaped(result, (*kept, *rows, *columns))


def _turned(tensor: Tensor, turn: Turn) -> Tensor:
    """Permuted, where that changes anything: a view takes time forward and backward."""
    return tensor if turn == (*range(len(turn)),) else tensor.permute(turn)


def _as(tensor: Tensor, *shape: int) -> Tensor:
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of a result that nothing else has, which autograd then lets be added to in place."""
    if fresh.shape == shape:
        return fresh
    view: Tensor = torch.ops.aten._unsafe_view.default(fresh, shape)
    return view
