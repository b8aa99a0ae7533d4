"""Products in slices of one index, whose results are computed again for the gradients slice by slice, or kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompile.emit.module.products import add_product, product
from tncompile.emit.module.steps import Gradient, Product, Sliced, Turn

Tensor = torch.Tensor


def in_slices(step: Sliced, tensors: Sequence[Tensor]) -> Tensor:
    """The result of the last of some products.

    What traces or transforms the module (torch.compile, torch.func, forward derivatives) sees products of whole
    tensors.
    """
    dual = torch.autograd.forward_ad._current_level >= 0
    if dual or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _result(step.products, tensors)
    keeps = step.keeps and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    result: Tensor = _InSlices.apply(step, keeps, *tensors)  # type: ignore[no-untyped-call]
    return result


def _result(products: Sequence[Product], tensors: Sequence[Tensor]) -> Tensor:
    values: list[Tensor | None] = [*tensors]
    for p in products:
        values.append(product(p, *_taken(p, values)))
    result = values[-1]
    assert result is not None
    return result


def _taken(p: Product, values: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The sides of a product, each of which is taken once."""
    left, right = values[p.left], values[p.right]
    values[p.left] = values[p.right] = None
    assert left is not None and right is not None
    return left, right


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Sliced, keeps: bool, *tensors: Tensor) -> Tensor:
        kept: list[Tensor] = []
        total = _Total(step.axes[-1])
        for start, length, size in _parts(step, tensors):
            values: list[Tensor | None] = [*_cut(step, tensors, start, length)]
            for p in step.products[:-1]:
                made = product(p, *_taken(p, values))
                values.append(made)
                if keeps:
                    kept.append(made)
                del made
            total.add(step.products[-1], None, *_taken(step.products[-1], values), start, size)
        ctx.step, ctx.count, ctx.keeps = step, len(tensors), keeps
        ctx.save_for_backward(*tensors, *kept)
        return total.value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step: Sliced = ctx.step
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        needs: tuple[bool, ...] = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            sides = [t.view_as(t) for t in tensors]  # one tensor may be two of them
            trained = [t for t, need in zip(sides, needs, strict=True) if need]
            found = iter(torch.autograd.grad(_result(step.products, sides), trained, grad, create_graph=True))
            return None, None, *(next(found) if need else None for need in needs)
        if not torch.is_autocast_enabled(grad.device.type):
            return None, None, *_sweep(step, tensors, kept, ctx.keeps, needs, grad)
        with torch.autocast(grad.device.type, enabled=False):  # dtypes are those of the forward products
            return None, None, *_sweep(step, tensors, kept, ctx.keeps, needs, grad)


def _sweep(
    step: Sliced, tensors: Sequence[Tensor], kept: Sequence[Tensor], keeps: bool, needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of the tensors that need one, slice by slice."""
    grad = grad.contiguous()  # turned once, and not for each slice
    totals = [_Total(axis) for axis in step.axes[: len(tensors)]]
    inner = len(step.products) - 1
    for k, (start, length, size) in enumerate(_parts(step, tensors)):
        part = _cut(step, tensors, start, length)
        values = [*part, *kept[k * inner : (k + 1) * inner]] if keeps else _values(step.products[:-1], part)
        above = grad if step.axes[-1] is None else grad.narrow(step.axes[-1], start, length)
        for number, how, left, right in _gradients(step, values, needs, above):
            totals[number].add(how.product, how.back, left, right, start, size)
            del left, right
        del part, values
    return [total.value() if need else None for total, need in zip(totals, needs, strict=True)]


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

    def add(self, p: Product, back: Turn | None, left: Tensor, right: Tensor, start: int, size: int) -> None:
        """A product for one slice, turned `back`, as `put`."""
        stays = self.axis is None and (back is None or back == (*range(len(back)),))
        if self.whole is not None and stays and add_product(p, left, right, self.whole):
            return
        part = product(p, left, right)
        self.put(part if back is None else part.permute(back), start, size)

    def value(self) -> Tensor:
        """The whole."""
        assert self.whole is not None
        return self.whole


def _gradients(
    step: Sliced, values: list[Any], needs: Sequence[bool], grad: Tensor
) -> Iterator[tuple[int, Gradient, Tensor, Tensor]]:
    """How the gradient of each tensor that needs one is computed, with its number, from that of the result.

    `values` are the tensors and the results but the last, which the list lets go of one by one.
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
            left, right = both[how.product.left], both[how.product.right]
            del both
            if sides[k] < tensors:
                yield sides[k], how, left, right
            else:
                above[sides[k]] = product(how.product, left, right).permute(how.back)
            del left, right
        del own
