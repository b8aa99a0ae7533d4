"""Rewrites of the emitted model for what ONNX Runtime has fused or fast kernels for and does not find by itself.

A rule is a function of a graph that says how often it applied; its docstring shows before and after, then its
conditions. A rule stays only where it was measured to pay.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.emit.fuse.activation import prelu_of_images, softmax_of_images
from tncompile.emit.fuse.attention import fuse_attention
from tncompile.emit.fuse.branches import weights_into_branches
from tncompile.emit.fuse.long_axis import long_axis_last
from tncompile.emit.fuse.reshapes import reshapes_around_elementwise
from tncompile.emit.fuse.sequences import sequences_as_images
from tncompile.emit.fuse.sizes import sizes_from_inputs
from tncompile.frontend.trace import silence

RULES = (
    sizes_from_inputs,  # else a size keeps a value from being fused
    fuse_attention,
    softmax_of_images,
    prelu_of_images,
    long_axis_last,
    sequences_as_images,
    weights_into_branches,
    reshapes_around_elementwise,  # last: the other rules know these patterns with their Reshapes
)


def fuse(model: onnx_ir.Model) -> None:
    """Apply all rules, in place."""
    with silence("onnx_ir"):  # of models that cannot run: the check says so
        onnx_passes.ShapeInferencePass()(model)
    for rule in RULES:
        if rule(model.graph):
            onnx_passes.RemoveUnusedNodesPass()(model)
