"""ONNX graph -> Program: every multilinear operator becomes a network, the rest stays opaque."""

from __future__ import annotations

import ast
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from tncompile.errors import LoadError, SourceRef, UnsupportedError
from tncompile.frontend.equation import NotMultilinear
from tncompile.frontend.networks import NetworkBuilder, Result, Source
from tncompile.frontend.onnx.evaluate import compute, fits, may_be_computed
from tncompile.frontend.onnx.load import read
from tncompile.frontend.onnx.multilinear import Operator, multilinear, translate
from tncompile.frontend.onnx.prepare import prepare
from tncompile.frontend.onnx.shapes import Shapes
from tncompile.frontend.onnx.symbols import Symbols
from tncompile.frontend.sources import innermost_line
from tncompile.ir import Array, Dim, Node, Opaque, Program, Ref, Value
from tncompile.ir.core import NETWORK_DTYPES
from tncompile.ir.edit import CannotEdit, fresh, unique_cores
from tncompile.ir.opaque import Arg

IDENTITY = "onnx.Identity"
CAPTURED = "captured"
"""The argument of an opaque node that has the outer values its subgraphs read, as its `Origin` names them."""
_SIZE = 32  # what a symbolic size other than the batch counts as where nobody says
_HUGE = 1 << 36  # bytes that no value of fixed shape may have
_SMALL = 4096  # elements of a constant that an opaque node reads as numbers and not as a network


