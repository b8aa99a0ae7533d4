"""The traced graph as the reference of a check: run by torch, in float64 and in the model's own dtype."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tncompile.cost.search import einsum_path
from tncompile.errors import CheckError, SourceRef
from tncompile.frontend.importer import TracedModel, source_of
from tncompile.frontend.mapped import release_pages
from tncompile.frontend.pairs import is_complex
from tncompile.ir import Array


def run_traced(traced: TracedModel, feeds: Mapping[str, Array], dtype: torch.dtype | None) -> list[Array]:
    """The traced graph's outputs, computed by torch; with a dtype, in that floating dtype throughout.

    The graph is the one that torch.export gave, before any of our passes: an independent reference.
    """
    exported = traced.reference
    complex_inputs = {n.name for n in exported.graph.nodes if n.op == "placeholder" and is_complex(n)}
    interpreter = _Widened(exported.graph_module, dtype)
    args: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            given = torch.from_numpy(np.array(feeds[spec.arg.name])) if spec.arg.name in feeds else None
            args.append(given if given is None or spec.arg.name not in complex_inputs else torch.view_as_complex(given))
        else:
            store = exported.state_dict if spec.target in exported.state_dict else exported.constants
            args.append(store[spec.target].detach())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outputs = interpreter.run(*args)
        except Exception as error:
            raise CheckError(
                f"the traced model itself cannot run on these inputs: {str(error).splitlines()[0]}; "
                "give some that it can with --example inputs.npz"
            ) from error
    return [_shown(output) for output in outputs if output is not None]


def _shown(output: Any) -> Array:
    if not isinstance(output, torch.Tensor):
        return np.asarray(output)
    real = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    return real.detach().numpy()


_LARGE = 1 << 24  # bytes of a node's tensors
_aten = torch.ops.aten
_MOVES = {
    *(_aten.embedding.default, _aten.index_select.default, _aten.gather.default, _aten.slice.Tensor),
    *(_aten.select.int, _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default),
    *(_aten.squeeze.dim, _aten.expand.default, _aten.detach.default, _aten.alias.default),
}
"""What moves numbers and computes none: the same in any dtype, and a large table is not widened for a few rows."""


class TracedReference:
    """A traced model as the reference, in float64 and in its own dtype."""

    baseline = "eager PyTorch's"
    slack = 1.0
    note = ""

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced

    def run(self, feeds: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
        """The outputs in float64, and in the model's own dtype."""
        return run_traced(self.traced, feeds, torch.float64), run_traced(self.traced, feeds, None)

    def runs_on(self, feeds: Mapping[str, Array]) -> bool:
        """Whether the traced graph takes these inputs."""
        try:
            run_traced(self.traced, feeds, None)
        except CheckError:
            return False
        return True

    def draws(self) -> tuple[str, SourceRef]:
        """The first operation that may draw random numbers, and where it stands; empty where there is none."""
        nodes = [n for n in self.traced.exported.graph_module.graph.nodes if n.op == "call_function"]
        seeded = [n for n in nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
        return (str(seeded[0].target), source_of(seeded[0])) if seeded else ("", SourceRef())


class _Widened(torch.fx.Interpreter):
    """Runs a graph with every floating tensor, and every floating dtype it names, widened.

    A weight is widened where it is used and for as long; what only moves its numbers comes before that.
    """

    def __init__(self, module: torch.fx.GraphModule, dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self.dtype = dtype

    def cast(self, value: Any) -> Any:
        """A floating tensor or dtype, widened; anything else as it is."""
        if self.dtype is not None and isinstance(value, torch.Tensor) and value.is_complex():
            return value.to(self.dtype.to_complex())
        if self.dtype is not None and isinstance(value, torch.dtype) and value.is_complex:
            return self.dtype.to_complex()
        if self.dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        if self.dtype is not None and isinstance(value, torch.dtype) and value.is_floating_point:
            return self.dtype
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "_assert_tensor_metadata" in str(target):
            return None
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if target in _MOVES:
            return super().call_function(target, args, kwargs)
        args, kwargs = torch.utils._pytree.tree_map(self.cast, (args, kwargs))
        if target is torch.ops.aten.einsum.default and not kwargs:
            # left to right, as torch runs it without a path, some networks need hundreds of gigabytes
            kwargs = {"path": einsum_path(args[0], [tuple(x.shape) for x in args[1]])}
        if target is torch.ops.aten.view.default:  # another path leaves other strides
            target = torch.ops.aten.reshape.default
        # constants made inside the graph (full, arange) take torch's default dtype
        result = torch.utils._pytree.tree_map(self.cast, super().call_function(target, args, kwargs))
        if sum(t.nbytes for t in tensors) > _LARGE:
            release_pages()
        return result

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map(self.cast, super().output(target, args, kwargs))
