"""Importing packages that ask for more than their models need."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class _Placeholder(types.ModuleType):
    """A module, function or decorator of a package that is not there; fit to be imported, not to be used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


def stand_in(*names: str) -> None:
    """Put placeholders for packages that another one imports for its audio files, downloads or GPU kernels."""
    missing = {
        n
        for n in names
        if n.partition(".")[0] not in sys.modules and importlib.util.find_spec(n.partition(".")[0]) is None
    }
    for name in missing:
        sys.modules[name] = _Placeholder(name)


def without_init(name: str) -> None:
    """Make a package's modules importable without running its ``__init__``. ModuleNotFoundError if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = types.ModuleType(name)
    package.__path__ = [str(Path(spec.origin).parent)]
    package.__spec__ = spec
    sys.modules[name] = package


_libraries: list[Any] = []  # a torch.library.Library lives as long as its operators


def torchvision() -> None:
    """Import torchvision also where its compiled operators do not fit the installed torch.

    The models here call none of them, but torchvision describes two that must then exist by name.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _libraries.append(library)
        importlib.import_module("torchvision")


def folder(package: Any) -> Path:
    """Where an imported package lies, for the weights it brings."""
    return Path(package.__file__).parent
