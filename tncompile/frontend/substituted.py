"""Cores in the place of weights of an exported program."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from tncompile.errors import TNCompileError
from tncompile.frontend.computable import functionalized
from tncompile.frontend.factors import Factors
from tncompile.ir import Array

_aten = torch.ops.aten
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def substitute_exported(
    exported: torch.export.ExportedProgram, factors: Sequence[Factors]
) -> torch.export.ExportedProgram:
    """The program with one parameter for each core, in the dtype of the weight, which requires a gradient as that did.

    All names of a tied weight go together. A weight that the program computes from others is found in the functional
    graph, which then takes the place of the one that came in.
    """
    if any(_target(exported, one.weight) is None for one in factors):
        exported = functionalized(exported)
    edit = _Edit(exported)
    for one in factors:
        edit.replace(one)
    return edit.finished()


def _target(exported: torch.export.ExportedProgram, weight: str) -> str | None:
    """The model's own name of a weight, which the importer's may extend (see `Importer._add_constant`)."""
    targets = {spec.target for spec in exported.graph_signature.input_specs if spec.kind in _STATE}
    return next((n for n in (weight, weight.removesuffix(".weight")) if n in targets), None)


class _Edit:
    """One editing of a copy of the graph."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        self.module = copy.deepcopy(exported.graph_module)
        self.graph = self.module.graph
        for old, new in zip(exported.graph.nodes, self.graph.nodes, strict=True):
            new.name = old.name  # a copy renames what Python has a name for: input, max
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.specs = list(exported.graph_signature.input_specs)
        self.outputs = list(exported.graph_signature.output_specs)
        self.state = dict(exported.state_dict)
        self.constants = dict(exported.constants)
        self.cores: dict[str, torch.fx.Node] = {}
        values = [node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder"]
        self.fake = torch._guards.detect_fake_mode(values) or torch._subclasses.FakeTensorMode()

    def replace(self, factors: Factors) -> None:
        """Put cores in the place of one weight."""
        target = _target(self.exported, factors.weight)
        if target is None:
            self._replace_computed(factors)
            return
        written = self.exported.graph_signature.buffers_to_mutate.values()
        if target in written:
            raise TNCompileError(f"{target} cannot be replaced: the model writes to it")
        tensor = self._tensor(target)
        _check_shape(factors, tensor)
        tied = [s for s in self.specs if s.kind in _STATE and _same(self._tensor(str(s.target)), tensor)]
        old = [self.nodes[spec.arg.name] for spec in tied]
        before = self.specs.index(tied[0])
        cores = self._parameters(factors, old[0], before, tensor)
        new = self._rebuilt(factors, cores, old)
        for node in old:
            self._read_instead(node, new)
        for spec in tied:
            self._drop(spec)

    def _replace_computed(self, factors: Factors) -> None:
        """Put cores in the place of a weight that is computed, and drop what nothing reads any more."""
        old = self.nodes.get(factors.weight.removesuffix(".weight"))
        value = None if old is None else old.meta.get("val")
        if old is None or old.op != "call_function" or not isinstance(value, torch.Tensor):
            raise TNCompileError(f"the model has no weight {factors.weight}")
        _check_shape(factors, value)
        sources = _sources(old)
        state = {spec.arg.name: spec for spec in self.specs if spec.kind in _STATE}
        leaves = [n for n in sources if n.op == "placeholder"]
        if any(n.name not in state for n in leaves):
            raise TNCompileError(f"{factors.weight} is no weight: it depends on the input")
        trained = any(self._tensor(str(state[n.name].target)).requires_grad for n in leaves)
        like = torch.empty(0, dtype=value.dtype).requires_grad_(trained)
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        cores = self._parameters(factors, first, 0, like)
        self._read_instead(old, self._rebuilt(factors, cores, [old]))
        for node in sources:
            if not node.users and node.op == "placeholder":
                self._drop(state[node.name])
            elif not node.users:
                self.graph.erase_node(node)

    def _parameters(
        self, factors: Factors, before: torch.fx.Node, place: int, like: torch.Tensor
    ) -> list[torch.fx.Node]:
        """Placeholders for the cores, before another one; those that other weights share are there already."""
        for core in factors.cores:
            if core.name in self.cores:
                continue
            if core.name in self.state or core.name in self.constants:
                raise TNCompileError(f"the model has a parameter {core.name} already")
            parameter = _parameter(core.array, like)
            with self.graph.inserting_before(before):
                node = self.graph.placeholder(f"p_{core.name.replace('.', '_')}")
            node.meta = {"val": self.fake.from_tensor(parameter, static_shapes=True)}
            spec = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), core.name)
            self.specs.insert(place, spec)
            place += 1
            self.state[core.name] = parameter
            self.cores[core.name] = node
        return [self.cores[core.name] for core in factors.cores]

    def _rebuilt(self, factors: Factors, cores: Sequence[torch.fx.Node], old: Sequence[torch.fx.Node]) -> torch.fx.Node:
        """Nodes that compute the weight, before the first that reads it and as a part of that one's layer."""
        readers = {user for node in old for user in node.users}
        first = next((node for node in self.graph.nodes if node in readers), self.graph.output_node())
        meta = {key: first.meta[key] for key in _PROVENANCE if key in first.meta}
        rebuilding, stem = factors.rebuilding, old[0].name
        values: list[torch.fx.Node] = [*cores]

        def call(target: Any, *args: Any) -> torch.fx.Node:
            name = f"{stem}_{str(target).split('.')[1]}"
            with self.graph.inserting_before(first):
                node: torch.fx.Node = self.graph.create_node("call_function", target, args, name=name)
            fake = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
            with self.fake, torch.no_grad():
                node.meta = {**meta, "val": target(*fake)}
            return node

        for step in rebuilding.steps:
            values.append(call(_aten.einsum.default, step.equation, [values[k] for k in step.inputs]))
        result = values[-1]
        if rebuilding.shape is not None:
            result = call(_aten.reshape.default, result, list(rebuilding.shape))
        if rebuilding.order is not None:
            result = call(_aten.permute.default, result, list(rebuilding.order))
        return result

    def _read_instead(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        old.replace_all_uses_with(new)
        for place, spec in enumerate(self.outputs):
            if isinstance(spec.arg, TensorArgument) and spec.arg.name == old.name:
                self.outputs[place] = replace(spec, arg=TensorArgument(new.name))

    def _drop(self, spec: InputSpec) -> None:
        """Remove a parameter, buffer or constant that nothing reads."""
        self.graph.erase_node(self.nodes[spec.arg.name])
        self.specs.remove(spec)
        self.state.pop(str(spec.target), None)
        self.constants.pop(str(spec.target), None)

    def _tensor(self, target: str) -> torch.Tensor:
        tensor: torch.Tensor = self.state[target] if target in self.state else self.constants[target]
        return tensor

    def finished(self) -> torch.export.ExportedProgram:
        """The program with what has been replaced."""
        self.graph.lint()
        self.module.recompile()
        names = dict.fromkeys((*(str(spec.target) for spec in self.specs), *self.state))
        return torch.export.ExportedProgram(
            self.module,
            self.graph,
            ExportGraphSignature(self.specs, self.outputs),
            {name: self.state[name] for name in names if name in self.state},
            self.exported.range_constraints,
            self.exported.module_call_graph,
            self.exported.example_inputs,
            self.constants,
            verifiers=self.exported.verifiers,
        )


def _check_shape(factors: Factors, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != factors.shape or not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise TNCompileError(
            f"{factors.weight} is {kind}{list(tensor.shape)}, and its cores make {list(factors.shape)}"
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights are one, as the importer decides it."""
    if a is b:
        return True
    alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return alike and a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _parameter(array: Array, like: torch.Tensor) -> torch.nn.Parameter:
    tensor = torch.tensor(array, dtype=like.dtype, device=like.device)
    return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)


def _sources(node: torch.fx.Node) -> list[torch.fx.Node]:
    """A node and all that it is computed from, what reads before what is read."""
    todo, found = [node], {node}
    while todo:
        new = [source for source in todo.pop().all_input_nodes if source not in found]
        found.update(new)
        todo += new
    return [n for n in reversed(node.graph.nodes) if n in found]
