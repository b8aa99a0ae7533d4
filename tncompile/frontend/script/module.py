"""A TorchScript module as an ordinary one, for torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tncompile.errors import UnsupportedError
from tncompile.frontend.script.run import Answers, Graph, Path, Runner


class Scripted(torch.nn.Module):
    """`forward` of a TorchScript module, with parameters and buffers under their names.

    A call starts from the state that the module was saved in, and what it writes to attributes ends with it.
    `arguments` has what each argument but the module itself is called, its type as TorchScript writes it, and its
    default (`inspect.Parameter.empty` where it has none).
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.__dict__["script"] = script  # no submodule: its tensors are registered below
        self.graph = Graph(script.forward)
        self.answers = Answers()
        self.fixed: Mapping[str, Any] = {}
        self.written: set[str] = set()
        schema = next(s for s in [script._c._get_method("forward").schema])
        self.arguments = {
            a.name: (str(a.type), a.default_value if a.has_default_value() else inspect.Parameter.empty)
            for a in schema.arguments[1:]
        }
        for path, parameter in script.named_parameters():
            _register(self, path, parameter)
        for path, buffer in script.named_buffers():
            _register(self, path, buffer)

    def forward(self, *inputs: Any) -> Any:
        """Outputs for the arguments that are not fixed, in their order."""
        self.answers.next = 0
        copies: dict[str, torch.Tensor] = {}

        def attribute(path: str) -> Any:
            value = self._attribute(path)
            if path in self.written:  # the call writes to it in place: to a copy
                value = copies.setdefault(path, value.clone())
            return value

        return Runner(self.graph, attribute, self.answers).call(self._all(inputs))

    def record(self, inputs: Sequence[torch.Tensor]) -> list[str]:
        """Run once with real numbers; which choices of the model hung on the values of the inputs.

        Tracing then takes the same ways. UnsupportedError where the module cannot run.
        """
        self.answers = Answers(tainted={id(t): t for t in inputs})
        seen: dict[str, tuple[torch.Tensor, int]] = {}

        def attribute(path: str) -> Any:
            value = self._attribute(path)
            if isinstance(value, torch.Tensor):
                value = value.detach().clone()
                seen[path] = value, value._version
            return value

        try:
            with torch.no_grad():
                Runner(self.graph, attribute, self.answers).call(self._all(inputs))
        except UnsupportedError:
            raise
        except Exception as error:  # whatever torch's operators raise for inputs that do not fit
            reason = str(error).strip().splitlines()
            raise UnsupportedError(
                f"the model does not run on inputs of these shapes: {reason[0] if reason else type(error).__name__}"
            ) from error
        self.written = {path for path, (value, version) in seen.items() if value._version != version}
        self.answers.recording = False
        self.answers.tainted = {}
        return list(dict.fromkeys(self.answers.inputs))

    def _all(self, inputs: Sequence[Any]) -> list[Any]:
        """Every argument: the fixed ones, those given, defaults for the rest."""
        given = iter(inputs)
        return [
            self.fixed[name] if name in self.fixed else next(given, default)
            for name, (_, default) in self.arguments.items()
        ]

    def _attribute(self, path: str) -> Any:
        own: Any = self
        for part in path.split("."):
            own = getattr(own, part, None)
        if isinstance(own, torch.Tensor):
            return own
        value: Any = self.__dict__["script"]
        for part in path.split("."):
            value = getattr(value, part)
        return Path(path) if isinstance(value, torch.jit.ScriptModule) else value


def _register(root: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, torch.nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
