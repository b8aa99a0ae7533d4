"""Which values are images that convolutions make: ONNX Runtime leaves those in blocks of channels."""

from __future__ import annotations

import re

from tncompile.cost.forms import IMAGE
from tncompile.ir import Network, Opaque, Program, networks_of
from tncompile.passes.pointwise import ONNX_POINTWISE, POINTWISE

_MADE = re.compile(r"_?conv(?!ert)")
_KEPT = re.compile(r".*pool|cat$|concat|.*batch_?norm")
"""How the names of operators begin that leave blocks, and of further ones that take and leave them."""


def images(program: Program) -> frozenset[str]:
    """The names of the values that a convolution over two axes made, and what keeps them in blocks after it."""
    found: set[str] = set()
    for node in program.nodes:
        if len(node.value.shape or ()) != IMAGE:
            continue
        if isinstance(node, Opaque):
            name = node.target.partition(".")[2].partition(".")[0].lower()
            kept = node.target in POINTWISE | ONNX_POINTWISE or _KEPT.match(name)
            made = bool(_MADE.match(name)) or (bool(kept) and any(read in found for read in node.inputs))
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
