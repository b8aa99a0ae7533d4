"""A large batch computed a few samples at a time, where the arrays between convolutions would not fit in the cache.

    y = region(x)            x: [batch, ...]
->
    If batch <= limit: y = region(x)
    else:              y = Scan over Reshape(x, [batch / k, k, ...]): region of k samples

A region is what leads from the model's inputs to its last convolutions and pools, as far as each sample is computed by
itself. What lies between its nodes then takes the memory of k samples, whatever the batch is, and is still in the cache
when it is read. `k` is the largest power of two up to a limit that divides the batch; where that is too small, as for
an odd one, the batch is computed whole. Where what comes out is large, `k` is 1 and no Reshape is needed outside, which
would copy it where it is the model's output.

Measured in ONNX Runtime 1.31: a Scan gives slices of its input and of its output to its body without copying them, and
takes some 5 microseconds a slice, and 1 or 2 for each node in it; the If takes 2 or 3. The file holds a weight once,
the session twice (see `weights_into_branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.emit.fuse.branches import weights_into_branches
from tncompile.emit.fuse.match import is_op, shape_of
from tncompile.emit.microbatch.region import CONVOLUTIONS, Region, find_region
from tncompile.emit.microbatch.write import write_choice
from tncompile.frontend.trace import silence

CACHE = 28 << 20
"""Bytes that the arrays around one node of a region take before it is computed in parts: more than caches hold."""

_TWICE = 2
"""Times what both branches have for themselves when they run: their weights, for the order that their kernels want."""

_CHOICE_US, _LITTLE = 4.0, 0.03  # what the If takes at most, and of the work in the smallest batch what goes unnoticed
_FEW = 8 << 20  # bytes around one node up to which a batch is computed whole
_SLICE = 2 << 20  # bytes around one node in a slice
_SHOWN = 0.2  # of the bytes around one node: what comes out of a region is large
_SMALL_COST, _COST, _LARGE_COST = 0.05, 0.3, 0.5
"""Of the work in a slice, what a Scan takes for it: as is looked for; at most, of what the work is in a whole batch;
and in slices of a batch that only few samples divide."""


@dataclass(frozen=True)
class MicroBatches:
    """Batches of more than `limit` samples are computed up to `most` at a time, but whole where fewer than `least`
    divide them; both are powers of two. The largest node of that part reads and writes `bytes` a sample."""

    limit: int
    most: int
    least: int
    bytes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes at which every way to compute is taken once: whole, in the largest and in the smallest slices."""
        odd = self.limit + 1 + self.limit % 2
        beyond = (size * (self.limit // size + 1) for size in (self.most, self.least))
        return tuple(dict.fromkeys((self.limit, odd, *beyond)))

    def __str__(self) -> str:
        count = "one" if self.most == 1 else f"up to {self.most}"
        return f"beyond batch {self.limit}, images are computed {count} at a time ({self.bytes / 1e6:.2g} MB each)"


def in_micro_batches(
    model: onnx_ir.Model, batches: Sequence[int], threads: int, gained: Callable[[], float]
) -> MicroBatches | None:
    """Compute the images of a model in micro-batches, where the largest of some batches gains; edits the model.

    `threads`: of the sessions it will run in. `gained`: microseconds by which the smallest batch is faster than in any
    other way anyhow, from which the choice between both ways may be paid.
    """
    first = shape_of(model.graph.inputs[0]) if model.graph.inputs else None
    if not batches or not first or not isinstance(first[0], str) or not first[0].isidentifier():
        return None
    if not any(is_op(node, *CONVOLUTIONS) for node in model.graph):
        return None
    with silence("onnx_ir"):
        onnx_passes.ShapeInferencePass()(model)
    region = find_region(model.graph, first[0])
    if region is None or region.bytes * max(batches) < max(CACHE, _TWICE * region.weights):
        return None
    chosen = _sizes(region, threads)
    if chosen is None or chosen.limit >= max(batches):
        return None
    if _LITTLE * min(batches) * region.microseconds < _CHOICE_US and gained() < _CHOICE_US:
        return None
    write_choice(model.graph, region, chosen.limit, chosen.most, chosen.least)
    weights_into_branches(model.graph)
    return chosen


def _sizes(region: Region, threads: int) -> MicroBatches | None:
    """As many samples as make a slice worth its Scan and still fit in the cache; one where what comes out is large."""
    cost = (5.0 + 1.5 * len(region.nodes)) * threads  # microseconds a slice
    most = least = 1
    if region.shown <= _SHOWN * region.bytes:
        most = 2
        while cost > _SMALL_COST * most * region.microseconds and 2 * most * region.bytes <= _SLICE:
            most *= 2
    if cost > _COST * most * region.streamed_microseconds:
        return None
    while cost > _LARGE_COST * least * region.microseconds and least < most:
        least *= 2
    return MicroBatches(max(most, _FEW // region.bytes), most, least, region.bytes)
