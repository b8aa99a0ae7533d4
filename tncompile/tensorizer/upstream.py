"""Runs of a model over data, again and again with other weights in its last layers: the first are computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from tncompile.ir import Array
from tncompile.tensorizer.data import Calibration
from tncompile.tensorizer.runner import Ran, Runner

KEPT = 1 << 28
"""Bytes of values that are kept at most; of larger ones the model is run from an earlier place, or from its inputs."""


class Upstream:
    """A model on data, with what does not depend on the weights that still change."""

    def __init__(self, runner: Runner, calibration: Calibration) -> None:
        self.runner, self.calibration = runner, calibration
        self._kept: list[Mapping[str, Array]] = [{} for _ in range(len(calibration))]

    def advance(
        self, changing: Collection[str], weights: Mapping[str, Array] | None = None, wanted: Sequence[str] = ()
    ) -> None:
        """From now on only some weights change, fewer than before, and the others are as in `weights`.

        Values that are `wanted` later are kept too, where they do not depend on those.
        """
        names = self.runner.ahead_of(changing, wanted)
        if not names:
            return
        kept: list[Mapping[str, Array]] = []
        size = 0
        for ran in self.runs(weights, names):
            kept.append({name: array.copy() for name, array in ran.values.items()})  # not views of larger ones
            size += sum(array.nbytes for array in ran.values.values())
            if size * len(self.calibration) > KEPT * len(kept):
                return
        self._kept = kept

    def runs(
        self, weights: Mapping[str, Array] | None, wanted: Sequence[str] = (), outputs: bool = False
    ) -> Iterator[Ran]:
        """Each run of the data in order, as `Runner.run` gives it."""
        for feeds, kept in zip(self.calibration, self._kept, strict=True):
            yield self.runner.run(feeds, weights, wanted, outputs, known=kept)
