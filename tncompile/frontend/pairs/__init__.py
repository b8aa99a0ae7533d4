"""Complex tensors of a traced graph as real ones, with an axis of 2 behind the others as `torch.view_as_real` has it.

A product of complex tensors becomes one contraction with a constant core, the multiplication table
``table[a, b, c]``: so complex networks stay networks, and the passes decide where the table goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import ExportGraphSignature, OutputSpec, TensorArgument

from tncompile.errors import UnsupportedError
from tncompile.frontend.pairs import fourier, products, tensors  # noqa: F401  (they register their rules)
from tncompile.frontend.pairs.builder import RULES, Builder, Node, NoRule, is_complex
from tncompile.frontend.sources import innermost_line

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


def as_pairs(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with real tensors only; its graph is edited in place. UnsupportedError for an operation on complex
    numbers that has no rule here."""
    builder = Builder(exported.graph)
    for node in list(exported.graph.nodes):
        if node.op == "placeholder" and is_complex(node):
            value = builder.values[node] = node.meta["val"]
            with builder.mode:
                node.meta["val"] = value.new_empty([*value.shape, 2], dtype=value.real.dtype)
            builder.pairs[node] = node
        elif node.op == "output":
            node.args = torch.fx.node.map_arg(node.args, lambda n: builder.pairs.get(n, n))
        elif is_complex(node) or any(n in builder.pairs for n in node.all_input_nodes):
            _rewrite(builder, node)
    exported.graph.eliminate_dead_code()
    exported.graph.lint()
    return _program(exported, builder)


def _rewrite(builder: Builder, node: Node) -> None:
    if node.target is _ASSERTION:  # of the dtype that is about to go
        builder.graph.erase_node(node)
        return
    rule = RULES.get(node.target)
    builder.node = node
    why = " on complex numbers is not supported; write it on real and imaginary parts (torch.view_as_real)"
    with builder.graph.inserting_before(node):
        try:
            result = None if rule is None else rule(builder, *node.args, **node.kwargs)
        except NoRule as reason:
            result, why = None, f" is not supported: {reason}"
    if result is None:
        line = innermost_line(node.meta.get("stack_trace") or "", "")
        where = f", at {line} ({line.code})" if line.file else ""
        raise UnsupportedError(f"{node.target}{why}{where}")
    if is_complex(node) or isinstance(node.meta.get("val"), (tuple, list)):
        builder.pairs[node] = result
    else:
        node.replace_all_uses_with(result)


def _program(exported: torch.export.ExportedProgram, builder: Builder) -> torch.export.ExportedProgram:
    """The program of a rewritten graph."""
    signature = exported.graph_signature
    (results,) = exported.graph.output_node().args
    outputs = [
        OutputSpec(s.kind, TensorArgument(n.name) if isinstance(n, Node) else s.arg, s.target)
        for s, n in zip(signature.output_specs, results, strict=True)
    ]
    examples = torch.utils._pytree.tree_map_only(torch.Tensor, _parts, exported.example_inputs)
    return torch.export.ExportedProgram(
        exported.graph_module,
        exported.graph,
        ExportGraphSignature([*builder.added, *signature.input_specs], outputs),
        {name: _parts(tensor) for name, tensor in exported.state_dict.items()},
        exported.range_constraints,
        exported.module_call_graph,
        examples,
        {**{name: _parts(value) for name, value in exported.constants.items()}, **builder.constants},
    )


def _parts(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_complex():
        return value
    parts = torch.view_as_real(value.detach().resolve_conj()).contiguous()
    return torch.nn.Parameter(parts, value.requires_grad) if isinstance(value, torch.nn.Parameter) else parts


__all__ = ["as_pairs", "is_complex"]