@dataclass(frozen=True)
class Origin:
    """The node that an opaque value comes from, and the names of the outer values that its subgraphs read."""

    node: onnx_ir.Node
    captured: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxModel:
    """A model as it came in: the ONNX graph, and the program imported from it.

    `model` is what the opaque nodes are copied from, of one operator set and without functions; `nodes` has the
    node behind each opaque value. `file` is the file as it was. `sizes` has a size to plan for of every symbolic
    dimension, `symbols` the program's name for each that the file names. `notes` say what is not as in the file.
    """

    file: onnx.ModelProto = field(repr=False)
    model: onnx_ir.Model = field(repr=False)
    program: Program
    sizes: Mapping[str, int]
    symbols: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, Origin] = field(default_factory=dict, repr=False)
    folder: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def original(self) -> bytes:
        """The file as it was, with its external data in it. UnsupportedError for over 2 GB."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.file)
        if self.folder:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # onnx's own, of keys that mean nothing to it
                onnx.external_data_helper.load_external_data_for_model(whole, self.folder)
        try:
            return bytes(whole.SerializeToString(deterministic=True))
        except Exception as error:  # what protobuf raises for too large a message is its own affair
            raise UnsupportedError("the original file holds over 2 GB, which cannot be run as a whole") from error

    def save(self, path: Path) -> None:
        """Write the file as it was, with its external data in it."""
        path.write_bytes(self.original)


def import_onnx(source: str | os.PathLike[str] | bytes) -> OnnxModel:
    """Import an ONNX file, given by its path or its bytes.

    LoadError where it cannot be read, is damaged, or names data outside its folder; UnsupportedError where it cannot
    be compiled.
    """
    proto = read(source)
    name = "the model" if isinstance(source, bytes) else os.fspath(source)
    folder = "" if isinstance(source, bytes) else os.path.dirname(os.path.realpath(source))
    try:
        return import_proto(proto, folder)
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error


def import_proto(proto: onnx.ModelProto, folder: str = "") -> OnnxModel:
    """Import a model that has been checked, whose external data are in a folder. Raises what `import_onnx` does."""
    return _Importer(proto, prepare(proto, folder), folder).run()


class _Importer:
    """One import; holds what is known so far of each value."""

    def __init__(self, file: onnx.ModelProto, model: onnx_ir.Model, folder: str) -> None:
        self.file = file
        self.model = model
        self.folder = folder
        self.graph = model.graph
        self.symbols = Symbols.of(self.graph.inputs)
        self.constants: dict[str, Array] = {}
        self.shapes = Shapes(model.opset_imports, self.constants, self.symbols.all)
        self.lazy: dict[str, onnx_ir.Node] = {}  # constant nodes not evaluated (yet)
        self.nodes: list[Node] = []
        self.origin: dict[str, Origin] = {}
        self.names = {*_names(self.graph)}
        self.builder = NetworkBuilder[str](self._source, self.names)

    def run(self) -> OnnxModel:
        inputs = tuple(self._input(value) for value in self.graph.inputs)
        for name, value in self.graph.initializers.items():
            self._initializer(name, value)
        for node in self.graph:
            self._node(node)
        outputs = tuple(self._output(value) for value in self.graph.outputs)
        used = {name for n in self.nodes if isinstance(n, Opaque) for name in n.inputs}
        weights = {name: array for name, array in self.constants.items() if name in used and name not in self.lazy}
        program = unique_cores(Program(inputs, tuple(self.nodes), outputs, weights))
        sizes = {symbol: 2 if symbol == "batch" else _SIZE for symbol in self.symbols.all}
        return OnnxModel(self.file, self.model, program, sizes, self.symbols.names, self.origin, self.folder)

    # ------------------------------------------------------------------------------ inputs and outputs

    def _input(self, value: onnx_ir.Value) -> Value:
        name = value.name or ""
        if not isinstance(value.type, onnx_ir.TensorType):
            raise UnsupportedError(f"the input {name} is not a tensor; make it part of the model")
        shape = self.symbols.shapes[name]
        if shape is None:
            raise UnsupportedError(f"the input {name} has no shape, not even a rank; give it one in the file")
        self.shapes.set(name, value.type.dtype.value, shape)
        return self._bounded(self.shapes.value(name))

    def _output(self, value: onnx_ir.Value) -> tuple[str, str]:
        name = value.name or ""
        if value.type is not None and not isinstance(value.type, onnx_ir.TensorType):
            raise UnsupportedError(f"the output {name} is not a tensor, which cannot be checked; make it tensors")
        if name not in self.constants or name in self.lazy:
            return name, name
        shown = fresh(f"{name}.shown", self.names)  # a weight shown as it is
        self.names.add(shown)
        array = self.constants[name]
        copy = Value(shown, str(array.dtype), array.shape)
        self.nodes.append(Opaque("", IDENTITY, (Ref(name),), (), copy))
        return name, shown

    def _initializer(self, name: str, value: onnx_ir.Value) -> None:
        tensor = value.const_value
        try:
            if tensor is None:
                raise ValueError("it has no value")
            self.constants[name] = tensor.numpy()
        except Exception as error:  # whatever damaged data make it raise
            raise LoadError(f"the weight {name!r} cannot be read ({str(error)[:200]})") from error
        self.shapes.set(name, tensor.dtype.value, [int(size) for size in self.constants[name].shape])

    def _bounded(self, value: Value) -> Value:
        if value.shape is not None and value.dtype not in ("tuple", "object"):
            size = math.prod(n for n in value.shape if isinstance(n, int)) * np.dtype(value.dtype).itemsize
            if size > _HUGE:
                raise UnsupportedError(f"{value.name} has the shape {list(value.shape)}, which is {size / 1e9:,.0f} GB")
        return value

    # ------------------------------------------------------------------------------ nodes

    def _node(self, node: onnx_ir.Node) -> None:
        captured = [name for name in _read_inside(node) if name in self.shapes.types]
        self.shapes.infer(node, captured)
        outputs = [v.name for v in node.outputs if v.name]
        for name in outputs:
            self._bounded(self.shapes.value(name))
        constant = may_be_computed(node) and all(v is None or self._is_constant(v.name or "") for v in node.inputs)
        network = self._network(node)
        if network is not None:
            self.nodes.append(network)
            if constant:
                self.lazy[outputs[0]] = node
        elif not (constant and self._evaluate(node)):
            self._opaque(node, captured)

    def _network(self, node: onnx_ir.Node) -> Node | None:
        if not multilinear(node):
            return None
        value = self.shapes.value(node.outputs[0].name or "")
        if value.dtype not in NETWORK_DTYPES or value.shape is None or 0 in value.shape:
            return None
        layer = layer_of(node)
        result = Result(value, layer, source_of(node, layer))
        try:
            network = self.builder.build(translate(Operator(node, self.shapes.value, self.constant)), result)
        except (NotMultilinear, CannotEdit, ValueError, IndexError):  # the last two: of a node that is not valid
            return None
        return network if self._shown_sizes(node, value.shape) else None

    def _shown_sizes(self, node: onnx_ir.Node, shape: tuple[Dim, ...]) -> bool:
        """Whether every run-time size of a result is an axis of an input, or known from the model's inputs."""
        known = {size for v in node.inputs if v is not None for size in self.shapes.shape(v.name or "") or ()}
        sizes = [size for size in shape if isinstance(size, str) and size not in known]
        return all(_symbols(size) <= {*self.symbols.all} for size in sizes)

    def _source(self, name: str) -> Source:
        return Source(self.shapes.value(name), self.constants.get(name) if name not in self.lazy else None)

    # ------------------------------------------------------------------------------ constants

    def _is_constant(self, name: str) -> bool:
        return not name or name in self.constants or name in self.lazy

    def constant(self, name: str) -> Array | None:
        """The numbers of a value that depends on weights alone; None for another, or one that is too large."""
        todo = [name]
        while todo:
            node = self.lazy.get(todo[-1])
            if todo[-1] in self.constants or node is None:
                todo.pop()
                continue
            missing = [n for v in node.inputs if v is not None and (n := v.name or "") and n not in self.constants]
            if missing and all(n in self.lazy for n in missing):
                todo += missing
            elif missing or not self._compute(node):
                return None
        return self.constants.get(name)

    def _evaluate(self, node: onnx_ir.Node) -> bool:
        """Compute a node whose inputs are constant; False where it is too large, or cannot be computed."""
        read = [v.name for v in node.inputs if v is not None and v.name]
        return all(self.constant(name) is not None for name in read) and self._compute(node)

    def _compute(self, node: onnx_ir.Node) -> bool:
        arrays = {v.name: self.constants[v.name] for v in node.inputs if v is not None and v.name}
        names = [v.name for v in node.outputs if v.name]
        if not all(fits(self.shapes.value(name), list(arrays.values()), node.op_type) for name in names):
            return False
        try:
            found = compute(node, arrays, self.model.opset_imports[""])
        except NotMultilinear:
            return False
        for name, array in zip(names, found, strict=True):
            self.constants[name] = array
            self.shapes.set(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        return True

    # ------------------------------------------------------------------------------ opaque nodes

    def _opaque(self, node: onnx_ir.Node, captured: list[str]) -> None:
        layer = layer_of(node)
        source = source_of(node, layer)
        args = tuple(None if v is None or not v.name else self._ref(v.name) for v in node.inputs)
        kwargs = [(name, _arg(attribute)) for name, attribute in sorted(node.attributes.items())]
        if captured:
            kwargs.append((CAPTURED, tuple(map(self._ref, captured))))
        named = [(k, v.name) for k, v in enumerate(node.outputs) if v.name]
        if [k for k, _ in named] == [0]:
            value = self.shapes.value(named[0][1])
        else:
            value = Value(fresh(f"{node.name or node.op_type}:outputs", self.names), "tuple")
            self.names.add(value.name)
        self.nodes.append(Opaque(layer, target(node), args, tuple(kwargs), value, source))
        self.origin[value.name] = Origin(node, tuple(captured))
        if value.name not in dict(named).values():
            for position, name in named:
                part = self.shapes.value(name)
                self.nodes.append(Opaque(layer, "operator.getitem", (Ref(value.name), position), (), part, source))

    def _ref(self, name: str) -> Ref:
        """A value as an opaque node reads it: small constants as numbers, however they came to be."""
        if name in self.lazy and name not in self.constants:
            shape = self.shapes.shape(name)
            if shape is not None and math.prod(n for n in shape if isinstance(n, int)) <= _SMALL:
                self.constant(name)
        if name in self.lazy and name in self.constants:
            weight = f"{name}.value"
            self.constants.setdefault(weight, self.constants[name])
            self.names.add(weight)
            return Ref(weight)
        return Ref(name)


def _symbols(size: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(size, mode="eval")) if isinstance(n, ast.Name)}


