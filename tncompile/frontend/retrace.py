"""A dynamic batch for modules whose code turns sizes into plain numbers, which fixes the batch of a trace.

A library that asks for ``int(x.shape[0])`` leaves a graph in which the batch is a number like any other. Graphs of one
module at three batch sizes tell which numbers those are: where all else is equal, every number that differs is
``factor * batch + offset`` by two of the graphs, and the third must agree. One graph, with that in the place of its
numbers, is then traced anew with a dynamic batch, which shows whether every operation in it allows one.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from tncompile.errors import UnsupportedError

Exported = torch.export.ExportedProgram
Export = Callable[[torch.nn.Module, Any, Any, Any], Exported]

_SMALLEST, _OFFSETS = 4, (0, 1, 3)
"""The three traces have the example's batch size, or this one where it is smaller, and so many more: sizes of 0 and 1,
also of what is a little less than the batch, are special to torch."""


@dataclass(frozen=True)
class Linear:
    """The number ``factor * batch + offset``."""

    factor: int
    offset: int

    def at(self, batch: int) -> int:
        """Its value at a batch size."""
        return self.factor * batch + self.offset


class _Different(Exception):
    """Graphs that differ in more than the batch."""


def retraced(module: torch.nn.Module, args: Any, kwargs: Any, export: Export) -> Exported | None:
    """The module with a dynamic batch, from graphs of fixed ones; None where they do not tell how.

    Tensors have the batch in their first mode where that is as large as the first tensor's, two at least.
    `export` gets a module, its arguments and their dynamic shapes, or None to fix all.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    batch = next((int(x.shape[0]) for x in leaves if isinstance(x, torch.Tensor) and x.ndim), 1)
    has_batch = [isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == batch for x in leaves]
    if batch < 2:
        return None

    def at(size: int) -> Any:
        resized = [_repeated(x, size) if has else x for x, has in zip(leaves, has_batch, strict=True)]
        return pytree.tree_unflatten(resized, structure)

    sizes = [max(batch, _SMALLEST) + offset for offset in _OFFSETS]
    inputs = [at(size) for size in sizes]
    try:
        graphs = [_graph(export(module, sized, named, None)) for sized, named in inputs]
        _substitute(graphs, sizes, has_batch.index(True))
        graph, *_ = graphs
        graph.forward = partial(_replay, graph)
        graph.forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
        dynamic = [{0: torch.export.Dim.AUTO} if has else None for has in has_batch]
        shapes, by_name = pytree.tree_unflatten(dynamic, structure)
        bound = dict(inspect.signature(module.forward).bind(*shapes, **(by_name or {})).arguments)
        args, kwargs = inputs[0]
        result = export(graph, args, kwargs, bound)
    except (UnsupportedError, _Different):
        return None
    return result if result.range_constraints else None


def _repeated(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([x] * -(-size // x.shape[0]))[:size].clone()


def _graph(exported: Exported) -> GraphModule:
    """A traced graph on its inputs alone, without the checks of their shapes."""
    module = exported.module()
    assert isinstance(module, GraphModule)
    for node in [n for n in module.graph.nodes if n.op == "call_module" and not n.users]:
        module.graph.erase_node(node)
    return module


def _substitute(graphs: Sequence[GraphModule], sizes: Sequence[int], place: int) -> None:
    """Write the batch, as the first mode of the input at `place`, for the numbers that follow it in the first graph."""
    graph, *others = (list(g.graph.nodes) for g in graphs)
    if any(len(nodes) != len(graph) for nodes in others):
        raise _Different
    numbers = [_numbers(nodes, graphs, sizes) for nodes in zip(graph, *others, strict=True)]
    written = graphs[0].graph
    placeholders = [n for n in graph if n.op == "placeholder"]
    with written.inserting_before(next(n for n in graph if n.op not in ("placeholder", "get_attr"))):
        size = written.call_function(torch.ops.aten.sym_size.int, (placeholders[place], 0))
        values: dict[Linear, Node] = {}
        for number in (n for found in numbers for n in found.values()):
            if number not in values:
                scaled = written.call_function(operator.mul, (size, number.factor))
                values[number] = written.call_function(operator.add, (scaled, number.offset))
    for node, found in zip(graph, numbers, strict=True):
        leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
        if found:
            replaced = [values[found[k]] if k in found else leaf for k, leaf in enumerate(leaves)]
            node.args, node.kwargs = pytree.tree_unflatten(replaced, structure)
    graphs[0].recompile()


def _numbers(nodes: Sequence[Node], graphs: Sequence[GraphModule], sizes: Sequence[int]) -> dict[int, Linear]:
    """Which of a node's arguments follow the batch, by their place among the leaves. _Different where others do."""
    first, *others = nodes
    flat = [pytree.tree_flatten((n.args, n.kwargs)) for n in nodes]
    for node, (_, structure) in zip(others, flat[1:], strict=True):
        if (node.op, node.name, node.target) != (first.op, first.name, first.target) or structure != flat[0][1]:
            raise _Different
    if first.op == "get_attr" and not _same_attribute(str(first.target), graphs):
        raise _Different
    found: dict[int, Linear] = {}
    for place, values in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if all(isinstance(v, Node) for v in values):
            if len({v.name for v in values}) > 1:
                raise _Different
        elif len({type(v) for v in values}) > 1 or not all(_equal(v, values[0]) for v in values):
            found[place] = _linear(values, sizes)
    return found


def _linear(values: Sequence[Any], sizes: Sequence[int]) -> Linear:
    if not all(type(v) is int for v in values):
        raise _Different
    factor, rest = divmod(values[1] - values[0], sizes[1] - sizes[0])
    number = Linear(factor, values[0] - factor * sizes[0])
    if rest or any(number.at(size) != value for size, value in zip(sizes, values, strict=True)):
        raise _Different
    return number


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or a is b or (a != a and b != b)  # nan


def _same_attribute(name: str, graphs: Sequence[GraphModule]) -> bool:
    """Whether a weight or constant is the same in all graphs."""
    first, *others = (operator.attrgetter(name)(graph) for graph in graphs)
    if not isinstance(first, torch.Tensor):
        return all(other is first for other in others)
    return all(
        other is first
        or (other.shape == first.shape and other.dtype == first.dtype and bool(torch.equal(other, first)))
        for other in others
    )


def _replay(graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Run a graph node by node, so that a trace of it keeps lines and layers."""
    leaves = pytree.tree_leaves((args, kwargs))
    with torch.fx.traceback.preserve_node_meta():
        result = Interpreter(graph).run(*leaves, enable_io_processing=False)
    return graph.graph.process_outputs(result)


__all__ = ["retraced"]
