"""The products of a term in PyTorch, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tncompile.emit.module.plan import Product, TermPlan

Tensor = torch.Tensor


def product(step: Product, left: Tensor, right: Tensor) -> Tensor:
    """The contraction of two tensors that have one axis for each index."""
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


def gradient_left(step: Product, grad: Tensor, right: Tensor) -> Tensor:
    """The gradient of a product's left side, from that of its result and the right side."""
    right = right.permute(step.turns[1])
    r, k = step.batch, step.summed
    if step.form == "outer_last":
        n = right.ndim - r
        rows, kept = grad.shape[: grad.ndim - n - r], grad.shape[grad.ndim - r :]
        size, columns = math.prod(kept), math.prod(right.shape[:n])
        found = grad.reshape(math.prod(rows), columns, size) * right.reshape(1, columns, size)
        return (found.sum(1) if n else found).reshape(*rows, *kept).permute(step.backs[0])
    n = right.ndim - r - k
    kept, rows, summed = grad.shape[:r], grad.shape[r : grad.ndim - n], right.shape[r : r + k]
    size, m, columns = math.prod(kept), math.prod(rows), math.prod(right.shape[r + k :])
    if step.form == "outer":
        found = _contracted(grad.reshape(size, m, columns), right.reshape(size, 1, columns), 2, bool(n))
    else:
        other = right.reshape(size, math.prod(summed), columns).transpose(1, 2)
        found = _matmul(grad.reshape(size, m, columns), other)
    return found.reshape(*kept, *rows, *summed).permute(step.backs[0])


def gradient_right(step: Product, grad: Tensor, left: Tensor) -> Tensor:
    """The gradient of a product's right side, from that of its result and the left side."""
    left = left.permute(step.turns[0])
    r, k = step.batch, step.summed
    m = left.ndim - r - k
    if step.form == "outer_last":
        columns, kept = grad.shape[m : grad.ndim - r], grad.shape[grad.ndim - r :]
        size, rows = math.prod(kept), math.prod(left.shape[:m])
        found = grad.reshape(rows, math.prod(columns), size) * left.reshape(rows, 1, size)
        return (found.sum(0) if m else found).reshape(*columns, *kept).permute(step.backs[1])
    kept, summed, columns = grad.shape[:r], left.shape[r + m :], grad.shape[r + m :]
    size, rows, n = math.prod(kept), math.prod(left.shape[r : r + m]), math.prod(columns)
    if step.form == "outer":
        found = _contracted(grad.reshape(size, rows, n), left.reshape(size, rows, 1), 1, bool(m))
    else:
        other = left.reshape(size, rows, math.prod(summed)).transpose(1, 2)
        found = _matmul(other, grad.reshape(size, rows, n))
    return found.reshape(*kept, *summed, *columns).permute(step.backs[1])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a[0], b[0]) if a.shape[0] == 1 else torch.bmm(a, b)


def _contracted(grad: Tensor, other: Tensor, axis: int, several: bool) -> Tensor:
    """``sum(grad * other, axis)``, as a product of matrices where that is one; where not `several`, the axis is of
    size 1."""
    if not several:
        return grad * other
    if grad.shape[0] > 1:
        return (grad * other).sum(axis)
    return torch.mv(grad[0] if axis == 2 else grad[0].t(), other.reshape(-1))


def run(plan: TermPlan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The prepared tensors and the results of all products."""
    values = [*tensors]
    for step in plan.products:
        values.append(product(step, values[step.left], values[step.right]))
    return values


class PlannedTerm(torch.autograd.Function):
    """A term of three tensors or more: its gradients come from one sweep back over the products.

    What the plan says to compute again is not kept from the forward to the backward pass. Cannot be differentiated
    twice; `run` can.
    """

    @staticmethod
    def forward(ctx: Any, plan: TermPlan, *tensors: Tensor) -> Tensor:
        """The value of the term, one axis for each index, as its last product leaves it."""
        values = run(plan, tensors)
        count = len(tensors)
        ctx.plan = plan
        ctx.kept = kept = [k for k in range(len(plan.products) - 1) if k not in plan.again]
        ctx.save_for_backward(*tensors, *(values[count + k] for k in kept))
        return values[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors that need one."""
        plan: TermPlan = ctx.plan
        count, steps = len(ctx.needs_input_grad) - 1, plan.products
        saved = ctx.saved_tensors
        values: list[Tensor | None] = [*saved[:count], *[None] * len(steps)]
        for number, value in zip(ctx.kept, saved[count:], strict=True):
            values[count + number] = value
        needs = [*ctx.needs_input_grad[1:]]
        for step in steps:
            needs.append(needs[step.left] or needs[step.right])
        _compute_again(steps, values, _asked_for(steps, needs), count)
        grads: list[Tensor | None] = [None] * (count + len(steps))
        grads[-1] = grad
        for number in reversed(range(len(steps))):
            step, mine = steps[number], grads[count + number]
            if mine is None:
                continue
            left, right = values[step.left], values[step.right]
            if needs[step.left]:
                assert right is not None
                grads[step.left] = gradient_left(step, mine, right)
            if needs[step.right]:
                assert left is not None
                grads[step.right] = gradient_right(step, mine, left)
            grads[count + number] = mine = left = right = None
            for side in (step.left, step.right):  # each is read once: here
                values[side] = None
        return None, *grads[:count]


def _asked_for(steps: Sequence[Product], needs: Sequence[bool]) -> set[int]:
    """The values that the gradients are computed from."""
    asked: set[int] = set()
    for step in steps:
        if needs[step.left]:
            asked.add(step.right)
        if needs[step.right]:
            asked.add(step.left)
    return asked


def _compute_again(steps: Sequence[Product], values: list[Tensor | None], asked: set[int], count: int) -> None:
    """Fill in the values that are asked for and were not kept, and what they are made of; drop the rest."""
    wanted = {*asked}
    for number in reversed(range(len(steps))):
        if count + number in wanted and values[count + number] is None:
            wanted |= {steps[number].left, steps[number].right}
    for number, step in enumerate(steps):
        if count + number in wanted and values[count + number] is None:
            left, right = values[step.left], values[step.right]
            assert left is not None and right is not None
            values[count + number] = product(step, left, right)
            for side in (step.left, step.right):
                if side >= count and side not in asked:
                    values[side] = None
