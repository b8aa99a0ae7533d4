"""A scheduled program -> an ONNX model.

Opaque nodes are lowered by torch's own exporter: the program becomes a torch.export graph again, with one
custom operator in the place of each network, and the exporter leaves a placeholder node for each of them,
which is then replaced by the network's own nodes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript
import torch
from onnx_ir.passes import common as onnx_passes
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from tncompile.emit.graph import Weights
from tncompile.emit.network import lower
from tncompile.errors import SourceRef, UnsupportedError
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Arg, Constant, Network, Node, Opaque, Program, Ref, Value, evaluate
from tncompile.ir import text as ir_text

OPSET = 20
DOMAIN = "tncompile"
_values: dict[str, torch.Tensor] = {}  # what each network's value looks like, while a program is exported


def to_onnx(program: Program, traced: TracedModel) -> onnx_ir.Model:
    """The ONNX model of a program whose networks are scheduled.

    Only standard operators and domains; UnsupportedError, with the operator and the user's line, where
    torch's exporter has no translation.
    """
    if all(isinstance(node, Network) for node in program.nodes):
        model = _of_placeholders(program)  # nothing for the exporter to do
    else:
        program = _constants_as_weights(program)
        model = _export(program, traced)
    _lower_networks(model, program)
    _name_interface(model, program, traced)
    return _finish(model, program)


def _constants_as_weights(program: Program) -> Program:
    """Networks of cores alone, which are outputs of the model, as weights that are shown as they are."""
    weights, nodes = dict(program.weights), list[Node]()
    for node in program.nodes:
        if isinstance(node, Network) and not node.operands:
            name = f"{node.output.name}.value"
            weights[name] = evaluate(node).astype(node.dtype)
            node = Opaque(node.name, "aten.clone.default", (Ref(name),), (), node.value, node.source)
        nodes.append(node)
    return replace(program, nodes=tuple(nodes), weights=weights)


def _of_placeholders(program: Program) -> onnx_ir.Model:
    """A model of networks alone, each still one placeholder node."""

    def value(item: Value) -> onnx_ir.Value:
        kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(item.dtype)))
        return onnx_ir.Value(name=item.name, type=kind, shape=onnx_ir.Shape(item.shape or ()))

    values = {item.name: value(item) for item in program.inputs}
    nodes = []
    for network in program.networks:
        values[network.output.name] = value(network.value)
        inputs = [values[name] for name in network.inputs]
        plan = {"plan": network.output.name}
        outputs = [values[network.output.name]]
        nodes.append(onnx_ir.node("Network", inputs, plan, domain=DOMAIN, outputs=outputs))
    graph = onnx_ir.Graph(
        [values[item.name] for item in program.inputs],
        [values[name] for _, name in program.outputs],
        nodes=nodes,
        opset_imports={"": OPSET},
    )
    return onnx_ir.Model(graph, ir_version=10)


def _export(program: Program, traced: TracedModel) -> onnx_ir.Model:
    """What torch's exporter makes of a program, with a placeholder node for each network."""
    exported = to_exported(program, traced)
    try:
        with _silent():
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={_network_op(): _placeholder()},
            )
    except Exception as error:
        raise _explain(error, program) from error
    finally:
        _values.clear()
    assert converted is not None
    return converted.model


# -------------------------------------------------------------------- program -> torch.export


def to_exported(program: Program, traced: TracedModel) -> torch.export.ExportedProgram:
    """The program as a torch.export graph, one `tncompile::network` call for each network."""
    meta = {n.name: n.meta for n in traced.exported.graph_module.graph.nodes}
    mode = _fake_mode(traced.exported)
    graph = torch.fx.Graph()
    env: dict[str, torch.fx.Node] = {}
    inputs: list[InputSpec] = []
    state: dict[str, torch.Tensor] = {}
    for number, (name, array) in enumerate(program.weights.items()):
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        node = graph.placeholder(f"weight_{number}")
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        env[name] = node
        state[name] = tensor
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
    for value in program.inputs:
        node = graph.placeholder(value.name)
        node.meta = dict(meta[value.name])
        env[value.name] = node
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    for item in program.nodes:
        if isinstance(item, Network):
            _values[item.output.name] = meta[item.output.name]["val"]
            args: Any = ([env[name] for name in item.inputs], item.output.name)
            node = graph.create_node("call_function", _network_op(), args, {}, item.output.name)
        else:
            args = tuple(_fx_arg(a, env) for a in item.args)
            kwargs = {k: _fx_arg(v, env) for k, v in item.kwargs}
            node = graph.create_node("call_function", _target(item.target), args, kwargs, item.output.name)
        node.meta = dict(meta.get(item.value.name) or _meta_of_weight(item, env))
        env[item.value.name] = node
    outputs = [env[name] for _, name in program.outputs]
    graph.output(tuple(outputs))
    specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs]
    module = torch.fx.GraphModule({}, graph)
    return torch.export.ExportedProgram(
        module,
        graph,
        ExportGraphSignature(inputs, specs),
        state,
        traced.exported.range_constraints,
        traced.exported.module_call_graph,
        traced.exported.example_inputs,
        {},
    )


