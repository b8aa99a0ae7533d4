"""A traced graph as a function of its inputs and its weights, that shows any of its values."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind

from tncompile.cost.search import einsum_path
from tncompile.errors import TNCompileError, first_line
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Array

_aten = torch.ops.aten
_FUNCTIONS = 64
"""That are kept, as each is a copy of the graph."""

_Function = tuple[torch.fx.GraphModule, list[str]]
"""A function, and the names that its arguments have in the traced graph."""


class TorchGraph:
    """The functional graph of a traced model, as Python that fx writes: as fast as eager PyTorch.

    One function is made for each set of values that is asked for; it computes no more than those need.
    """

    def __init__(self, model: TracedModel) -> None:
        self._exported = model.exported
        self._public = [name for name, _ in model.program.outputs]
        self._nodes = {node.name: node for node in self._exported.graph.nodes}
        self._functions: dict[Any, _Function] = {}
        self._state: dict[str, torch.Tensor] = {}  # by placeholder
        self._holders: dict[str, list[str]] = {}  # placeholders by name of the weight
        storages: dict[Any, list[str]] = {}
        for spec in self._exported.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                continue
            store = self._exported.state_dict if spec.target in self._exported.state_dict else self._exported.constants
            tensor = store[spec.target].detach()
            self._state[spec.arg.name] = tensor
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else spec
            tied = storages.setdefault(key, [])
            tied.append(spec.arg.name)
            self._holders[str(spec.target)] = tied

    def ahead_of(self, weights: Collection[str], wanted: Sequence[str]) -> tuple[str, ...]:
        """Values from which all that depends on some weights can be computed; of the `wanted` ones those that do not
        depend on them. What depends on no input is computed anew, and so is what numpy has no array for."""
        changing = {self._nodes[holder] for name in weights for holder in self._placeholders(name)}
        fed = {node for name, node in self._nodes.items() if node.op == "placeholder" and name not in self._state}
        needed = [self._nodes[name] for name in wanted if name in self._nodes]
        for node in self._exported.graph.nodes:
            reads = node.all_input_nodes
            if not fed.isdisjoint(reads):
                fed.add(node)
            if not changing.isdisjoint(reads):
                changing.add(node)
            if node in changing or node.op == "output":
                needed += reads
        found: list[str] = []
        seen: set[torch.fx.Node] = set()
        while needed:
            node = needed.pop()
            if node in seen or node in changing or node not in fed or node.op == "placeholder":
                continue
            seen.add(node)
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and not value.is_complex() and value.dtype != torch.bfloat16:
                found.append(node.name)
            else:
                needed += node.all_input_nodes
        return tuple(sorted(found))

    def run(
        self,
        feeds: Mapping[str, Array],
        weights: Mapping[str, Array],
        wanted: Sequence[str],
        outputs: bool,
        known: Mapping[str, Array],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Outputs by public name (none without `outputs`) and wanted values, from the inputs and what is `known`.

        TNCompileError where it cannot run.
        """
        given = {name: _tensor(array) for name, array in known.items()}
        for name, array in weights.items():
            for holder in self._placeholders(name):
                given[holder] = _tensor(array).to(self._dtype(holder))
        function, names = self._function(tuple(wanted), frozenset(n for n in given if n not in self._state), outputs)
        given |= {name: _tensor(array) for name, array in feeds.items()}
        args = [given[name] if name in given else self._state.get(name) for name in names]
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shown, values = function(*args)
            except Exception as error:
                raise TNCompileError(f"the model cannot run on the calibration data: {first_line(error)}") from error
        named = zip(self._public, (x for x in shown if x is not None), strict=True) if outputs else ()
        return {n: _array(x) for n, x in named}, {n: _array(x) for n, x in zip(wanted, values, strict=True)}

    def _placeholders(self, weight: str) -> list[str]:
        """What holds a weight in the graph; see `Importer._add_constant` for the names."""
        names = (weight, weight.removesuffix(".weight"))
        for name in names:
            if name in self._holders:
                return self._holders[name]
        for name in names:
            if name in self._nodes:  # computed from others, which then do not matter
                return [name]
        raise TNCompileError(f"the model has no weight {weight}")

    def _dtype(self, holder: str) -> torch.dtype:
        dtype: torch.dtype = self._nodes[holder].meta["val"].dtype
        return dtype

    def _function(self, wanted: tuple[str, ...], computed: Collection[str], outputs: bool) -> _Function:
        key = (wanted, computed, outputs)
        found = self._functions.pop(key, None) or self._build(wanted, computed, outputs)
        while len(self._functions) >= _FUNCTIONS:
            self._functions.pop(next(iter(self._functions)))
        self._functions[key] = found  # the last one used is the last to go
        return found

    def _build(self, wanted: Sequence[str], computed: Collection[str], outputs: bool) -> _Function:
        graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, Any] = {}
        shown = graph.graph_copy(self._exported.graph, copies)
        missing = [name for name in wanted if name not in self._nodes]
        if missing:
            raise TNCompileError(f"the traced model has no value {missing[0]}")
        graph.output((shown if outputs else (), tuple(copies[self._nodes[name]] for name in wanted)))
        inputs = {copy: node.name for node, copy in copies.items() if node.op == "placeholder"}
        inputs |= {_input(graph, copies[self._nodes[name]]): name for name in computed}
        # nothing here has side effects; torch's own search for dead code keeps checks, and attention as random
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
            elif node.target is _aten.einsum.default and len(node.args[1]) > 2:
                node.target = _einsum
            elif node.target is _aten.view.default:  # other numbers may have other strides
                node.target = _aten.reshape.default
        names = [inputs[node] for node in graph.nodes if node.op == "placeholder"]
        return torch.fx.GraphModule(self._exported.graph_module, graph), names


def _input(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """Let a value come from outside: the new input in its place."""
    with graph.inserting_before(next(iter(graph.nodes))):
        new = graph.placeholder(f"given_{node.name}")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _einsum(equation: str, operands: Sequence[torch.Tensor], path: Any = None) -> torch.Tensor:
    """An einsum of many operands; from left to right, as torch has it, some networks need hundreds of gigabytes."""
    found = _path(equation, tuple(tuple(x.shape) for x in operands))
    result: torch.Tensor = _aten.einsum.default(equation, operands, path=found)
    return result


@functools.lru_cache(maxsize=256)
def _path(equation: str, shapes: tuple[tuple[int, ...], ...]) -> Any:
    return einsum_path(equation, shapes)


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, order="C"))  # np.ascontiguousarray makes one axis of none


def _array(tensor: Any) -> Array:
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    array: Array = real.detach().numpy()
    return array
