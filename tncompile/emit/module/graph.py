"""A program -> a torch.fx graph module whose networks are contractions and whose state comes in as arguments."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tncompile.emit.module.contraction import Contraction
from tncompile.emit.module.plan import plan_of, sizes_of
from tncompile.emit.operators import fx_arg, operator_of
from tncompile.errors import UnsupportedError
from tncompile.frontend.training import TrainedModel
from tncompile.ir import Array, Network, Opaque, Program, Ref, Switch, dims, text
from tncompile.ir.core import networks_of
from tncompile.passes import Context
from tncompile.passes.training import planned_sizes, trained_values

_REPLACED = {"aten.view.default": "aten.reshape.default"}  # our values may lie otherwise than those traced
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Emitted:
    """A graph module, and what its arguments are: names of the program's inputs, then the constants."""

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    constants: tuple[Array, ...]


def emit(model: TrainedModel, program: Program, context: Context, trained: Collection[str], share: float) -> Emitted:
    """The graph of an ordered program; it returns a tuple of the leaves of what the model returns.

    What the model writes to buffers is written to those that are given. `trained` names the inputs that need a
    gradient; `share` is as in `plan_of`.
    """
    return _Emitter(model, program, context, trained_values(program, trained), share).run()


class _Emitter:
    def __init__(
        self, model: TrainedModel, program: Program, context: Context, trained: Collection[str], share: float
    ) -> None:
        self.model = model
        self.program = program
        self.context = context
        self.trained = trained
        self.share = share
        self.graph = torch.fx.Graph()
        self.env: dict[str, torch.fx.Node] = {}
        self.modules = torch.nn.Module()
        self.symbols: dict[str, torch.fx.Node] = {}
        self.buffers: dict[str, torch.fx.Node] = {}  # those that are written to, by the model's name

    def run(self) -> Emitted:
        program = self.program
        for value in program.inputs:
            self.env[value.name] = self.graph.placeholder(value.name)
        arrays = program.arrays
        for number, name in enumerate(arrays):
            self.env[name] = self.graph.placeholder(f"constant_{number}")
        names = {key: name for name, key in self.model.state.items()}
        for key in self.model.written.values():
            name = names[key]
            self.buffers[key] = self.env[name]
            # autograd may want what was read after it is written to
            self.env[name] = self.graph.call_function(torch.ops.aten.clone.default, (self.env[name],))
        for number, node in enumerate(program.nodes):
            self.env[node.value.name] = (
                self._opaque(node) if isinstance(node, Opaque) else self._contraction(node, number)
            )
        self._write()
        self.graph.output(tuple(self.env[r.name] if isinstance(r, Ref) else r for r in self.model.returned))
        module = torch.fx.GraphModule(self.modules, self.graph, "Contractions")
        return Emitted(module, tuple(v.name for v in program.inputs), tuple(arrays.values()))

    def _opaque(self, node: Opaque) -> torch.fx.Node:
        target = operator_of(_REPLACED.get(node.target, node.target))
        args = tuple(fx_arg(a, self.env) for a in node.args)
        return self.graph.call_function(target, args, {k: fx_arg(v, self.env) for k, v in node.kwargs})

    def _contraction(self, node: Network | Switch, number: int) -> torch.fx.Node:
        cases = networks_of(node)
        sizes = sizes_of(cases[0])
        plans = [
            plan_of(case, at, self.trained, self.context.profile, self.share)
            for case, at in zip(cases, planned_sizes(node, self.context), strict=True)
        ]
        limits = node.limits if isinstance(node, Switch) else ()
        layer = "_".join(filter(str.isidentifier, (node.name or node.value.name).replace("+", ".").split(".")))
        name = f"network_{number}" + f"_{layer}" * bool(layer)
        self.modules.add_module(name, Contraction(text.dump_node(node), sizes, plans, limits))
        given = [self._size(index.size, node) for index in sizes.given]
        if isinstance(node, Switch):
            given.append(self._size(node.symbol, node))
        return self.graph.call_module(name, ([self.env[t.name] for t in cases[0].tensors], given))

    def _size(self, size: dims.Dim, node: Network | Switch) -> Any:
        """A run-time size, computed from the shapes of the program's inputs."""
        if isinstance(size, int):
            return size

        def visit(part: ast.expr) -> Any:
            if isinstance(part, ast.BinOp) and type(part.op) in _ARITHMETIC:
                return self.graph.call_function(_ARITHMETIC[type(part.op)], (visit(part.left), visit(part.right)))
            if isinstance(part, ast.Name):
                return self._symbol(part.id, node)
            if isinstance(part, ast.Constant):
                return part.value
            raise UnsupportedError(f"the size {size} cannot be computed from the inputs", node.source)

        return visit(ast.parse(size, mode="eval").body)

    def _symbol(self, symbol: str, node: Network | Switch) -> torch.fx.Node:
        if symbol not in self.symbols:
            shown = [
                (value.name, axis, times)
                for value in self.program.inputs
                for axis, size in enumerate(value.shape or ())
                if (times := dims.shows(size, symbol))
            ]
            if not shown:
                raise UnsupportedError(f"no input shows the size {symbol}", node.source)
            name, axis, times = shown[0]
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.env[name], axis))
            self.symbols[symbol] = self.graph.call_function(operator.floordiv, (size, times)) if times > 1 else size
        return self.symbols[symbol]

    def _write(self) -> None:
        """What the model writes to its buffers, once all has been read."""
        for value, key in self.model.written.items():
            new = self.graph.call_function(torch.ops.aten.detach.default, (self.env[value],))
            self.graph.call_function(torch.ops.aten.copy_.default, (self.buffers[key], new))


def as_tensor(array: Array) -> torch.Tensor:
    """A constant of a program."""
    return torch.from_numpy(np.array(array))
