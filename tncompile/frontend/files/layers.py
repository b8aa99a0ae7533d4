"""Layers out of a pickle, without running it: which of torch's may come, and what may be in them.

The unpickler makes inert records only (`Record`). A record becomes a layer here, after all that it holds was looked
at: numbers, names, tensors, further layers, and activation functions of torch. So no attribute can take the place
of a method, and no hook comes along.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from tncompile.errors import LoadError
from tncompile.frontend.files.legacy import CLASS_OF, class_of

#: the modules of torch.nn whose layers compute with their parameters and nothing else
_MODULES = "activation batchnorm channelshuffle container conv distance dropout flatten fold instancenorm linear "
_MODULES += "normalization padding pixelshuffle pooling rnn sparse transformer upsampling"
_FUNCTIONS = "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign "
_FUNCTIONS += "logsigmoid tanh sigmoid softmax log_softmax tanhshrink"
_HOOKS = "hook"  # in the name of each of a module's dictionaries of hooks


class Record:
    """What a pickle says of one layer. `path` is the class that it names; `state` the layer's attributes."""

    path: ClassVar[str]
    state: Any

    def __init__(self, *_: Any) -> None:
        raise LoadError(f"the pickle calls {self.path} in place of restoring it")

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Function:
    """A function of torch that a pickle names; it cannot be called."""

    def __init__(self, path: str) -> None:
        self.path = path


def _layers() -> Iterator[tuple[str, type[torch.nn.Module]]]:
    for name in _MODULES.split():
        module = importlib.import_module(f"torch.nn.modules.{name}")
        for cls in vars(module).values():
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and issubclass(cls, torch.nn.Module) and not issubclass(cls, LazyModuleMixin):
                yield f"{cls.__module__}.{cls.__qualname__}", cls


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module, prefix in (
        (torch.nn.functional, "torch.nn.functional"),
        (torch, "torch"),
        (torch._C._nn, "torch._C._nn"),
    ):
        for name in _FUNCTIONS.split():
            if hasattr(module, name):
                yield f"{prefix}.{name}", getattr(module, name)


LAYERS: Mapping[str, type[torch.nn.Module]] = dict(_layers())
FUNCTIONS: Mapping[str, Callable[..., Any]] = dict(_functions())


def allowed() -> list[Any]:
    """For `torch.serialization.safe_globals`: a record in the place of each layer, a name for each function."""
    records = [(type(path.rpartition(".")[2], (Record,), {"path": path}), path) for path in LAYERS]
    return [*records, (class_of, f"torch.{CLASS_OF}"), *((Function(path), path) for path in FUNCTIONS)]


class Rebuild:
    """Records -> layers. One record, or one tensor, met twice becomes one layer, or one parameter."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def layer(self, record: Record, path: str = "") -> torch.nn.Module:
        """The layer of a record; `path` is its place in the model. LoadError for anything that is not plain."""
        if id(record) in self.done:
            return self.done[id(record)]  # type: ignore[no-any-return]
        if id(record) in self.open:
            raise _refused(path, "it contains itself")
        self.open.add(id(record))
        cls = LAYERS[record.path]
        state = getattr(record, "state", None)
        if not isinstance(state, dict):
            raise _refused(path, "it has no attributes")
        layer = cls.__new__(cls)
        attributes = {key: self._attribute(cls, key, value, path) for key, value in state.items()}
        layer.__setstate__(attributes)  # type: ignore[no-untyped-call]
        self.done[id(record)] = layer
        return layer

    def _attribute(self, cls: type, key: Any, value: Any, path: str) -> Any:
        place = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key.startswith("__"):
            raise _refused(place, "no layer has such an attribute")
        if _HOOKS in key:
            if value:
                raise _refused(place, "hooks are code")
            return value if value is None else type(value)()
        if key in ("_parameters", "_buffers", "_modules"):
            return {name: self._part(key, name, part, path) for name, part in _items(value, place)}
        own = getattr(cls, key, None)
        if callable(own) or hasattr(own, "__get__"):
            raise _refused(place, f"it would take the place of a method of {cls.__name__}")
        return self._plain(value, place)

    def _part(self, kind: str, name: Any, value: Any, path: str) -> Any:
        place = f"{path}.{name}" if path else str(name)
        if not isinstance(name, str) or not name or "." in name or name.startswith("__"):
            raise _refused(place, "no part of a layer has such a name")
        if value is None:
            return None
        if kind == "_modules" and isinstance(value, Record):
            return self.layer(value, place)
        if kind != "_modules" and isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        raise _refused(place, f"it is {_what(value)}")

    def _tensor(self, value: torch.Tensor, place: str) -> torch.Tensor:
        """A tensor without the attributes and hooks that a pickle may have hung on it."""
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise _refused(place, f"it is {_what(value)}")
        if id(value) not in self.done:
            clean = torch.Tensor.detach(value)
            if type(value) is torch.nn.Parameter:
                clean = torch.nn.Parameter(clean, requires_grad=clean.is_floating_point())
            self.done[id(value)] = clean
        return self.done[id(value)]  # type: ignore[no-any-return]

    def _plain(self, value: Any, place: str) -> Any:
        if type(value) in (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device):
            return value
        if type(value) in (list, tuple, set):
            return type(value)(self._plain(item, place) for item in value)
        if isinstance(value, dict):
            return {self._plain(k, place): self._plain(v, place) for k, v in value.items()}
        if isinstance(value, Function):
            return FUNCTIONS[value.path]
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        raise _refused(place, f"it is {_what(value)}")


def _items(value: Any, place: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise _refused(place, f"it is {_what(value)}")
    yield from value.items()


def _what(value: Any) -> str:
    return value.path if isinstance(value, (Record, Function)) else f"of type {type(value).__name__}"


def _refused(place: str, why: str) -> LoadError:
    return LoadError(f"the pickle holds {place or 'the model itself'}, which is no plain part of torch's layers: {why}")
