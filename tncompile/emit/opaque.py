"""Opaque nodes through torch's own ONNX exporter.

The program becomes a torch.export graph again, with one custom operator in the place of each network; what the
exporter makes of that operator is one placeholder node of a domain of our own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from tncompile.emit.operators import fx_arg, operator_of
from tncompile.errors import SourceRef, UnsupportedError
from tncompile.frontend.importer import TracedModel
from tncompile.frontend.structure import flat_calls
from tncompile.ir import Dim, Opaque, Program, dims

OPSET = 20
DOMAIN = "tncompile"
_values: dict[str, torch.Tensor] = {}  # what each network's value looks like, while a program is exported


def export(program: Program, traced: TracedModel) -> onnx_ir.Model:
    """What torch's exporter makes of a program, with a placeholder node for each network."""
    exported = to_exported(program, traced)
    try:
        with _silent():
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={
                    _network_op(): _placeholder(),
                    torch.ops.aten.floor_divide.default: _floor_divide,
                },
            )
    except Exception as error:
        raise _explain(error, program, exported) from error
    finally:
        _values.clear()
    assert converted is not None
    return converted.model


def to_exported(program: Program, traced: TracedModel) -> torch.export.ExportedProgram:
    """The program as a torch.export graph, one `tncompile::network` call for each network."""
    mode = _fake_mode(traced.exported)
    meta = {n.name: n.meta for n in traced.exported.graph_module.graph.nodes}
    meta |= _relaid(program, traced, meta, mode)
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
        if not isinstance(item, Opaque):
            _values[item.output.name] = meta[item.output.name]["val"]
            args: Any = ([env[name] for name in item.inputs], item.output.name)
            node = graph.create_node("call_function", _network_op(), args, {}, item.output.name)
        else:
            args = tuple(fx_arg(a, env) for a in item.args)
            kwargs = {k: fx_arg(v, env) for k, v in item.kwargs}
            node = graph.create_node("call_function", operator_of(item.target), args, kwargs, item.output.name)
        node.meta = dict(meta.get(item.value.name) or _meta_of(node, mode))
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
        flat_calls(len(program.inputs), len(outputs)),
        None,
        {},
    )


def _relaid(program: Program, traced: TracedModel, meta: dict[str, Any], mode: Any) -> dict[str, dict[str, Any]]:
    """The meta of values that were not traced, or have another shape than was, as passes have made or moved them."""
    found: dict[str, dict[str, Any]] = {}
    sizes: dict[Dim, Any] = {}
    for name, value in traced.program.values.items():
        fake = meta.get(name, {}).get("val")
        if value.shape is not None and isinstance(fake, torch.Tensor):
            sizes |= {dim: size for dim, size in zip(value.shape, fake.shape, strict=True) if not isinstance(dim, int)}
    for name, value in program.values.items():
        before = traced.program.values.get(name)
        if value.shape is None or (before is not None and before.shape in (None, value.shape)):
            continue
        shape = [_run_time_size(dim, sizes) for dim in value.shape]
        with mode:
            found[name] = {**meta.get(name, {}), "val": torch.empty(shape, dtype=getattr(torch, value.dtype))}
    return found


def _run_time_size(dim: Dim, sizes: dict[Dim, Any]) -> Any:
    """A size of a new shape in torch's symbols, from the sizes that were traced."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    for known, size in sizes.items():
        times, part = dims.divide(dim, known), dims.divide(known, dim)
        if isinstance(times, int) or isinstance(part, int):
            return size * times if isinstance(times, int) else size // part
    raise UnsupportedError(f"the size {dim} cannot be read off a shape of {', '.join(map(str, sizes))}")


def _fake_mode(exported: torch.export.ExportedProgram) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for node in exported.graph_module.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def _meta_of(node: torch.fx.Node, mode: Any) -> dict[str, Any]:
    """The meta of a node that a pass has put in: what torch makes of its arguments' values."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        return {"val": node.target(*args, **kwargs)}  # type: ignore[operator]


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


def _floor_divide(self: Any, other: Any) -> Any:
    """``floor(self / other)`` in three nodes of integers, where torch's exporter has eight."""
    op = onnxscript.values.Opset("", OPSET)
    if self.dtype.is_floating_point():
        return op.Floor(op.Div(self, other))
    return op.Div(op.Sub(self, op.Mod(self, other)), other)  # Mod has the sign of `other`, so nothing is left over


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


_UNTRANSLATED = re.compile(r"translating node %(\S+) :.*?call_function\[target=torch\.ops\.([\w.]+)\]", re.DOTALL)


def _explain(error: Exception, program: Program, exported: torch.export.ExportedProgram) -> UnsupportedError:
    """Name the operator and the user's line, which the exporter's error holds deep inside."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    nodes = {n.output.name: n for n in program.nodes if isinstance(n, Opaque)}
    for name, target in (found.groups() for text in chain for found in _UNTRANSLATED.finditer(text)):
        origins = [name] if name in nodes and nodes[name].target == target else [*_origins(exported, target), name]
        at_fault = next((nodes[origin] for origin in origins if origin in nodes), None)
        if at_fault is not None:
            part = "" if at_fault.target == target else f" (no ONNX for {target} in it)"
            advice = "write it with other operations, or compute it outside the model"
            return UnsupportedError(
                f"torch's ONNX exporter cannot translate {at_fault.target}{part}; {advice}", at_fault.source
            )
    first = next((line for text in reversed(chain) for line in text.splitlines() if line.strip()), "")
    return UnsupportedError(f"torch's ONNX exporter failed: {first[:300]}", SourceRef())


def _origins(exported: torch.export.ExportedProgram, target: str) -> list[str]:
    """Names of the nodes that have this operator inside, once they are decomposed as far as the exporter does."""
    table = {**torch.export.default_decompositions(), **torch._decomp.decomposition_table}
    try:
        with _silent():
            decomposed = exported.run_decompositions(table)
    except Exception:  # the exporter's error is the one to tell
        return []
    inside = (n for n in decomposed.graph.nodes if n.op == "call_function" and str(n.target) == target)
    return [source.name for node in inside for source in node.meta.get("from_node", ())]
