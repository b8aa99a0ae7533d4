"""torch.export graph -> Program in which all state of the model is an input: what is trained, and what it writes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from tncompile.errors import UnsupportedError
from tncompile.frontend.computable import functionalized
from tncompile.frontend.importer import Importer
from tncompile.frontend.sizes import named_sizes
from tncompile.ir import Program
from tncompile.ir.opaque import Ref, Value

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True)
class TrainedModel:
    """A model as it is trained.

    `program` has the inputs and outputs of the functional graph `exported`: parameters and buffers come in beside what
    the user gives, and what the model writes to a buffer goes out beside what it returns. `state` and `written` map the
    names of those inputs and outputs to the model's own (``"fc.factors.0"``); `arguments` names the tensors that the
    user gives, in the order of the leaves of ``(args, kwargs)``, None for what is no tensor. `returned` has for each
    leaf of what the model returns the name of an output, or a constant.
    """

    exported: torch.export.ExportedProgram
    program: Program
    sizes: Mapping[str, int]
    state: Mapping[str, str]
    written: Mapping[str, str]
    arguments: tuple[str | None, ...]
    returned: tuple[Ref | bool | int | float | str | None, ...]


def import_for_training(exported: torch.export.ExportedProgram) -> TrainedModel:
    """Import an exported program with its state as inputs. UnsupportedError where that cannot be done."""
    return _StateImporter(functionalized(exported), named_sizes(exported)).imported()


class _StateImporter(Importer):
    """An import in which nothing that depends on parameters or buffers is constant."""

    def __init__(self, exported: torch.export.ExportedProgram, named: Mapping[str, str]) -> None:
        super().__init__(exported, named)
        self.state: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self.arguments: list[str | None] = []
        self.returned: list[Ref | bool | int | float | str | None] = []

    def imported(self) -> TrainedModel:
        """The model. UnsupportedError where it writes to an input."""
        traced = self.run()
        return TrainedModel(
            self.exported,
            traced.program,
            traced.sizes,
            self.state,
            self.written,
            tuple(self.arguments),
            tuple(self.returned),
        )

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> None:
        if spec.kind in _STATE:
            value = node.meta["val"]
            self.state[node.name] = str(spec.target)
            self.inputs.append(Value(node.name, self._dtype(value, str(spec.target)), self._shape(value)))
            return
        super()._placeholder(node, spec)
        if spec.kind == InputKind.USER_INPUT:
            known = self.inputs and self.inputs[-1].name == node.name
            self.arguments.append(node.name if known else None)

    def _outputs(self) -> tuple[tuple[str, str], ...]:
        outputs: dict[str, str] = {}
        for spec in self.exported.graph_signature.output_specs:
            if isinstance(spec.arg, ConstantArgument):
                self.returned.append(spec.arg.value)
                continue
            if not isinstance(spec.arg, TensorArgument):
                raise UnsupportedError("an output of the model is no tensor")
            name = self._shown(spec.arg.name)
            outputs[name] = name
            if spec.kind == OutputKind.USER_OUTPUT:
                self.returned.append(Ref(name))
            elif spec.kind == OutputKind.BUFFER_MUTATION:
                self.written[name] = str(spec.target)
            else:
                raise UnsupportedError(f"the model writes to its input {spec.target}; let it return what it computes")
        return tuple(outputs.items())

    def _shown(self, name: str) -> str:
        """The value of a name in the graph, which may be a constant of the model."""
        if name in self.weight_of and name not in self.shown:
            self.nodes.append(self._constant_output(name))
            self.shown[name] = self.nodes[-1].value.name
        return self.shown.get(name, name)