def _fake_mode(exported: torch.export.ExportedProgram) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for node in exported.graph_module.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def _meta_of_weight(item: Opaque | Network, env: dict[str, torch.fx.Node]) -> dict[str, Any]:
    """The meta of a weight that is shown as an output."""
    return {"val": env[item.inputs[0]].meta["val"]}


@cache
def _network_op() -> Any:
    library = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("network(Tensor[] operands, str name) -> Tensor")  # type: ignore[no-untyped-call]
    _keep.append(library)

    def fake(operands: list[torch.Tensor], name: str) -> torch.Tensor:
        value = _values[name]
        return value.new_empty(value.shape)

    torch.library.register_fake(f"{DOMAIN}::network", fake, lib=library)
    return torch.ops.tncompile.network.default


_keep: list[Any] = []  # a torch library unregisters its operators when it is collected


@cache
def _placeholder() -> Callable[..., Any]:
    """What the exporter puts in the place of a network: one node of a domain of our own."""
    schema = onnx.defs.OpSchema
    operands = schema.FormalParameter(
        "operands", "T", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=True, min_arity=0
    )
    onnx.defs.register_schema(
        schema(
            "Network",
            DOMAIN,
            1,
            inputs=[operands],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)"], "")],
            attributes=[schema.Attribute("plan", schema.AttrType.STRING, "")],
        )
    )
    opset = onnxscript.values.Opset(DOMAIN, 1)

    def translate(operands: Any, name: str) -> Any:
        return opset.Network(*operands, plan=name)

    return translate


def _fx_arg(arg: Arg, env: dict[str, torch.fx.Node]) -> Any:
    if isinstance(arg, Ref):
        return env[arg.name]
    if isinstance(arg, Constant):
        return _constant(arg.spelling)
    return [_fx_arg(a, env) for a in arg] if isinstance(arg, tuple) else arg


def _constant(spelling: str) -> Any:
    if spelling.startswith("torch.device("):
        return torch.device(spelling.removeprefix("torch.device('").removesuffix("')"))
    return getattr(torch, spelling.removeprefix("torch."))


