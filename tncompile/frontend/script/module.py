"""A TorchScript module as an ordinary one, for torch.export."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tncompile.errors import UnsupportedError, first_line
from tncompile.frontend.names import under_names
from tncompile.frontend.script.choices import Choice, Choices, acts
from tncompile.frontend.script.run import Answers, Graph, Path, Runner


class Scripted(torch.nn.Module):
    """`forward` of a TorchScript module, with parameters and buffers under their names.

    A call starts from the state that the module was saved in, and what it writes to attributes ends with it.
    `signature` has the arguments under their names; `types` what TorchScript says of each.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.__dict__["script"] = script  # no submodule: its tensors are registered below
        self.graph = Graph(script.forward)
        self.answers = Answers()
        self.written: set[str] = set()
        self.run_by_torch = False
        arguments = script._c._get_method("forward").schema.arguments[1:]
        self.types = {a.name: str(a.type) for a in arguments}
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        self.signature = inspect.Signature(
            [
                inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
                for a in arguments
            ]
        )
        self.forward = under_names(self._run, self.signature, [*self.types])
        for path, parameter in script.named_parameters():
            _register(self, path, parameter)
        for path, buffer in script.named_buffers():
            _register(self, path, buffer)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if self.run_by_torch:
            return self._saved()(*bound.args)
        self.answers.next = 0
        copies: dict[str, Any] = {}

        def attribute(path: str) -> Any:
            """What was saved; a copy of a tensor that the call writes to in place, or may for all that is known."""
            value = self._attribute(path)
            if isinstance(value, torch.Tensor) and (self.answers.recording or path in self.written):
                value = copies[path] = value.detach().clone()
            return value

        result = Runner(self.graph, attribute, self.answers).call(bound.arguments.values())
        if self.answers.recording:  # a fresh copy has been written to 0 times
            self.written = {path for path, value in copies.items() if value._version != 0}
        return result

    def record(self, inputs: Mapping[str, Any]) -> tuple[Choice, ...]:
        """Run once with real numbers; what the model chose by the values of the inputs.

        Tracing then takes the same ways. UnsupportedError where the module cannot run.
        """
        self.answers = self._answers(inputs)
        self.answers.recording = False
        found = self.answers.choices.made
        self.answers.choices = Choices()  # whose tensors would be kept
        return tuple(dict.fromkeys(found))

    def decides_alike(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model runs on these inputs, and reads the same numbers out of them as were recorded."""
        recorded = self.answers
        try:
            return _same(self._answers(inputs).given, recorded.given)
        except UnsupportedError:
            return False
        finally:
            self.answers = recorded

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """Within it, calls are run by torch's own interpreter, each from the state that was saved."""
        self.run_by_torch = True
        try:
            with torch.jit.optimized_execution(False), torch.no_grad():  # type: ignore[attr-defined]
                yield
        finally:
            self.run_by_torch = False

    def _answers(self, inputs: Mapping[str, Any]) -> Answers:
        answers = self.answers = Answers(Choices.by(inputs.values()))
        try:
            with torch.no_grad():
                self(**inputs)
        except UnsupportedError:
            raise
        except Exception as error:  # whatever torch's operators raise for inputs that do not fit
            raise UnsupportedError(f"the model does not run on inputs of these shapes: {first_line(error)}") from error
        return answers

    def _saved(self) -> torch.jit.ScriptModule:
        script: torch.jit.ScriptModule = self.__dict__["script"]
        return copy.deepcopy(script) if acts(self.graph.graph) else script

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


def _same(a: Any, b: Any) -> bool:
    """Whether two answers are equal; nan is itself."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b or (a != a and b != b))
