"""Read an ONNX file of a stranger: nothing outside its folder is opened, and what is damaged is refused."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import Message

from tncompile.errors import LoadError, UnsupportedError

_SMALL = 1024  # elements
_EXTERNAL = onnx.TensorProto.EXTERNAL
_TYPED = {  # where a tensor's elements are that are not raw, and how many elements each entry there holds
    "float_data": (onnx.TensorProto.FLOAT,),
    "double_data": (onnx.TensorProto.DOUBLE,),
    "int64_data": (onnx.TensorProto.INT64,),
    "uint64_data": (onnx.TensorProto.UINT32, onnx.TensorProto.UINT64),
    "string_data": (onnx.TensorProto.STRING,),
}


def read(source: str | os.PathLike[str] | bytes) -> onnx.ModelProto:
    """The model in a file or in bytes, with external data not read yet.

    LoadError where it is not valid ONNX, where a tensor has not the data that its shape asks for, and where external
    data lie outside the file's folder. UnsupportedError for sparse weights.
    """
    name = "the model" if isinstance(source, bytes) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise LoadError(f"{name}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf's own errors have no common base
        raise LoadError(f"{name}: not a readable ONNX file, truncated or corrupted; copy or export it again") from error
    if not model.HasField("graph") or not model.graph.output:
        raise LoadError(f"{name}: an ONNX file without a graph or outputs; copy or export it again")
    names = [output.name for output in model.graph.output]
    if len({*names}) < len(names):
        raise LoadError(f"{name}: two outputs have the same name; rename one, or export it again")
    for text in _texts(model):
        if isinstance(text, bytes):  # what protobuf gives where it is not UTF-8
            raise LoadError(f"{name}: holds a name or text that is not UTF-8 ({text[:40]!r}); copy or export it again")
    folder = None if isinstance(source, bytes) else Path(source).resolve().parent
    for graph in graphs(model.graph):
        if graph.sparse_initializer:
            raise UnsupportedError(f"{name}: has sparse weights, which are not supported; store them densely")
        for tensor in graph.initializer:
            _check_tensor(tensor, folder, name)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise UnsupportedError(f"{name}: {node.op_type} {node.name!r} holds a sparse tensor; store it densely")
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _check_tensor(tensor, folder, name)
    _forget_negative_sizes(model.graph)
    _check_model(model, name)
    _show_copies(model.graph)
    return model


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold weights of it."""
    tensors = (tensor for graph in graphs(read(path).graph) for tensor in graph.initializer)
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return [path.parent / name for name in dict.fromkeys(e.value for e in entries if e.key == "location")]


def _forget_negative_sizes(graph: onnx.GraphProto) -> None:
    """Sizes of -1, as some converters write what they do not know: ONNX leaves such a size out."""
    for part in graphs(graph):
        for value in (*part.input, *part.output, *part.value_info):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_value < 0:
                    size.ClearField("dim_value")


def _check_model(model: onnx.ModelProto, name: str) -> None:
    """onnx's own check, of everything but the weights' numbers; outputs without a shape are given what is inferred."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for graph in graphs(light.graph):
        for tensor in graph.initializer:
            kind, label = tensor.data_type, tensor.name
            tensor.Clear()
            tensor.data_type, tensor.name = kind, label
            tensor.dims.append(0)
    try:
        _name_output_shapes(model, light)
        onnx.checker.check_model(light)
    except Exception as error:  # ValidationError, and what else its C++ raises
        reason = " ".join(str(error).strip().split("\n")[0].split())
        raise LoadError(f"{name}: not a valid ONNX model ({reason[:300]})") from error


def _name_output_shapes(model: onnx.ModelProto, light: onnx.ModelProto) -> None:
    """ONNX Runtime takes outputs without a shape, onnx does not: note at least their ranks."""
    bare = [
        v for v in model.graph.output if v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")
    ]
    if not bare:
        return
    inferred = onnx.shape_inference.infer_shapes(_with_shapes(model, light))
    for value, found, checked in zip(model.graph.output, inferred.graph.output, light.graph.output, strict=True):
        if value in bare and found.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.CopyFrom(found.type.tensor_type.shape)
            checked.type.CopyFrom(value.type)


def _with_shapes(model: onnx.ModelProto, light: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose weights are inputs, but for the small ones, whose numbers shapes may depend on."""
    copy = onnx.ModelProto()
    copy.CopyFrom(light)
    del copy.graph.initializer[:]
    inputs = {v.name for v in copy.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != _EXTERNAL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return copy


def _show_copies(graph: onnx.GraphProto) -> None:
    """Weights that are outputs become copies of weights: the same model, and one that onnx_ir reads."""
    shown = {v.name for v in graph.output} & {w.name for w in graph.initializer}
    taken = {n for g in graphs(graph) for node in g.node for n in (*node.input, *node.output)}
    for name in sorted(shown):
        inner = next(n for k in range(len(taken) + 1) if (n := f"{name}:weight{k or ''}") not in taken)
        for part in graphs(graph):
            for node in part.node:
                node.input[:] = [inner if n == name else n for n in node.input]
        for item in (*graph.initializer, *graph.input):
            if item.name == name:
                item.name = inner
        graph.node.append(onnx.helper.make_node("Identity", [inner], [name]))


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        yield from _inner(node)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from graphs(graph)


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every field of text in a message and those inside it."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, (str, bytes)) else value
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _texts(part)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for graph in _inner(node):
                yield from graph.node


def _check_tensor(tensor: onnx.TensorProto, folder: Path | None, name: str) -> None:
    if any(size < 0 for size in tensor.dims):
        raise LoadError(f"{name}: the weight {tensor.name!r} has a negative size; the file is damaged")
    count = math.prod(tensor.dims)
    if tensor.data_location == _EXTERNAL:
        _check_external(tensor, folder, name)
        return
    if tensor.HasField("raw_data"):
        found, wanted = len(tensor.raw_data), -(-count * _bits(tensor, name) // 8)
    else:
        fields = [f for f, types in _TYPED.items() if tensor.data_type in types]
        if not fields:  # narrow types share int32_data, complex ones hold two numbers each: read later, or not at all
            return
        found, wanted = len(getattr(tensor, fields[0])), count
    if found != wanted:
        raise LoadError(f"{name}: the weight {tensor.name!r} of shape {list(tensor.dims)} is damaged or cut off")


def _bits(tensor: onnx.TensorProto, name: str) -> int:
    try:
        return int(8 * onnx_ir.DataType(tensor.data_type).itemsize)
    except (TypeError, ValueError):
        raise LoadError(f"{name}: the weight {tensor.name!r} has no type that can be stored so") from None


def _check_external(tensor: onnx.TensorProto, folder: Path | None, name: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise LoadError(f"{name}: its weights are in another file ({location!r}); give the path of the model")
    path = (folder / location).resolve()
    if not location or os.path.isabs(location) or not path.is_relative_to(folder):
        raise LoadError(f"{name}: its weights point outside its folder ({location!r}); refused")
    try:
        size = path.stat().st_size if path.is_file() else -1
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: the place of the weight {tensor.name!r} cannot be read ({error})") from error
    if size < 0:
        raise LoadError(f"{name}: its weights are in {location!r}, which is not there; keep the files together")
    bits = _bits(tensor, name) * math.prod(tensor.dims)
    if min(start, length) < 0 or start + max(length, -(-bits // 8)) > size:
        raise LoadError(f"{name}: {location!r} ends before the weight {tensor.name!r} does; copy it again")
