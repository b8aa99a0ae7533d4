"""What a traced graph is given before it is imported, so that ONNX Runtime has a kernel for all of it.

bfloat16 becomes float32, exactly: ONNX Runtime's CPU computes nothing in bfloat16. In float64, attention and group
norm are written out: the one would take a scale that was rounded to float32, the other has no kernel. Complex tensors
become real ones (`tncompile.frontend.pairs`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from tncompile.frontend.pairs import as_pairs, is_complex
from tncompile.frontend.trace import whole_einsums

_aten = torch.ops.aten
WIDENED = (
    "computed in float32, as ONNX Runtime has no bfloat16 on a CPU; inputs and outputs that were bfloat16 are float32"
)
PAIRS = "complex inputs and outputs have an axis of 2 at the end, real and imaginary part, as torch.view_as_real has it"


@dataclass(frozen=True)
class Computable:
    """A functional graph to import, what its user should know of it, and the graph that it computes the same as.

    `reference` is None where that is the graph itself.
    """

    exported: torch.export.ExportedProgram
    notes: tuple[str, ...] = ()
    reference: torch.export.ExportedProgram | None = None


def computable(exported: torch.export.ExportedProgram) -> Computable:
    """The functional graph of a program, changed where ONNX Runtime would not compute it as it is."""
    functional = functionalized(exported)
    if any(n.target in _IN_FLOAT64 and _is(n, torch.float64) for n in functional.graph.nodes):
        functional = functionalized(functional, _IN_FLOAT64)
    notes: tuple[str, ...] = ()
    if any(_is(n, torch.bfloat16) for n in functional.graph.nodes):
        functional, notes = _widened(functional), (WIDENED,)
    nodes = functional.graph.nodes
    if any(map(is_complex, nodes)):
        users = {s.arg.name for s in functional.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
        shown = [n for n in nodes if n.name in users] + functional.graph.output_node().all_input_nodes
        notes += (PAIRS,) if any(map(is_complex, shown)) else ()
        return Computable(as_pairs(functional), notes, functionalized(exported))
    return Computable(functional, notes)


def functionalized(exported: torch.export.ExportedProgram, table: Any = None) -> torch.export.ExportedProgram:
    """The graph without writes in place; `table` has further operators to write out, as torch's decompositions do."""
    with warnings.catch_warnings(), whole_einsums(), torch.no_grad():
        warnings.simplefilter("ignore")
        written_out = {**(table or _unrolled(exported)), **dict.fromkeys(_POOLED, _adaptive_pool)}
        functional: torch.export.ExportedProgram = exported.run_decompositions(written_out)
        return functional


_POOLED = (_aten.adaptive_avg_pool3d.default, _aten._adaptive_avg_pool3d.default)
"""Torch's exporter has these in up to two dimensions, or down to one place."""


def _adaptive_pool(x: torch.Tensor, output: list[int]) -> Any:
    """Of windows of one size, an average pool; else one mean over each window, a contraction along each axis."""
    sizes = list(x.shape[-3:])
    if not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    if all(n % m == 0 for n, m in zip(sizes, output, strict=True)):
        window = [n // m for n, m in zip(sizes, output, strict=True)]
        return torch.nn.functional.avg_pool3d(x, window, window)
    for axis, (n, m) in enumerate(zip(sizes, output, strict=True)):
        starts, ends = [k * n // m for k in range(m)], [-(-(k + 1) * n // m) for k in range(m)]
        place = torch.arange(n, device=x.device)
        inside = [((place >= a) & (place < b)) / (b - a) for a, b in zip(starts, ends, strict=True)]
        means = torch.stack(inside).to(x.dtype)
        x = torch.tensordot(x, means, ([axis - 3], [1])).movedim(-1, axis - 3)
    return x


def _unrolled(exported: torch.export.ExportedProgram) -> dict[Any, Any]:
    """Decompositions of the recurrent layers that are no one ONNX operator, or that torch's exporter would unroll."""
    known = torch._decomp.decomposition_table
    found = {_aten.rnn_tanh.input, _aten.rnn_relu.input}
    for node in exported.graph_module.graph.nodes:
        if node.target is _aten.lstm.input:
            _, _, weights, biases, layers, _, _, both_ways, _ = node.args
            if len(weights) == layers * (1 + both_ways) * (3 + 2 * biases):  # one more: a projection of what comes out
                found.add(_aten.lstm.input)
    return {operator: known[operator] for operator in found if operator in known}


def _is(node: torch.fx.Node, dtype: torch.dtype) -> bool:
    values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and v.dtype == dtype for v in values)


# ------------------------------------------------------------------------------------ bfloat16


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        wide = value.detach().to(torch.float32)
        return torch.nn.Parameter(wide, value.requires_grad) if isinstance(value, torch.nn.Parameter) else wide
    return torch.float32 if value is torch.bfloat16 else value


def _widened(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same graph with float32 in the place of bfloat16, edited in place; weights that are one stay one."""
    tree_map = torch.utils._pytree.tree_map
    for node in exported.graph.nodes:
        node.args, node.kwargs = tree_map(_wide, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = tree_map(_wide, node.meta["val"])
    wide: dict[Any, torch.Tensor] = {}

    def weight(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bfloat16:
            return tensor
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        return wide.setdefault(key, _wide(tensor)) if tensor.numel() else _wide(tensor)

    return torch.export.ExportedProgram(
        exported.graph_module,
        exported.graph,
        exported.graph_signature,
        {name: weight(tensor) for name, tensor in exported.state_dict.items()},
        exported.range_constraints,
        exported.module_call_graph,
        tree_map(_wide, exported.example_inputs),
        {name: weight(tensor) for name, tensor in exported.constants.items()},
    )


# ------------------------------------------------------------------------------------ float64


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.dtype != torch.float64 or dropout_p or enable_gqa:
        return NotImplemented
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    result = torch.matmul(torch.softmax(scores, -1), value)
    # laid out like the query, as torch's kernel leaves it: a later view may rely on that
    order = sorted(range(query.ndim), key=lambda axis: _hint(query.stride(axis)), reverse=True)
    return result.permute(order).contiguous().permute([order.index(axis) for axis in range(query.ndim)])


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if x.dtype != torch.float64:
        return NotImplemented
    parts = x.reshape(x.shape[0], groups, -1)
    centred = parts - parts.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    result = scaled.reshape(x.shape)
    along = (1, x.shape[1], *(1,) * (x.ndim - 2))
    if weight is not None:
        result = result * weight.reshape(along)
    return result if bias is None else result + bias.reshape(along)


_IN_FLOAT64 = {_aten.scaled_dot_product_attention.default: _attention, _aten.group_norm.default: _group_norm}
"""What is written out."""