def _names(graph: onnx_ir.Graph) -> Iterator[str]:
    """Names of all values of a graph and of those inside its nodes."""
    for value in (*graph.inputs, *graph.initializers.values()):
        yield value.name or ""
    for node in graph.all_nodes():
        for value in node.outputs:
            yield value.name or ""
        for inner in subgraphs(node):
            for value in (*inner.inputs, *inner.initializers.values()):
                yield value.name or ""


def subgraphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs that a node holds: branches, the body of a loop."""
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _read_inside(node: onnx_ir.Node) -> list[str]:
    """Names that a node's subgraphs read, in order, each once; some are defined there too."""
    found: dict[str, None] = {}
    for graph in subgraphs(node):
        for inner in graph.all_nodes():
            found |= dict.fromkeys(v.name for v in inner.inputs if v is not None and v.name)
            for nested in subgraphs(inner):
                found |= dict.fromkeys(v.name for v in nested.outputs if v.name)
        found |= dict.fromkeys(v.name for v in graph.outputs if v.name)
    return list(found)


def _arg(attribute: onnx_ir.Attr) -> Arg:
    """An attribute as text shows it; tensors and graphs by a digest of what they hold."""
    value: Any = attribute.value
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str)) for item in value):
        return tuple(value)
    data = onnx_ir.to_proto(attribute).SerializeToString(deterministic=True)
    return f"{attribute.type.name.lower()} {hashlib.sha256(data).hexdigest()[:16]}"


def target(node: onnx_ir.Node) -> str:
    """What an opaque node of a program calls the operator of a node."""
    return f"{node.domain or 'onnx'}.{node.op_type}"


def layer_of(node: onnx_ir.Node) -> str:
    """The layer that a node is of, as far as its exporter tells: ``/encoder/fc1/MatMul`` -> ``encoder.fc1``."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        try:
            names = ast.literal_eval(scopes)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            names = []
        return str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""
    parts = [part for part in (node.name or "").split("/") if part]
    return ".".join(parts[:-1])


def source_of(node: onnx_ir.Node, layer: str) -> SourceRef:
    """The user's line of Python, where torch's exporter kept it."""
    return innermost_line(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""), layer)
