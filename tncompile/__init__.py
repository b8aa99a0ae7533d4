"""tncompile: a graph compiler for tensorized neural networks.

`compile` takes a PyTorch module and gives plain ONNX for ONNX Runtime, exact and never slower than the dense
model. Names are loaded on first use, so that importing the package is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "CompiledModel": "tncompile.compiler",
    "compile": "tncompile.compiler",
    "compile_exported": "tncompile.compiler",
    "compile_file": "tncompile.compiler",
    "save": "tncompile.compiler",
    "to_torch": "tncompile.training",
    "tensorize": "tncompile.tensorizer.tensorize",
    "Tensorized": "tncompile.tensorizer.tensorize",
    "LoadOptions": "tncompile.frontend.load",
    "parse_input": "tncompile.frontend.files.inputs",
    "Pipeline": "tncompile.passes",
    "TNCompileError": "tncompile.errors",
}

if TYPE_CHECKING:
    from tncompile.compiler import CompiledModel, compile, compile_exported, compile_file, save
    from tncompile.errors import TNCompileError
    from tncompile.frontend.files.inputs import parse_input
    from tncompile.frontend.load import LoadOptions
    from tncompile.passes import Pipeline
    from tncompile.tensorizer.tensorize import Tensorized, tensorize
    from tncompile.training import to_torch


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tncompile' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "CompiledModel",
    "LoadOptions",
    "Pipeline",
    "TNCompileError",
    "Tensorized",
    "__version__",
    "compile",
    "compile_exported",
    "compile_file",
    "parse_input",
    "save",
    "tensorize",
    "to_torch",
]
