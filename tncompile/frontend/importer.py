"""torch.export graph -> Program: every multilinear operation becomes a network, the rest stays opaque."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from tncompile.errors import SourceRef, UnsupportedError
from tncompile.frontend.computable import computable
from tncompile.frontend.equation import NotMultilinear
from tncompile.frontend.multilinear import translate
from tncompile.frontend.networks import NetworkBuilder, Result, Source
from tncompile.frontend.sizes import named_sizes
from tncompile.frontend.sources import innermost_line
from tncompile.frontend.structure import output_names
from tncompile.frontend.translators import operator_name
from tncompile.ir import dims
from tncompile.ir.core import NETWORK_DTYPES, Array, Network, Node, Program
from tncompile.ir.edit import CannotEdit, fresh, unique_cores
from tncompile.ir.opaque import Arg, Constant, Opaque, Ref, Value

_DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in NETWORK_DTYPES}
_REFUSED = {torch.complex32, torch.complex64, torch.complex128}


@dataclass(frozen=True)
class TracedModel:
    """A model as it came in: the functional torch.export graph, and the program imported from it.

    `exported` is what the opaque nodes are lowered from, and the reference that a compiled model is checked against,
    but where complex numbers became pairs of real ones: then that is `computes`, the graph as it was. `sizes` has the
    example's size of every symbolic dimension. `notes` say what is not as in the model.
    """

    exported: torch.export.ExportedProgram
    program: Program
    sizes: Mapping[str, int]
    symbols: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    computes: torch.export.ExportedProgram | None = None

    @property
    def reference(self) -> torch.export.ExportedProgram:
        """What a compiled model is checked against."""
        return self.exported if self.computes is None else self.computes


def import_exported(exported: torch.export.ExportedProgram) -> TracedModel:
    """Import an exported program. UnsupportedError where the model cannot be compiled."""
    adaptation = computable(exported)
    functional = adaptation.exported
    signature = functional.graph_signature  # before, a write is an operation like any other
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        names = [*signature.buffers_to_mutate.values()]
        raise UnsupportedError(
            f"the model writes to {', '.join(names) or 'an input'} when it runs; "
            "export it in inference mode (model.eval()), with state as inputs and outputs"
        )
    return replace(
        Importer(functional, named_sizes(exported)).run(), notes=adaptation.notes, computes=adaptation.reference
    )


class Importer:
    """One import; holds what is known so far of each fx node. State of the model is constant."""

    def __init__(self, exported: torch.export.ExportedProgram, named: Mapping[str, str]) -> None:
        self.exported = exported
        self.named = named  # what the user calls torch's symbols
        self.weights: dict[str, Array] = {}
        self.tensors: dict[str, torch.Tensor] = {}  # constants, by fx name
        self.weight_of: dict[str, str] = {}  # fx name of a constant -> name of the weight
        self.by_storage: dict[Any, str] = {}
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.symbols: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.lazy: dict[str, torch.fx.Node] = {}  # constant nodes not evaluated (yet)
        self.reserved: set[str] = set()  # names of values, which weights must not have
        self.shown: dict[str, str] = {}  # weights shown as outputs, by fx name
        self.builder = NetworkBuilder[torch.fx.Node](self._source)

    def run(self) -> TracedModel:
        graph = self.exported.graph_module.graph
        placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        self.reserved = {n.name for n in graph.nodes}
        specs = self.exported.graph_signature.input_specs
        self._name_symbols([placeholders[s.arg.name] for s in specs if s.kind == InputKind.USER_INPUT])
        for spec in specs:
            self._placeholder(placeholders[spec.arg.name], spec)
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op not in ("placeholder", "output"):
                raise UnsupportedError(f"{node.op} of {node.target} in the traced graph", source_of(node))
        outputs = self._outputs()
        program = Program(tuple(self.inputs), tuple(self.nodes), outputs, self._used_weights(outputs))
        return TracedModel(self.exported, unique_cores(program), self.sizes, self.symbols)

    # -------------------------------------------------------------------------------- inputs

    def _name_symbols(self, inputs: Sequence[torch.fx.Node]) -> None:
        """Call one ``batch``: that which the user calls so, else the first dynamic mode that is any input's first.

        Others are called as the user does, or as torch.
        """
        shapes = [node.meta["val"].shape for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
        sizes = [size for shape in shapes for size in shape if not isinstance(size, int)]
        symbols = list(dict.fromkeys(s for size in sizes for s in sorted(map(str, size.node.expr.free_symbols))))
        leading = (size for shape in shapes for size in shape[:1] if not isinstance(size, int))
        first = (s for size in leading for s in sorted(map(str, size.node.expr.free_symbols)))
        batch = next((s for s in symbols if self.named.get(s) == "batch"), None) or next(first, None)
        taken = {"batch", *symbols}
        for symbol in symbols:
            name = self.named.get(symbol, symbol)
            self.symbols[symbol] = "batch" if symbol == batch else symbol if name in taken else name
            taken.add(self.symbols[symbol])
        for size in sizes:
            if str(size.node.expr) in self.symbols:
                hint = size.node.hint if size.node.has_hint() else None
                self.sizes.setdefault(self.symbols[str(size.node.expr)], int(hint) if hint is not None else 2)

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> None:
        if spec.kind == InputKind.USER_INPUT:
            value = node.meta.get("val")
            if not isinstance(spec.arg, TensorArgument) or not isinstance(value, torch.Tensor):
                if node.users:
                    raise UnsupportedError(f"input {node.name} is not a tensor; make it part of the model")
                return
            self.inputs.append(Value(node.name, self._dtype(value, f"input {node.name}"), self._shape(value)))
            return
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise UnsupportedError(f"the model holds {spec.arg.name}, which is not a tensor")
        name = str(spec.target)
        store = self.exported.state_dict if spec.target in self.exported.state_dict else self.exported.constants
        if node.users:
            self._add_constant(node.name, name, store[spec.target])

    def _add_constant(self, fx_name: str, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        self._dtype(tensor, f"weight {name}")
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.numel() == 0)
        if tensor.numel() and key in self.by_storage:  # tied weights stay one
            name = self.by_storage[key]
        else:
            name = fresh(f"{name}.weight" if name in self.reserved else name, self.weights)
            self.weights[name] = tensor.cpu().contiguous().numpy()
            self.by_storage[key] = name
        self.tensors[fx_name] = tensor
        self.weight_of[fx_name] = name

    def _dtype(self, tensor: torch.Tensor, what: str) -> str:
        if tensor.dtype in _REFUSED or tensor.is_quantized or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            advice = "store it in a real dtype" if tensor.dtype.is_complex else "convert the model with model.float()"
            raise UnsupportedError(f"{what} has dtype {kind}, which is not supported; {advice}")
        try:
            return str(np.dtype(str(tensor.dtype).removeprefix("torch.")))
        except TypeError:
            raise UnsupportedError(f"{what} has dtype {tensor.dtype}, which is not supported") from None

    def _dim(self, size: Any) -> dims.Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        parts: list[dims.Dim] = []
        for factor in expression.as_ordered_factors():
            text = str(factor)
            if factor.is_Integer:
                parts.append(int(factor))
            elif factor.is_Symbol:
                parts.append(self.symbols.get(text, text))
            elif factor.is_Pow and factor.base.is_Symbol and factor.exp.is_Integer and factor.exp > 0:
                parts += [self.symbols.get(str(factor.base), str(factor.base))] * int(factor.exp)
            else:
                renamed = re.sub(r"\b[A-Za-z_]\w*\b", lambda m: self.symbols.get(m[0], m[0]), text)
                parts.append(f"({renamed})")
        return dims.product(parts)

    def _shape(self, tensor: torch.Tensor) -> tuple[dims.Dim, ...]:
        return tuple(self._dim(s) for s in tensor.shape)

    # -------------------------------------------------------------------------------- nodes

    def _call(self, node: torch.fx.Node) -> None:
        if operator_name(node) in (
            "aten._assert_tensor_metadata",
            "aten._assert_scalar",
            "aten.sym_constrain_range_for_size",
        ):
            return
        constant = self._is_constant_call(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self._dtype(value, f"the result of {operator_name(node)}")
        if constant:
            self.lazy[node.name] = node
        if isinstance(value, torch.Tensor) and value.dtype in _DTYPE_NAMES and _not_empty(value):
            try:
                self.nodes.append(self._network(node, value))
                return
            except (NotMultilinear, CannotEdit):
                pass
        if constant:
            if isinstance(value, torch.Tensor):
                self._add_constant(node.name, node.name, self._evaluate(node))
            return
        self.nodes.append(self._opaque(node))

    def _is_constant_call(self, node: torch.fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        random = (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if random or (schema is not None and schema.is_mutable):
            return False
        return all(self._is_constant(n) for n in node.all_input_nodes)

    def _is_constant(self, node: Any) -> bool:
        return not isinstance(node, torch.fx.Node) or node.name in self.tensors or node.name in self.lazy

    def _evaluate(self, node: torch.fx.Node) -> Any:
        """The value of a constant node, computed by torch."""
        if node.name not in self.tensors:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._evaluate)
            with torch.no_grad():
                self.tensors[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.tensors[node.name]

    def _opaque(self, node: torch.fx.Node) -> Opaque:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = str(target)
        elif getattr(target, "__module__", "") in ("_operator", "builtins", "math") or target is operator.getitem:
            name = operator_name(node)
        else:
            raise UnsupportedError(f"the traced graph calls {target}, which cannot be exported", source_of(node))
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            output = Value(node.name, self._dtype(value, node.name), self._shape(value))
        else:
            output = Value(node.name, "tuple" if isinstance(value, (tuple, list)) else "scalar")
        kwargs = tuple((k, self._arg(v)) for k, v in node.kwargs.items())
        args = tuple(self._arg(a) for a in node.args)
        return Opaque(layer_of(node), name, args, kwargs, output, source_of(node))

    def _arg(self, arg: Any) -> Arg:
        if isinstance(arg, torch.fx.Node):
            if arg.name in self.weight_of:
                return Ref(self.weight_of[arg.name])
            return Ref(arg.name)
        if isinstance(arg, (list, tuple)):
            return tuple(self._arg(a) for a in arg)
        if arg is None or isinstance(arg, (bool, int, float, str)):
            return arg
        if isinstance(arg, torch.device):
            return Constant(f"torch.device({arg.type!r})")
        if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)):
            return Constant(str(arg))
        raise UnsupportedError(f"an argument of type {type(arg).__name__} in the traced graph")

    # -------------------------------------------------------------------------------- networks

    def _network(self, node: torch.fx.Node, value: torch.Tensor) -> Network:
        translation = translate(node, self._evaluate, self._is_constant)
        result = Value(node.name, _DTYPE_NAMES[value.dtype], self._shape(value))
        return self.builder.build(translation, Result(result, layer_of(node), source_of(node)))

    def _source(self, node: Any) -> Source:
        if not isinstance(node, torch.fx.Node):
            raise NotMultilinear("a tensor was expected")
        value = node.meta["val"]
        weight = self.weight_of.get(node.name)
        dtype = _DTYPE_NAMES.get(value.dtype, "")
        shown = Value(node.name if weight is None else weight, dtype, self._shape(value))
        return Source(shown, None if weight is None else self.weights[weight])

    # -------------------------------------------------------------------------------- outputs

    def _outputs(self) -> tuple[tuple[str, str], ...]:
        specs = self.exported.graph_signature.output_specs
        names = output_names(self.exported)
        outputs = []
        defined = {v.name for v in self.inputs} | {n.value.name for n in self.nodes}
        for public, spec in zip(names, specs, strict=True):
            constant = getattr(spec.arg, "value", None) if isinstance(spec.arg, ConstantArgument) else None
            if isinstance(constant, (bool, int, float)):
                name = fresh(f"{public}_value", {*self.reserved, *self.weights})
                self.weights[name] = np.asarray(constant)
                self.weight_of[name] = name
                self.nodes.append(self._constant_output(name))
                outputs.append((public, self.nodes[-1].value.name))
                continue
            if isinstance(spec.arg, ConstantArgument) and constant is None:
                continue  # a model may return None for what it was not asked for
            if spec.kind != OutputKind.USER_OUTPUT or not isinstance(spec.arg, TensorArgument):
                raise UnsupportedError(f"output {public!r} of the model is not a tensor")
            name = spec.arg.name
            if name not in defined:  # a weight shown as it is
                if name not in self.shown:
                    self.nodes.append(self._constant_output(name))
                    self.shown[name] = self.nodes[-1].value.name
                name = self.shown[name]
            outputs.append((public, name))
        return tuple(outputs)

    def _constant_output(self, fx_name: str) -> Node:
        weight = self.weight_of[fx_name]
        array = self.weights[weight]
        value = Value(f"{fx_name}_output", str(array.dtype), tuple(int(s) for s in array.shape))
        return Opaque(weight, "aten.clone.default", (Ref(weight),), (), value)

    def _used_weights(self, outputs: tuple[tuple[str, str], ...]) -> dict[str, Array]:
        used = {name for n in self.nodes if isinstance(n, Opaque) for name in n.inputs}
        return {name: array for name, array in self.weights.items() if name in used}


def _not_empty(tensor: torch.Tensor) -> bool:
    return not any(isinstance(size, int) and size == 0 for size in tensor.shape)


def layer_of(node: torch.fx.Node) -> str:
    """Path of the module that a node was traced in, ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    path = re.sub(r"@\d+$", "", str(path).removeprefix("L['self']."))
    return "" if path.startswith("_empty_nn_module_stack") else path


def source_of(node: torch.fx.Node) -> SourceRef:
    """The user's line of Python: the innermost one outside installed packages, or at least outside torch."""
    return innermost_line(node.meta.get("stack_trace") or "", layer_of(node))
