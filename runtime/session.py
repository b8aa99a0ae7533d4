"""ONNX Runtime sessions on numpy arrays. The only file that imports onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tncompile.errors import LoadError
from tncompile.ir import Array


class Session:
    """An ONNX model ready to run.

    `model` is a path or the bytes of a model. LoadError where ONNX Runtime does not accept it.
    `optimized_path`: where to write the model as it is run, with all that ONNX Runtime fused.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        optimized_path: Path | None = None,
    ):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        source: Any = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=list(providers))
        except Exception as error:  # onnxruntime's own exceptions have no common base
            what = "the model" if isinstance(model, bytes) else str(Path(model))
            raise LoadError(f"{what}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error

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
