"""What an ONNX model should compute: its own graph in float64, by onnx's reference and not by our IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from tncompile.errors import CheckError, LoadError, SourceRef
from tncompile.frontend.onnx.importer import OnnxModel, layer_of
from tncompile.ir import Array
from tncompile.runtime.accuracy import relative_error, scales
from tncompile.runtime.evaluator import evaluator
from tncompile.runtime.session import Session

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_NAMING = {"to", "dtype", "output_datatype"}
"""Attributes that name an element type."""

_RANDOM = ("Random", "Multinomial", "Bernoulli")

PLAUSIBLE = {"float16": 3e-2, "float32": 2e-3, "float64": 1e-8}
"""Relative error of ONNX Runtime against the evaluator, by the outputs' dtype, above which that is not trusted."""


class OnnxReference:
    """The original file, run in float64 and as it is.

    Where onnx's evaluator lacks an operator, or differs from ONNX Runtime by more than rounding does, the reference
    is ONNX Runtime without optimizations; `note` says so.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.note = ""

    @property
    def baseline(self) -> str:
        """Whose error the compiled model's is compared with."""
        return "the original file's" if not self.note else "its rounding noise"

    @property
    def slack(self) -> float:
        """How many times the least tolerance an error may be: more where the reference is no float64."""
        return 10.0 if self.note else 1.0

    def run(self, feeds: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
        """The outputs in float64 and those of the original file. CheckError where that cannot run."""
        if self._slow and not self.note:
            wide, plain = self._evaluated(feeds), self._evaluated(feeds, wide=False)
            if wide is not None and plain is not None:
                return wide, plain
        plain = self._original(feeds)
        if not self.note:
            wide = self._evaluated(feeds)
            if wide is not None and self._close(plain, wide):
                return wide, plain
            self.note = self.note or "onnx's evaluator and ONNX Runtime differ on the original"
            self.note = f"{self.note}; checked against ONNX Runtime without optimizations, not in float64"
        # how far two ways of running the original are apart says how much rounding there is
        return [np.asarray(a) for a in plain], [*self._optimized.run(self._optimized.feeds(feeds)).values()]

    def runs_on(self, feeds: Mapping[str, Array]) -> bool:
        """Whether the original file takes these inputs, as far as that is known before its einsums are put in order."""
        if self._slow:
            return True
        try:
            self._original(feeds)
        except CheckError:
            return False
        return True

    def draws(self) -> tuple[str, SourceRef]:
        """The first operator that draws random numbers, and the layer that it is in; empty where there is none."""
        for node in self.model.model.graph.all_nodes():
            if node.op_type.startswith(_RANDOM):
                return node.op_type, SourceRef(layer_of(node))
        return "", SourceRef()

    @cached_property
    def _plain(self) -> Session:
        return Session(self.model.original, optimize=False)

    @cached_property
    def _optimized(self) -> Session:
        return Session(self.model.original)

    def _original(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return [*self._plain.run(self._plain.feeds(feeds)).values()]
        except LoadError as error:
            raise CheckError(f"the original file cannot be run: {error}") from error
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise CheckError(
                f"the original file itself cannot run on these inputs: {str(error).splitlines()[0][:300]}; "
                "give some that it can with --example inputs.npz"
            ) from error

    def _close(self, plain: Sequence[Array], wide: Sequence[Array]) -> bool:
        least = scales(self.model.program)
        return len(plain) == len(wide) and all(
            a.shape == b.shape and relative_error(a, b, scale) <= PLAUSIBLE.get(str(a.dtype), 0.0)
            for a, b, scale in zip(plain, wide, least, strict=True)
        )

    @cached_property
    def _slow(self) -> bool:
        """Whether ONNX Runtime may need hours: it contracts an einsum of several operands from left to right."""
        nodes = self.model.model.graph.all_nodes()
        return any(node.op_type == "Einsum" and len(node.inputs) > 2 for node in nodes)

    @cached_property
    def _evaluator(self) -> Any:
        return evaluator(widened(onnx.load_model_from_string(self.model.original)))

    @cached_property
    def _narrow(self) -> Any:
        return evaluator(onnx.load_model_from_string(self.model.original))

    def _evaluated(self, feeds: Mapping[str, Array], wide: bool = True) -> list[Array] | None:
        given = {name: _wide(array) for name, array in feeds.items()} if wide else dict(feeds)
        try:
            with np.errstate(all="ignore"):
                outputs = (self._evaluator if wide else self._narrow).run(None, given)
            return [np.asarray(output) for output in outputs]
        except Exception as error:  # an operator that it lacks, or has not in full
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.note = f"onnx's evaluator cannot run the original ({reason[:120]})"
            return None


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


# ------------------------------------------------------------------------------------ widening


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose floating tensors, and every floating type that a node names, are float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _widen_graph(copy.graph)
    for function in copy.functions:
        del function.value_info[:]
        for node in function.node:
            _widen_node(node)
    return copy


def _widen_graph(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        _widen_type(value.type)
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        for tensor in attribute.tensors:
            _widen_tensor(tensor)
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _widen_graph(graph)
        if attribute.name in _NAMING and attribute.type == onnx.AttributeProto.INT and attribute.i in _FLOATS:
            attribute.i = onnx.TensorProto.DOUBLE
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float64))
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    if node.op_type == "ConstantOfShape" and not node.attribute:  # float32 by default
        node.attribute.append(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.zeros(1))))


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in _FLOATS:
        kind.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type)
