"""How far the outputs of a changed model are from those of the model as it came in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.tensorizer.data import Calibration
from tncompile.tensorizer.runner import Runner

_KEPT = 1 << 29  # bytes of outputs that are not computed again

Run = Callable[[dict[str, Array]], Any]
"""Takes arrays by input name; gives the outputs by name, or in order, as arrays or tensors."""


class Evaluation:
    """The relative output error ``|y - y0| / |y0|`` over all samples of the calibration data, in the Frobenius norm.

    `y0` is the model as it came in, in its own dtype. Of several outputs it is the largest error, so that a large one
    hides no other; outputs that are whole numbers count only where there are no others, by the share of them that
    differ. Numbers that are not finite in `y0` are left out; where only `y` is not, the error is infinite.
    """

    def __init__(self, runner: Runner, calibration: Calibration) -> None:
        self.runner = runner
        self.calibration = calibration
        self._names = [name for name, _ in runner.model.program.outputs]
        self._kept: dict[int, Mapping[str, Array]] = {}
        self._bytes = 0

    def within(self, seconds: float, passes: int, clock: Callable[[], float] = time.monotonic) -> Evaluation:
        """One over so few of the runs that so many passes, of half the model on average, take about `seconds`; over one
        at least."""
        feeds = next(iter(self.calibration))
        self.runner.run(feeds)  # a first call takes longer
        start = clock()
        self.runner.run(feeds)
        whole = (clock() - start) * len(self.calibration) * (1 + passes / 2)  # and the outputs to compare with
        if whole <= seconds:
            return self
        return Evaluation(self.runner, self.calibration.take(int(self.calibration.samples * seconds / whole)))

    def of_weights(self, weights: Mapping[str, Array]) -> float:
        """With some weights of the model replaced, by name."""
        return self.of(lambda feeds: self.runner.run(feeds, weights).outputs)

    def of(self, run: Run) -> float:
        """Of anything that computes the outputs, such as a session of a compiled file."""
        return self.of_each(run(feeds) for feeds in self.calibration)

    def of_each(self, results: Iterable[Any]) -> float:
        """Of what each run gave, in their order."""
        wrong = dict.fromkeys(self._names, 0.0)
        whole = dict.fromkeys(self._names, 0.0)
        exact: dict[str, list[float]] = {}
        for result, before in zip(results, self._exact(), strict=True):
            after = self._named(result)
            for name, y0 in before.items():
                y = np.asarray(after[name])
                if y.shape != y0.shape:
                    raise TNCompileError(f"the output {name} has shape {y.shape}; the model's is {y0.shape}")
                if y0.dtype.kind != "f":
                    differ, count = exact.setdefault(name, [0.0, 0.0])
                    exact[name] = [differ + np.count_nonzero(y != y0), count + y0.size]
                    continue
                good = np.isfinite(y0)
                y0_, y_ = np.where(good, y0, 0).astype(np.float64), np.where(good, y, 0).astype(np.float64)
                wrong[name] += float(np.square(y_ - y0_).sum()) if np.isfinite(y_).all() else math.inf
                whole[name] += float(np.square(y0_).sum())
        floats = [name for name in self._names if name not in exact]
        if not floats:
            return max((differ / max(1.0, count) for differ, count in exact.values()), default=0.0)
        return max(_ratio(wrong[name], whole[name]) for name in floats)

    def _exact(self) -> Iterator[Mapping[str, Array]]:
        """What the model gives as it came in."""
        for k, feeds in enumerate(self.calibration):
            outputs = self._kept.get(k)
            if outputs is None:
                outputs = self.runner.run(feeds).outputs
                size = sum(array.nbytes for array in outputs.values())
                if self._bytes + size <= _KEPT:
                    self._kept[k] = {name: np.array(array) for name, array in outputs.items()}
                    self._bytes += size
            yield outputs

    def _named(self, outputs: Any) -> Mapping[str, Any]:
        if isinstance(outputs, Mapping):
            if {*outputs} >= {*self._names}:
                return outputs
            values: Sequence[Any] = [*outputs.values()]
        else:
            values = [*outputs] if isinstance(outputs, (tuple, list)) else [outputs]
        if len(values) != len(self._names):
            raise TNCompileError(f"{len(values)} outputs; the model has {len(self._names)}: {', '.join(self._names)}")
        return dict(zip(self._names, values, strict=True))


def _ratio(wrong: float, whole: float) -> float:
    if whole > 0:
        return math.sqrt(wrong / whole)
    return 0.0 if wrong == 0 else math.inf
