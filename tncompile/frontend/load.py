"""Open a model file: find out by its content what it is, and trace what is in it, without running code from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompile.errors import LoadError, TNCompileError
from tncompile.frontend.files.detect import detect
from tncompile.frontend.files.inputs import InputSpec

if TYPE_CHECKING:
    import torch

    from tncompile.frontend.model import LoadedModel
    from tncompile.frontend.onnx.importer import OnnxModel

SAVE = "tncompile.save(model.eval(), example_inputs, path)"


@dataclass(frozen=True)
class LoadOptions:
    """What a file may not say itself.

    `inputs` give shapes where it has none; `model` makes the module that weights go into
    (``"package.module:factory"``, or the function itself); `trust_pickle` lets pickles run their code.
    `fix_choices`: TorchScript that decides by the values of its inputs is taken as it does for random ones.
    """

    inputs: tuple[InputSpec, ...] = ()
    model: str | Callable[[], Any] | None = None
    trust_pickle: bool = False
    fix_choices: bool = False


def load(path: str | os.PathLike[str], options: LoadOptions | None = None) -> LoadedModel:
    """The model in a file of any kind that is taken, whatever its name.

    Raises LoadError, with the file's name and what to do, for anything else, and UnsupportedError where the module
    in it cannot be traced. No code from the file runs unless `options` trust it.
    """
    path, options = Path(path), options or LoadOptions()
    kind = detect(path)
    if kind == "directory":
        path = _in_folder(path)
        kind = detect(path)
    loader = _LOADERS.get(kind)
    if loader is None:
        raise LoadError(f"{path}: {_refusal(kind)}")
    if options.model is None and kind in _WEIGHTS:  # before they are read
        raise LoadError(f"{path}: {_NAMES[kind]}, {_NO_MODEL}")
    try:
        return loader(path, options)
    except TNCompileError as error:
        if str(error).startswith(str(path)) or (path.name in str(error) and str(path.parent) in str(error)):
            raise
        raise type(error)(f"{path}: {error}") from error


def files_of(path: Path) -> list[Path]:
    """The files that a model consists of, those that `path` names among them; some may be missing.

    LoadError where `path` itself cannot be read.
    """
    kind = detect(path)
    if kind == "directory":
        path = _in_folder(path)
        kind = detect(path)
    if kind == "index":
        from tncompile.frontend.files.index import shards

        return [path, *shards(path)]
    if kind == "ONNX":
        from tncompile.frontend.onnx.load import external_files

        return [path, *external_files(path)]
    return [path]


# ------------------------------------------------------------------------------- kinds of files


def _exported(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files.exported import check_inputs, load_exported

    _no_factory(options)
    program = load_exported(path)
    check_inputs(program, options.inputs)
    return program


def _pickle(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    import torch

    from tncompile.frontend.files.pickled import contents

    content = contents(path, options.trust_pickle)
    if isinstance(content, torch.nn.Module):
        return _own(content, options)
    if isinstance(content, Mapping):
        return _weights(path, content, options)
    raise LoadError(f"holds {type(content).__name__}, not a module; save the model: {SAVE}")


def _state_dict(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files.pickled import read

    return _weights(path, read(path), options)


def _weights(path: Path, content: Any, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files import weights

    return _filled(path, weights.tensors(content, path), options)


def _safetensors(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files import weights

    return _filled(path, weights.safetensors(path), options)


def _index(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files import weights

    return _filled(path, weights.sharded(path), options)


def _script(path: Path, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files.torchscript import load_script
    from tncompile.frontend.script.module import Scripted

    return _own(Scripted(load_script(path, options.trust_pickle)), options)


def _filled(path: Path, weights: Mapping[str, torch.Tensor], options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.files.factory import build
    from tncompile.frontend.files.weights import fill

    if options.model is None:
        raise LoadError(f"holds {_NO_MODEL}")
    module = build(options.model)
    fill(module, weights, path)
    return _traced(module, options)


def _own(module: torch.nn.Module, options: LoadOptions) -> torch.export.ExportedProgram:
    _no_factory(options)
    return _traced(module, options)


def _no_factory(options: LoadOptions) -> None:
    if options.model is not None:
        raise LoadError("holds a model, not only weights; leave out --model")


def _traced(module: torch.nn.Module, options: LoadOptions) -> torch.export.ExportedProgram:
    from tncompile.frontend.examples import trace_on_examples

    return trace_on_examples(module.eval(), options.inputs, options.fix_choices)


def _onnx(path: Path, options: LoadOptions) -> OnnxModel:
    from tncompile.frontend.onnx.importer import import_onnx

    _no_factory(options)
    if options.inputs:
        raise LoadError("an ONNX model has its own inputs; leave --input out")
    return import_onnx(path)


#: how each kind of file is loaded; all others are refused
_LOADERS: Mapping[str, Callable[[Path, LoadOptions], LoadedModel]] = {
    "exported program": _exported,
    "ONNX": _onnx,
    "TorchScript": _script,
    "pickle": _pickle,
    "plain pickle": _pickle,
    "state_dict": _state_dict,
    "safetensors": _safetensors,
    "index": _index,
}
_NO_MODEL = "weights without a model; add --model package.module:factory, the function or class that makes the module"
_WEIGHTS = ("state_dict", "safetensors", "index")
_NAMES = {
    "state_dict": "a state_dict",
    "safetensors": "a safetensors file",
    "index": "an index of files of weights",
}


def _in_folder(folder: Path) -> Path:
    """The one model in a folder: its index of shards, or its only file of weights."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise LoadError(f"{folder}: is a directory; give the model file itself")


def _refusal(kind: str) -> str:
    """What the file is, and what to do instead."""
    return {
        "empty": "the file is empty; save it again",
        "old exported program": "an exported program of an old version of torch; export it again with torch >= 2.9",
        "npz": f"numpy arrays, not a model; load them into the module, then {SAVE}",
        "HDF5": f"an HDF5 file, as Keras and others write; in PyTorch, {SAVE}",
    }.get(kind, f"not a model that tncompile can read; in PyTorch, {SAVE}")


__all__ = ["LoadOptions", "detect", "files_of", "load"]
