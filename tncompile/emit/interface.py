"""The last touches on an ONNX model: the model's own names, and nothing that only the exporter needed."""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnx_ir.passes import common as onnx_passes

from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Program
from tncompile.ir import text as ir_text


def name_interface(model: onnx_ir.Model, program: Program, traced: ImportedModel) -> None:
    """The model's own names for inputs, outputs and dimensions; the whole types of those of an ONNX file."""
    graph = model.graph
    wanted = [public for public, _ in program.outputs]
    for position, public in enumerate(wanted):
        value = graph.outputs[position]
        if isinstance(traced, OnnxModel) and value.name == public and value.is_graph_input():
            continue
        again = any(value is v for v in [*graph.inputs, *list(graph.outputs)[:position]])
        if again or value.is_initializer():  # one value under two names, or an input shown as it is
            copy = onnx_ir.node("Identity", [value], name=f"output/{public}")
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[position] = copy.outputs[0]
    taken = {v.name for v in program.inputs}
    final = {id(v) for v in graph.outputs}
    inner = [v for node in graph.all_nodes() for v in node.outputs if id(v) not in final]
    for value in [*inner, *graph.initializers.values()]:
        if value.name in wanted or value.name in taken:
            value.name = f"{value.name}:inner"
    for value, given in zip(graph.inputs, program.inputs, strict=True):  # the exporter renames one that is an output
        value.name = given.name
    for value, public in zip(graph.outputs, wanted, strict=True):
        if value.is_graph_input():
            continue
        value.name = public if public not in taken else f"{public}_out"
        taken.add(value.name)
    if isinstance(traced, OnnxModel):
        for value, declared in zip(graph.outputs, traced.model.graph.outputs, strict=True):
            value.type, value.shape, value.doc_string = declared.type, declared.shape, declared.doc_string
        return
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_rename_dim(d, traced.symbols) for d in value.shape])


def _rename_dim(dim: Any, symbols: Any) -> Any:
    if isinstance(dim, int):
        return dim
    text = str(dim.value) if isinstance(dim, onnx_ir.SymbolicDim) else str(dim)
    return symbols.get(text, text)


def finish(model: onnx_ir.Model, program: Program, traced: ImportedModel) -> onnx_ir.Model:
    """Drop what only an exporter needed, say who made the file, and embed the program's text.

    What an ONNX file says of itself as a whole stays.
    """
    for node in model.graph.all_nodes():
        for key in [k for k in node.metadata_props if not k.startswith("tncompile.")]:
            del node.metadata_props[key]
    for value in [*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)]:
        value.metadata_props.clear()
    onnx_passes.DeduplicateInitializersPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    onnx_passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    onnx_passes.RemoveUnusedOpsetsPass()(model)
    model.producer_name = "tncompile"
    model.producer_version = None
    if not isinstance(traced, OnnxModel):
        for value in [*model.graph.inputs, *model.graph.outputs]:
            value.doc_string = None
        model.graph.name = "main"
        model.doc_string = None
        model.metadata_props.clear()
    model.metadata_props["tncompile.program"] = ir_text.dump(program)
    return model
