"""An ONNX model as a function of its inputs and its weights, that shows any of its values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx

from tncompile.errors import TNCompileError, first_line
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.onnx.prepare import whole
from tncompile.ir import Array
from tncompile.runtime.session import Session

_SESSIONS = 4


class OnnxGraph:
    """The prepared graph of an ONNX model in ONNX Runtime, with values as outputs and weights as inputs.

    Where weights are given, all floating ones can be, so that one session serves whatever is given next; ONNX Runtime
    then folds and packs none of them.
    """

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._public = dict(model.program.outputs)
        self._sessions: dict[tuple[tuple[str, ...], bool, bool], Session] = {}

    def ahead_of(self, weights: Collection[str], wanted: Sequence[str]) -> tuple[str, ...]:
        """None: it runs from its inputs."""
        return ()

    def run(
        self,
        feeds: Mapping[str, Array],
        weights: Mapping[str, Array],
        wanted: Sequence[str],
        outputs: bool,
        known: Mapping[str, Array],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Outputs by public name (none without `outputs`) and wanted values. TNCompileError where it cannot run."""
        assert not known
        arrays = self._model.program.arrays
        given = {}
        for name, array in weights.items():
            if name not in arrays:
                raise TNCompileError(f"the model has no weight {name}")
            given[name] = np.ascontiguousarray(array, arrays[name].dtype)
        session = self._session(tuple(wanted), bool(given), outputs)
        try:
            found = session.run({**{n: feeds[n] for n in session.inputs if n in feeds}, **given})
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise TNCompileError(f"the model cannot run on the calibration data: {first_line(error)[:300]}") from error
        return {n: found[n] for n in self._public if n in found and outputs}, {n: found[n] for n in wanted}

    def _session(self, wanted: tuple[str, ...], replaced: bool, outputs: bool) -> Session:
        key = (wanted, replaced, outputs)
        if key not in self._sessions:
            while len(self._sessions) >= _SESSIONS:
                self._sessions.pop(next(iter(self._sessions))).close()
            self._sessions[key] = Session(self._bytes(*key))
        return self._sessions[key]

    @cached_property
    def _proto(self) -> onnx.ModelProto:
        return whole(self._model.model)

    def _bytes(self, wanted: Sequence[str], replaced: bool, outputs: bool) -> bytes:
        model = onnx.ModelProto()
        model.CopyFrom(self._proto)
        graph, values = model.graph, self._model.program.values
        if not outputs:
            del graph.output[:]
        known = {value.name for value in graph.output}
        for name in wanted:
            if name not in values:
                raise TNCompileError(f"the model has no value {name}")
            if name not in known:
                dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(values[name].dtype))
                graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
        if replaced:
            self._open(graph)
        return bytes(model.SerializeToString(deterministic=True))

    def _open(self, graph: onnx.GraphProto) -> None:
        """Make all floating weights inputs, with what they are as default."""
        stored = {tensor.name for tensor in graph.initializer}
        made = {name: (node, k) for node in graph.node for k, name in enumerate(node.output)}
        for name, array in self._model.program.arrays.items():
            if array.dtype.kind != "f" or not array.ndim:
                continue
            if name in made:  # computed from other weights
                node, place = made[name]
                node.output[place] = f"{name}:computed"
                graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            elif name not in stored:
                continue
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, array.shape))