def _target(name: str) -> Any:
    head, _, rest = name.partition(".")
    if head == "operator":
        import math

        for module in (operator, torch, math):
            if hasattr(module, rest):
                return getattr(module, rest)
        raise UnsupportedError(f"{rest} in the traced graph cannot be exported")
    packet, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, head), packet), overload)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints and warns about what users of tncompile cannot change."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _explain(error: Exception, program: Program) -> UnsupportedError:
    """Name the operator and the user's line, which the exporter's error holds deep inside."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    for item in program.nodes:
        if isinstance(item, Opaque) and any(f"%{item.output.name} " in text for text in chain):
            return UnsupportedError(f"torch's ONNX exporter cannot translate {item.target}", item.source)
    first = next((line for text in reversed(chain) for line in text.splitlines() if line.strip()), "")
    return UnsupportedError(f"torch's ONNX exporter failed: {first[:300]}", SourceRef())


# ------------------------------------------------------------------------ placeholders -> nodes


def _lower_networks(model: onnx_ir.Model, program: Program) -> None:
    graph = model.graph
    networks = {n.output.name: n for n in program.networks}
    shared = {
        id(array): graph.initializers[name] for name, array in program.weights.items() if name in graph.initializers
    }
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    weights = Weights(shared, {*graph.initializers, *program.values, *(v.name for v in values if v.name)})
    taken: set[str] = set()
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        network = networks[node.attributes["plan"].as_string()]
        operands = dict(zip(network.inputs, node.inputs, strict=True))
        nodes, result = lower(network, operands, weights)  # type: ignore[arg-type]
        old = node.outputs[0]
        if result.producer() is None or result in operands.values():  # an initializer or an operand as it is
            nodes.append(onnx_ir.node("Identity", [result], name=f"{network.label}/Identity"))
            result = nodes[-1].outputs[0]
        result.type, result.shape = onnx_ir.TensorType(onnx_ir.DataType[_onnx_dtype(network.dtype)]), old.shape
        _label(nodes, network, taken)
        graph.insert_before(node, nodes)
        onnx_ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        result.name = network.output.name
    for value in weights.values.values():
        graph.register_initializer(value)


def _onnx_dtype(name: str) -> str:
    return {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16"}[name]


def _label(nodes: list[onnx_ir.Node], network: Network, taken: set[str]) -> None:
    """Unique node names, and the layer, bonds and source line where Netron shows them."""
    sizes = {i.name: i.size for i in network.indices.values()}
    bonds = {i.name for t in network.cores for i in t.indices} - {i.name for i in network.output.indices}
    bonds -= {i.name for t in network.operands for i in t.indices}
    for node in nodes:
        base, number = node.name or node.op_type, 1
        name = base
        while name in taken:
            number += 1
            name = f"{base}.{number}"
        taken.add(name)
        node.name = name
        for output in node.outputs:
            output.name = f"{name}:out"
        node.metadata_props["tncompile.network"] = network.output.name
        node.metadata_props["tncompile.layer"] = network.name
        if bonds:
            node.metadata_props["tncompile.bonds"] = " ".join(f"{b}={sizes[b]}" for b in sorted(bonds))
        if network.source.file:
            node.metadata_props["tncompile.source"] = f"{network.source.file}:{network.source.line}"


# ------------------------------------------------------------------------------- finishing


def _name_interface(model: onnx_ir.Model, program: Program, traced: TracedModel) -> None:
    """The model's own names for inputs, outputs and dimensions."""
    graph = model.graph
    wanted = [public for public, _ in program.outputs]
    for position, public in enumerate(wanted):
        value = graph.outputs[position]
        again = any(value is v for v in [*graph.inputs, *list(graph.outputs)[:position]])
        if again or value.is_initializer():  # one value under two names, or an input shown as it is
            copy = onnx_ir.node("Identity", [value], name=f"output/{public}")
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[position] = copy.outputs[0]
    taken = {v.name for v in program.inputs}
    final = {id(v) for v in graph.outputs}
    inner = [v for node in graph for v in node.outputs if id(v) not in final]
    for value in [*inner, *graph.initializers.values()]:
        if value.name in wanted or value.name in taken:
            value.name = f"{value.name}:inner"
    for value, given in zip(graph.inputs, program.inputs, strict=True):  # the exporter renames one that is an output
        value.name = given.name
    for value, public in zip(graph.outputs, wanted, strict=True):
        value.name = public if public not in taken else f"{public}_out"
        taken.add(value.name)
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_rename_dim(d, traced.symbols) for d in value.shape])


def _rename_dim(dim: Any, symbols: Any) -> Any:
    if isinstance(dim, int):
        return dim
    text = str(dim.value) if isinstance(dim, onnx_ir.SymbolicDim) else str(dim)
    return symbols.get(text, text)


def _finish(model: onnx_ir.Model, program: Program) -> onnx_ir.Model:
    """Drop what only the exporter needed, say who made the file, and embed the program's text."""
    for node in model.graph.all_nodes():
        for key in [k for k in node.metadata_props if not k.startswith("tncompile.")]:
            del node.metadata_props[key]
    for value in [*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)]:
        value.metadata_props.clear()
    onnx_passes.DeduplicateInitializersPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    onnx_passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    onnx_passes.RemoveUnusedOpsetsPass()(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.doc_string = None
    model.graph.name = "main"
    model.producer_name = "tncompile"
    model.producer_version = None
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props["tncompile.program"] = ir_text.dump(program)
    return model
