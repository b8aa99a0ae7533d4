"""ONNX Runtime sessions on numpy arrays. The only file that imports onnxruntime."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tncompile.errors import LoadError
from tncompile.ir import Array


def available_providers() -> list[str]:
    """The execution providers of the installed ONNX Runtime, whose libraries may still be missing."""
    import onnxruntime as ort

    return list(ort.get_available_providers())


class Memory:
    """Float32 memory on a device (``cpu`` or ``cuda``), filled with `values`, that models read from and write to."""

    def __init__(self, values: Array, device: str = "cpu") -> None:
        import onnxruntime as ort

        self.device = device
        self.elements = int(values.size)
        self._value = ort.OrtValue.ortvalue_from_numpy(values, device, 0)

    def address(self, offset: int = 0) -> int:
        """Where the element `offset` lies."""
        return int(self._value.data_ptr()) + 4 * offset


class Session:
    """An ONNX model ready to run.

    `model` is a path or the bytes of a model. LoadError where ONNX Runtime does not accept it.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, providers: Sequence[str] = ("CPUExecutionProvider",)):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        source: Any = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=list(providers))
        except Exception as error:  # onnxruntime's own exceptions have no common base
            what = "the model" if isinstance(model, bytes) else str(Path(model))
            raise LoadError(f"{what}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error

    @property
    def providers(self) -> list[str]:
        """The execution providers in use."""
        return list(self._session.get_providers())

    @property
    def inputs(self) -> dict[str, tuple[str, list[Any]]]:
        """Element type and shape of each input, by name; a dynamic dimension is its name."""
        return {i.name: (i.type, i.shape) for i in self._session.get_inputs()}

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name."""
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))

    def bind(
        self, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], source: Memory, target: Memory
    ) -> Callable[[], None]:
        """A call without arguments, for timing: float32 inputs of these shapes lie in `source` one after another,
        and each output is written to the start of `target`."""
        import numpy as np

        binding = self._session.io_binding()
        offset = 0
        for value, shape in zip(self._session.get_inputs(), inputs, strict=True):
            binding.bind_input(value.name, source.device, 0, np.float32, list(shape), source.address(offset))
            offset += -(-math.prod(shape) // 16) * 16  # each begins a cache line
        for value, shape in zip(self._session.get_outputs(), outputs, strict=True):
            binding.bind_output(value.name, target.device, 0, np.float32, list(shape), target.address())
        run = self._session.run_with_iobinding

        def call() -> None:
            run(binding)

        return call
