"""The products of a term in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tncompile.emit.module.steps import Product

Tensor = torch.Tensor


def product(step: Product, left: Tensor, right: Tensor) -> Tensor:
    """The contraction of two tensors that have one axis for each index."""
    result = _product(step, left, right)
    return result if step.laid is None else result.permute(step.laid).contiguous()


def _product(step: Product, left: Tensor, right: Tensor) -> Tensor:
    left, right = left.permute(step.turns[0]), right.permute(step.turns[1])
    a, b = left.shape, right.shape
    r, k = step.batch, step.summed
    if step.form == "outer_last":
        rows, columns, kept = a[: left.ndim - r], b[: right.ndim - r], a[left.ndim - r :]
        m, n, size = math.prod(rows), math.prod(columns), math.prod(kept)
        return _shaped(left.reshape(m, 1, size) * right.reshape(1, n, size), (*rows, *columns, *kept))
    kept, rows, columns = a[:r], a[r : left.ndim - k], b[r + k :]
    m, n, size, summed = math.prod(rows), math.prod(columns), math.prod(kept), math.prod(b[r : r + k])
    if step.form == "outer":
        result = left.reshape(size, m, 1) * right.reshape(size, 1, n)
    elif not r:
        result = torch.mm(left.reshape(m, summed), right.reshape(summed, n))
    elif not rows and not columns:
        result = (left.reshape(size, summed) * right.reshape(size, summed)).sum(1)
    else:
        result = torch.bmm(left.reshape(size, m, summed), right.reshape(size, summed, n))
    return _shaped(result, (*kept, *rows, *columns))


def _shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of a result that nothing else has, which autograd then lets be added to in place."""
    view: Tensor = torch.ops.aten._unsafe_view.default(fresh, shape)
    return view
