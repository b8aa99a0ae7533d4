"""Runs a model as it came in, with other numbers in some of its weights, and shows values inside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array
from tncompile.tensorizer.onnx_graph import OnnxGraph
from tncompile.tensorizer.torch_graph import TorchGraph


@dataclass(frozen=True)
class Ran:
    """What one run gave: the outputs by public name, and the values that were wanted, by name."""

    outputs: Mapping[str, Array]
    values: Mapping[str, Array]


class Runner:
    """A model that runs in its own dtype: traced ones in PyTorch, ONNX models in ONNX Runtime."""

    def __init__(self, model: ImportedModel) -> None:
        self.model = model
        self._graph: TorchGraph | OnnxGraph = OnnxGraph(model) if isinstance(model, OnnxModel) else TorchGraph(model)
        self._shapes = {name: array.shape for name, array in model.program.arrays.items()}

    def run(
        self,
        feeds: Mapping[str, Array],
        weights: Mapping[str, Array] | None = None,
        wanted: Sequence[str] = (),
        outputs: bool = True,
        known: Mapping[str, Array] | None = None,
    ) -> Ran:
        """Run on arrays by input name, with `weights` (named as in the program) in the place of the model's own.

        `wanted` names values of the imported program. Without `outputs` nothing is computed that only they need, and
        nothing that only `known` values need, which `ahead_of` named.
        TNCompileError where a weight or a value is not the model's, or the model refuses the arrays.
        """
        weights = weights or {}
        for name, array in weights.items():
            if name in self._shapes and array.shape != self._shapes[name]:
                raise TNCompileError(f"the weight {name} has shape {self._shapes[name]}, not {array.shape}")
        return Ran(*self._graph.run(feeds, weights, tuple(wanted), outputs, known or {}))

    def ahead_of(self, weights: Collection[str], wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """Values from which all that depends on some weights can be computed, and nothing before is needed; of the
        `wanted` ones those that do not depend on them. None of an ONNX model, which runs from its inputs."""
        return self._graph.ahead_of(weights, wanted)
