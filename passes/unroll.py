"""Windows over few places as cores: a convolution is then a matmul like any other."""

from __future__ import annotations

import math
from dataclasses import replace

from tncompile.ir import Network, Tensor, Term
from tncompile.ir.evaluate import pattern

LARGEST = 1 << 21
"""Elements that the weight may have which the kernel becomes, at every place of the output: 8 MB of float32."""


def unrolled(network: Network, term: Term) -> Term | None:
    """``x[b, c, i] K[o, c, k]`` with a window ``i, k -> h`` as ``x[b, c, i] K[o, c, k] P[i, k, h]``.

    P is 1 at the places that the window reads and else 0. None without windows, of run-time sizes, or where ``K P`` or
    P would be large.

    For an image of few places the zeros that are multiplied cost less than what a convolution needs to begin with.
    """
    indices = {**term.indices, **{i.name: i for i in network.output.indices}}
    slid = {name for w in term.windows for name in w.names}
    on_cores = {i.name for core in term.cores for i in core.indices} | slid
    outside = {i.name for t in (network.output, *term.operands) for i in t.indices}
    weight = [indices[name].size for name in sorted(on_cores & outside)]
    if not term.windows or not all(isinstance(n, int) for n in weight) or math.prod(map(int, weight)) > LARGEST:
        return None
    places = {name: int(indices[name].size) for name in slid}
    if any(math.prod(places[name] for name in w.names) > LARGEST for w in term.windows):
        return None
    tensors, order = list(term.tensors), term.order
    for number, w in enumerate(term.windows):
        axes = tuple((indices[name],) for name in w.names)
        data = pattern(w, places).astype(network.dtype)
        tensors.append(Tensor(f"{network.output.name}.window_{number}", axes, data))
        order = (order, len(tensors) - 1)
    return replace(term, tensors=tuple(tensors), order=order, windows=(), steps=None)
