"""Teacher and student: that they are one model, which weights differ, and the student with other weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tncompile.errors import SourceRef, TNCompileError
from tncompile.tensorizer.flow import Flow, canonical


def aligned(teacher: Flow, student: Flow) -> None:
    """TNCompileError unless the student is the teacher with other weights: the same operations on what varies."""
    ours, theirs = student.varying, teacher.varying
    for a, b in zip(ours, theirs, strict=False):
        if _shown(a, student) != _shown(b, teacher):
            raise TNCompileError(
                f"the student computes {a.name} ({a.target}) where the teacher computes {b.name} ({b.target}): it must "
                "be the same model with weights replaced",
                _source(a),
            )
    if len(ours) != len(theirs) or student.outputs != teacher.outputs:
        raise TNCompileError("the student and the teacher are different models: only weights may be replaced")


def changed(student: Flow, teacher: Flow) -> tuple[frozenset[str], frozenset[str]]:
    """The weights that only the student has; and those, with the ones that are other numbers than the teacher's."""
    known = {**teacher.exported.constants, **teacher.exported.state_dict}
    cores, changed = set(), set()
    for key, tensor in student.tensors.items():
        other = known.get(key)
        if not isinstance(other, torch.Tensor) or other.shape != tensor.shape:
            cores.add(key)
        elif not torch.equal(other.detach(), tensor):
            changed.add(key)
    return frozenset(cores) & student.parameters, frozenset(cores | changed)


def with_weights(
    exported: torch.export.ExportedProgram, healed: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """The same program with other numbers in some weights; what is tied stays tied."""
    keys = canonical(exported.state_dict)
    made: dict[str, torch.Tensor] = {}
    for key, tensor in healed.items():
        old, new = exported.state_dict[key], tensor.detach().clone()
        made[key] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
    state = {name: made.get(keys.get(name, name), tensor) for name, tensor in exported.state_dict.items()}
    return torch.export.ExportedProgram(
        exported.graph_module,
        exported.graph_module.graph,
        exported.graph_signature,
        state,
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        exported.constants,
        verifiers=exported.verifiers,
    )


def _shown(node: torch.fx.Node, flow: Flow) -> tuple[object, ...]:
    value = node.meta.get("val")
    sizes = [s if isinstance(s, int) else None for s in value.shape] if isinstance(value, torch.Tensor) else None
    sources = [flow.number[s] for s in node.all_input_nodes if s in flow.number]
    return node.op, node.name if node.op == "placeholder" else str(node.target), sizes, sources


def _source(node: torch.fx.Node) -> SourceRef:
    stack = node.meta.get("nn_module_stack") or {}
    return SourceRef(next((str(path) for path, _ in reversed(stack.values())), ""))
