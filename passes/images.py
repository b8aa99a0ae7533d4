"""Which values are images that convolutions make: ONNX Runtime leaves those in blocks of channels."""

from __future__ import annotations

from tncompile.cost.schedule import IMAGE
from tncompile.ir import Network, Opaque, Program, networks_of
from tncompile.passes.pointwise import ONNX_POINTWISE, POINTWISE

_KEPT = ("pool", "cat", "batch_norm", "batchnorm")
"""What the names of further operators have in them that take blocks and leave blocks."""


def images(program: Program) -> frozenset[str]:
    """The names of the values that a convolution over two axes made, and what keeps them in blocks after it."""
    found: set[str] = set()
    for node in program.nodes:
        if len(node.value.shape or ()) != IMAGE:
            continue
        if isinstance(node, Opaque):
            name = node.target.lower()
            kept = node.target in POINTWISE | ONNX_POINTWISE or any(part in name for part in _KEPT)
            made = "conv" in name or (kept and any(read in found for read in node.inputs))
        else:
            made = any(_is_image(network, found) for network in networks_of(node))
        if made:
            found.add(node.value.name)
    return frozenset(found)


def _is_image(network: Network, found: set[str]) -> bool:
    """Whether a network slides over its operands, or leaves the space of an image as it is."""
    space = network.output.axes[2:]
    return any(
        term.windows or any(t.name in found and t.axes[2:] == space for t in term.operands) for term in network.terms
    )
