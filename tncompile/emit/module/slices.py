"""Products in slices of one index, whose results are not kept for the gradients but computed again slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompile.emit.module.products import product
from tncompile.emit.module.steps import Product, Sliced

Tensor = torch.Tensor


def in_slices(step: Sliced, tensors: Sequence[Tensor]) -> Tensor:
    """The result of the last of some products.

    What traces or transforms the module (torch.compile, torch.func, forward derivatives) sees products of whole
    tensors.
    """
    dual = torch.autograd.forward_ad._current_level >= 0
    if dual or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _result(step.products, tensors)
    result: Tensor = _InSlices.apply(step, *tensors)  # type: ignore[no-untyped-call]
    return result


def _result(products: Sequence[Product], tensors: Sequence[Tensor]) -> Tensor:
    values: list[Tensor | None] = [*tensors]
    for p in products:
        left, right = values[p.left], values[p.right]
        values[p.left] = values[p.right] = None  # each is taken once
        assert left is not None and right is not None
        values.append(product(p, left, right))
    result = values[-1]
    assert result is not None
    return result


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Sliced, *tensors: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        total = _Total(step.axes[-1])
        for start, length, size in _parts(step, tensors):
            total.put(_result(step.products, _cut(step, tensors, start, length)), start, size)
        return total.value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step: Sliced = ctx.step
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            trained = [t for t, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(_result(step.products, tensors), trained, grad, create_graph=True))
            return None, *(next(found) if need else None for need in needs)
        grad = grad.contiguous()  # turned once, and not for each slice
        totals = [_Total(axis) for axis in step.axes[: len(tensors)]]
        for start, length, size in _parts(step, tensors):
            values = _values(step.products[:-1], _cut(step, tensors, start, length))
            above = grad if step.axes[-1] is None else grad.narrow(step.axes[-1], start, length)
            for number, part in _gradients(step, values, needs, above):
                totals[number].put(part, start, size)
                del part
        return None, *(total.value() if need else None for total, need in zip(totals, needs, strict=True))


def _values(products: Sequence[Product], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors and the results of all products."""
    values = [*tensors]
    for p in products:
        values.append(product(p, values[p.left], values[p.right]))
    return values


def _parts(step: Sliced, tensors: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """Where each slice starts, its length, and that of the whole index."""
    size = next(t.shape[axis] for t, axis in zip(tensors, step.axes, strict=False) if axis is not None)
    count = max(1, min(step.count, size))
    for k in range(count):
        start = size * k // count
        yield start, size * (k + 1) // count - start, size


def _cut(step: Sliced, tensors: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
    return [t if axis is None else t.narrow(axis, start, length) for t, axis in zip(tensors, step.axes, strict=False)]


class _Total:
    """What the slices make: their sum, or one after the other along an axis."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.whole: Tensor | None = None

    def put(self, part: Tensor, start: int, size: int) -> None:
        """One slice, that of an index of some size from `start` on."""
        if self.axis is None:
            self.whole = part.contiguous() if self.whole is None else self.whole.add_(part)
            return
        if self.whole is None:
            self.whole = part.new_empty([size if k == self.axis else n for k, n in enumerate(part.shape)])
        self.whole.narrow(self.axis, start, part.shape[self.axis]).copy_(part)

    def value(self) -> Tensor:
        """The whole."""
        assert self.whole is not None
        return self.whole


def _gradients(step: Sliced, values: list[Any], needs: Sequence[bool], grad: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradients of the tensors that need one, with their numbers, from that of the result.

    `values` are the tensors and the results but the last; they are let go of one by one.
    """
    tensors = len(needs)
    needs = [*needs]
    for p in step.products:
        needs.append(needs[p.left] or needs[p.right])
    above = {len(needs) - 1: grad}
    for number in reversed(range(tensors, len(needs))):
        if not needs[number]:
            continue
        p, gradients = step.products[number - tensors], step.gradients[number - tensors]
        sides = (p.left, p.right)
        own = above.pop(number)
        if p.laid is not None:
            own = own.permute([p.laid.index(axis) for axis in range(own.ndim)]).contiguous()  # once for both sides
        # first the smaller side's, which takes the larger one, so that this can go
        for k in sorted((0, 1), key=lambda k: values[sides[k]].numel()):
            if not needs[sides[k]]:
                continue
            how = gradients[k]
            both = (own, values[sides[1 - k]])
            values[sides[1 - k]] = None
            found = product(how.product, both[how.product.left], both[how.product.right]).permute(how.back)
            del both
            if sides[k] < tensors:
                yield sides[k], found
            else:
                above[sides[k]] = found
            del found
        del own
