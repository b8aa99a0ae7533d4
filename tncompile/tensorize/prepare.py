"""What a search begins with: the sites of a model, what their inputs are like, and how much each of them matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tncompile.frontend.model import ImportedModel, LoadedModel
from tncompile.ir import Array
from tncompile.passes import Context
from tncompile.tensorize.data import Calibration
from tncompile.tensorize.options import Statistics
from tncompile.tensorize.runner import Runner
from tncompile.tensorize.sites import Site

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A model ready to be searched.

    `sensitivity` has for each site the relative error of the model's outputs over that of the site's output; without
    calibration data (`data` is None) the share of the site's weights in all weights, so that errors are those of the
    weights. `additivity` is the error of all sites together over the root of the sum of squares.
    """

    loaded: LoadedModel
    traced: ImportedModel
    context: Context
    sites: tuple[Site, ...]
    joint: tuple[Site, ...]
    runner: Runner
    data: Calibration | None
    statistics: Mapping[str, Statistics]
    sensitivity: Mapping[str, float]
    additivity: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> Sequence[Mapping[str, Array]]:
        """Calibration data to choose and to train on."""
        return () if self.data is None else self.data.train

    @property
    def held(self) -> Sequence[Mapping[str, Array]]:
        """Calibration data held out to evaluate on."""
        return () if self.data is None else self.data.held

    @property
    def inputs(self) -> list[str]:
        """The names of the model's inputs."""
        return [value.name for value in self.traced.program.inputs]

    def run(self, feeds: Mapping[str, Array], weights: Mapping[str, Array] | None = None) -> Sequence[Array]:
        """The model's outputs, with other numbers in some weights."""
        return list(self.runner.run(feeds, weights).outputs.values())
