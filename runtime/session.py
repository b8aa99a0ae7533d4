"""ONNX Runtime sessions on numpy arrays. `device` imports onnxruntime too, and `quantized_*` its quantizers."""

from __future__ import annotations

import functools
import math
import os
import re
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

    `model` is a path or the bytes of a model; `threads` the size of its thread pool, one a core where it is 0; without
    `optimize` it runs as it is written; `trace` is the beginning of the name of a file for ONNX Runtime's profile;
    `optimized_path` where to write the model as it is run, with all that ONNX Runtime fused. Without `prepack` weights
    are not copied into the order that its kernels like best, which is slower but takes no more memory than the file.
    LoadError where ONNX Runtime does not accept it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        *,
        threads: int = 0,
        optimize: bool = True,
        trace: str = "",
        optimized_path: Path | None = None,
        prepack: bool = True,
    ):
        import onnxruntime as ort

        self.lean = not prepack
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if trace:
            options.enable_profiling = True
            options.profile_file_prefix = trace
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        source: Any = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=list(providers))
            self._inputs = {i.name: (i.type, i.shape) for i in self._session.get_inputs()}  # of damaged files no text
            self._outputs = [o.name for o in self._session.get_outputs()]
        except Exception as error:  # onnxruntime's own exceptions have no common base
            what = "the model" if isinstance(model, bytes) else str(Path(model))
            if found := re.search(r"Could not find an implementation for (\w+)", str(error)):
                raise LoadError(
                    f"{what}: ONNX Runtime has no {found[1]} for this dtype on {providers[0]}; most often the model is "
                    "in float64: convert it with model.float()"
                ) from error
            raise LoadError(f"{what}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error

    @property
    def is_open(self) -> bool:
        """Whether it can run."""
        return self._session is not None

    @property
    def inputs(self) -> dict[str, tuple[str, list[Any]]]:
        """Element type and shape of each input, by name; a dynamic dimension is its name."""
        return self._inputs

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return self._outputs

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, first choice first; one that could not be started is not among them."""
        return list(self._session.get_providers())

    def feeds(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays by the model's own names for its inputs, by those of this session; by their order if these differ.

        An input that nothing reads may be missing from the session.
        """
        names = list(self.inputs)
        if arrays.keys() >= {*names}:
            return {name: arrays[name] for name in names}
        return dict(zip(names, arrays.values(), strict=True))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. What fails is raised, and not logged besides: who tries sizes expects it."""
        import onnxruntime as ort

        silent = ort.RunOptions()
        silent.log_severity_level = 4
        return dict(zip(self.outputs, self._session.run(None, dict(feeds), silent), strict=True))

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

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[], Any]:
        """A call on fixed inputs with nothing of ours around it, to be timed.

        On a GPU inputs and outputs stay there, and the call returns when it is done.
        """
        if self.providers[0] == "CPUExecutionProvider":
            return functools.partial(self._session.run, None, dict(feeds))
        import onnxruntime as ort

        device = self.providers[0].removesuffix("ExecutionProvider").lower()
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
        for name in self.outputs:
            binding.bind_output(name, device)
        return functools.partial(self._session.run_with_iobinding, binding)

    def close(self) -> None:
        """Give the model's memory back; the session cannot run any more."""
        self._session = None

    def end_trace(self) -> Path:
        """Stop profiling; the file that has the profile."""
        return Path(self._session.end_profiling())
