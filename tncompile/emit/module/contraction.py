"""A network of a program as a PyTorch module that holds a plan and no parameters."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tncompile.emit.module.plan import NetworkPlan, Prepared, Sizes, TermPlan
from tncompile.emit.module.products import product
from tncompile.emit.module.slices import in_slices
from tncompile.emit.module.steps import Sliced

Tensor = torch.Tensor


class Contraction(torch.nn.Module):
    """Computes one value from the tensors of a network, and from the sizes that none of them shows.

    Of several plans the one for the batch size runs, which is the last argument: ``plans[k]`` serves sizes up to
    ``limits[k]``, the last all beyond. While torch.export traces it, it is the network itself that is traced, an einsum
    for each term, and no plan.
    """

    def __init__(self, text: str, sizes: Sizes, plans: Sequence[NetworkPlan], limits: Sequence[int]) -> None:
        super().__init__()
        self.text = text
        self.sizes = sizes
        self.plans = tuple(plans)
        self.limits = tuple(limits)

    def forward(self, tensors: Sequence[Tensor], given: Sequence[Any]) -> Tensor:
        """The value, with the axes of the network's output."""
        sizes: dict[str, Any] = dict(self.sizes.static)
        for index, size in zip(self.sizes.given, given, strict=False):
            sizes[index.name] = size
        for found in self.sizes.found:
            size = tensors[found.tensor].shape[found.axis]
            for other in found.others:
                size = size // sizes[other]
            sizes[found.index] = size
        exporting = torch.compiler.is_exporting()
        plan = self.plans[0]
        if self.limits and not exporting:
            plan = self.plans[sum(limit < given[-1] for limit in self.limits)]
        device = tensors[0].device.type
        if not exporting and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = [t.to(dtype) if t.dtype != torch.float64 else t for t in tensors]
            with torch.autocast(device, enabled=False):
                return _network(plan, tensors, sizes, exporting)
        return _network(plan, tensors, sizes, exporting)

    def extra_repr(self) -> str:
        """What it computes."""
        return self.text


def _network(plan: NetworkPlan, tensors: Sequence[Tensor], sizes: dict[str, Any], exporting: bool) -> Tensor:
    indices = [name for axis in plan.output for name in axis]
    total: Tensor | None = None
    owned = False  # whether nothing else has the total, so that it may be added to in place
    tracing = torch.compiler.is_compiling()
    lacking = {*range(len(indices))}
    for term in plan.terms:
        mine = [_prepare(tensors[p], how, sizes) for p, how in zip(term.tensors, term.prepared, strict=True)]
        value = _traced(term, mine) if exporting else _term(term, mine)
        for axis in term.missing:
            value = value.unsqueeze(axis)
        lacking &= {*term.missing}
        if total is None:
            total, owned = value, len(mine) > 1 and not term.missing and value._base is None and not tracing
        else:
            total = total.add_(value) if owned else total + value
    assert total is not None
    if lacking:
        total = total.expand([sizes[name] for name in indices])
    if all(len(axis) == 1 for axis in plan.output):
        return total
    return total.reshape([_size(axis, sizes) for axis in plan.output])


def _size(names: Sequence[str], sizes: dict[str, Any]) -> Any:
    size = 1
    for name in names:
        size = sizes[name] * size
    return size


def _prepare(tensor: Tensor, how: Prepared, sizes: dict[str, Any]) -> Tensor:
    if how.split:
        tensor = tensor.reshape([sizes[name] for name in how.labels])
    for first, second in how.diagonals:
        tensor = tensor.diagonal(0, first, second)
    return tensor.sum(how.sums) if how.sums else tensor


def _term(plan: TermPlan, tensors: Sequence[Tensor]) -> Tensor:
    """The value of a term, its indices in the order of the output."""
    if plan.again and torch.is_grad_enabled():
        result: Tensor = checkpoint(run, plan, *tensors, use_reentrant=False, preserve_rng_state=False)
    else:
        result = run(plan, *tensors)
    return result if plan.turn == (*range(result.ndim),) else result.permute(plan.turn)


def run(plan: TermPlan, *tensors: Tensor) -> Tensor:
    """The result of all steps of a term, from its prepared tensors.

    Slices apart, PyTorch's own autograd is the sweep back over the tree: it keeps what the products take, as it was
    turned for them, and lets go of it one by one. A function of our own was slower, and at its peak took more memory.
    """
    values = [*tensors]
    for step in plan.steps:
        if isinstance(step, Sliced):
            values.append(in_slices(step, [values[n] for n in step.reads]))
        else:
            values.append(product(step, values[step.left], values[step.right]))
    return values[-1]


def _traced(plan: TermPlan, tensors: Sequence[Tensor]) -> Tensor:
    """The same as one einsum, for whoever reads the graph to find its own order."""
    names = {name: None for layout in plan.layouts for name in layout}
    if len(tensors) < 2 or len(names) > len(string.ascii_letters):
        return run(plan, *tensors).permute(plan.turn)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    sides, result = ("".join(letters[name] for name in layout) for layout in plan.layouts), plan.result
    return torch.einsum(f"{','.join(sides)}->{''.join(letters[name] for name in result)}", *tensors)
