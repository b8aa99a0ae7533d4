"""A functional graph as healing sees it: values that vary with the inputs, in order, and weights that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from tncompile.errors import UnsupportedError
from tncompile.frontend.computable import functionalized

Values = Mapping[int, Any]
"""Values of one run by their place in `Flow.varying`: tensors, and sizes as plain numbers."""


class Flow:
    """An exported program, made functional. UnsupportedError where it writes to its state or its inputs.

    `varying` are the nodes that depend on what the user gives, the inputs first; all others are weights, or are made of
    weights alone. `tensors` has the weights by name, each once however many names it has.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.exported = functionalized(exported)
        _refuse_writes(self.exported)
        self.key_of, self.tensors, self.fixed = self._state()
        self.varying = self._varying()
        self.number = {node: number for number, node in enumerate(self.varying)}

    def _state(self) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, Any]]:
        """The weight that each placeholder is, the weights, and inputs that are no tensors."""
        keys = canonical(self.exported.state_dict)
        key_of, tensors, fixed = dict[str, str](), dict[str, torch.Tensor](), dict[str, Any]()
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    fixed[spec.arg.name] = spec.arg.value
                continue
            target = str(spec.target)
            value = self.exported.state_dict.get(target, self.exported.constants.get(target))
            if not isinstance(value, torch.Tensor):
                raise UnsupportedError(f"the model's constant {target} is no tensor: it cannot be trained")
            key = keys.get(target, target)
            key_of[spec.arg.name] = key
            tensors[key] = value.detach()
        return key_of, tensors, fixed

    def _varying(self) -> tuple[torch.fx.Node, ...]:
        inputs = [spec.arg.name for spec in self.exported.graph_signature.input_specs if _is_given(spec)]
        nodes = self.exported.graph_module.graph.nodes
        by_name = {node.name: node for node in nodes if node.op == "placeholder"}
        varying = {by_name[name]: None for name in inputs}
        for node in nodes:
            if node.op == "call_function" and any(source in varying for source in node.all_input_nodes):
                varying[node] = None
        return tuple(varying)

    @cached_property
    def inputs(self) -> tuple[torch.fx.Node, ...]:
        """What the user gives: tensors, in the order of the graph."""
        return tuple(node for node in self.varying if node.op == "placeholder")

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """Floating outputs that depend on the inputs, each once."""
        names = {spec.arg.name for spec in self._user_outputs}
        nodes = self.exported.graph_module.graph.output_node().all_input_nodes
        return tuple(self.number[n] for n in nodes if n.name in names and n in self.number and is_floating(n))

    @property
    def _user_outputs(self) -> list[Any]:
        specs = self.exported.graph_signature.output_specs
        return [s for s in specs if s.kind == OutputKind.USER_OUTPUT and not isinstance(s.arg, ConstantArgument)]

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Weights that are floating parameters."""
        names = {
            spec.arg.name for spec in self.exported.graph_signature.input_specs if spec.kind == InputKind.PARAMETER
        }
        keys = {self.key_of[name] for name in names}
        return frozenset(key for key in keys if self.tensors[key].is_floating_point())

    @cached_property
    def reads(self) -> tuple[frozenset[str], ...]:
        """The weights that each varying node reads itself, or through nodes that are made of weights alone."""
        through: dict[torch.fx.Node, frozenset[str]] = {}
        for node in self.exported.graph_module.graph.nodes:
            own = {self.key_of[node.name]} if node.name in self.key_of else set()
            sources = [through[s] for s in node.all_input_nodes if s in through and s not in self.number]
            through[node] = frozenset(own.union(*sources))
        return tuple(through[node] for node in self.varying)

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """The last varying node that reads each; its own number where none does."""
        last = [*range(len(self.varying))]
        for number, node in enumerate(self.varying):
            for source in node.all_input_nodes:
                if source in self.number:
                    last[self.number[source]] = number
        return tuple(last)

    @cached_property
    def moving(self) -> tuple[bool, ...]:
        """Which values are tensors that depend on a parameter too, as an attention mask does not."""
        found: list[bool] = []
        weights = self.parameters
        for number, node in enumerate(self.varying):
            sources = [found[self.number[s]] for s in node.all_input_nodes if s in self.number]
            found.append(bool(self.reads[number] & weights) or any(sources))
        return tuple(
            m and isinstance(n.meta.get("val"), torch.Tensor) for m, n in zip(found, self.varying, strict=True)
        )

    def live(self, place: int) -> tuple[int, ...]:
        """Values made before a place in the order that are read there or later."""
        return tuple(number for number in range(place) if self.last_use[number] >= place)

    def part(self, start: int, end: int, wanted: Sequence[int]) -> Part:
        """What computes the `wanted` values from those that are live at `start`, by the nodes up to `end`."""
        needed = self._needed(start, end, wanted)
        graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        takes = [n for n in needed if self.number.get(n, end) < start]
        keys = [n for n in needed if n.name in self.key_of]
        fixed = {n: self.fixed[n.name] for n in needed if n.name in self.fixed}
        for node in (*takes, *keys):
            copies[node] = graph.placeholder(node.name)
        for node in needed:
            if node not in copies and node not in fixed:
                copies[node] = graph.node_copy(node, lambda n: fixed[n] if n in fixed else copies[n])
        graph.output(tuple(copies[self.varying[number]] for number in wanted))
        return Part(
            torch.fx.GraphModule(self.exported.graph_module, graph),
            tuple(self.number[n] for n in takes),
            tuple(self.key_of[n.name] for n in keys),
            tuple(wanted),
        )

    def _needed(self, start: int, end: int, wanted: Sequence[int]) -> list[torch.fx.Node]:
        """The nodes from `start` on that wanted values need, those made of weights too, and what they begin from."""
        found = {self.varying[number] for number in wanted}
        stack = [*found]
        while stack:
            node = stack.pop()
            if self.number.get(node, end) < start:
                continue
            for source in node.all_input_nodes:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return [node for node in self.exported.graph_module.graph.nodes if node in found]


@dataclass(frozen=True)
class Part:
    """A stretch of a graph: values that it takes and gives by their numbers, weights by name."""

    module: torch.fx.GraphModule
    takes: tuple[int, ...]
    keys: tuple[str, ...]
    gives: tuple[int, ...]

    def __call__(self, values: Values, state: Mapping[str, torch.Tensor]) -> dict[int, Any]:
        """The values that it gives."""
        outputs = self.module(*[values[number] for number in self.takes], *[state[key] for key in self.keys])
        return dict(zip(self.gives, outputs, strict=True))


class Passage:
    """From all values that are live at one place of a graph to all that are at a later one, and to some others."""

    def __init__(self, flow: Flow, start: int, end: int, others: Sequence[int] = ()) -> None:
        wanted = {*flow.live(end), *others}
        self.carried = sorted(n for n in wanted if n < start)
        self.part = flow.part(start, end, sorted(wanted - {*self.carried}))

    def __call__(self, values: Values, state: Mapping[str, torch.Tensor]) -> dict[int, object]:
        """The values at the end."""
        return {**{number: values[number] for number in self.carried}, **self.part(values, state)}


def canonical(state: Mapping[str, Any]) -> dict[str, str]:
    """For each name of a tensor the first name of the same one: tied weights are one."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            found[name] = first.setdefault(same, name)
    return found


def is_floating(node: torch.fx.Node) -> bool:
    """Whether a node is a tensor of real floating numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_given(spec: Any) -> bool:
    return spec.kind == InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument)


def _refuse_writes(exported: torch.export.ExportedProgram) -> None:
    signature = exported.graph_signature
    written = [
        *signature.buffers_to_mutate.values(),
        *(getattr(signature, "user_inputs_to_mutate", None) or {}).values(),
    ]
    if written:
        raise UnsupportedError(
            f"the model writes to {', '.join(written)} when it runs, so it cannot be healed; "
            "export it in inference mode (model.eval()), with state as inputs and outputs"
        )
