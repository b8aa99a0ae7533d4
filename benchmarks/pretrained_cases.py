"""The pretrained cases: what each is for, at which batch sizes it is served, and what it is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from benchmarks import pretrained_data as data
from benchmarks import pretrained_metrics as metrics

Inputs = tuple[torch.Tensor, ...]

#: A way that loses more of the task metric than this is shown, and is no rival.
MAX_DROP = 0.01


@dataclass(frozen=True)
class Pretrained:
    """A case of `benchmarks.models` with a task.

    `metric` is a function of `benchmarks.pretrained_metrics`, `unit` what 1 of it is. `calibrate` gives the module's
    inputs, rows along the first axis, none of which the metric sees.
    """

    name: str
    metric: Callable[[metrics.Run], float]
    unit: str
    calibrate: Callable[[], Inputs]
    batches: tuple[int, ...]

    @property
    def metric_name(self) -> str:
        """As ``--metric`` takes it: the same number on data that the metric itself does not see."""
        return f"{self.metric.__module__}:search_{self.metric.__name__}"


def _sounds() -> Inputs:
    return (data.tones("calibration", 256)[0],)


_CASES = (
    Pretrained("ccexam_mnist", metrics.digits, "digits read right", lambda: (data.digits("calibration")[0],), (1, 64)),
    Pretrained("crepe_tiny", metrics.pitch, "semitones", _sounds, (1, 32)),
    Pretrained("crepe_full", metrics.pitch, "semitones", _sounds, (1, 8)),
    Pretrained(
        "efficientnet_lite0", metrics.photos, "photos classed alike", lambda: (data.photos("calibration", 128),), (1, 8)
    ),
    Pretrained("minilm_l6", metrics.sentiment, "texts judged right", lambda: data.tokens(data.snippets()[0]), (1, 16)),
)

#: Every case, by the name that it has in `benchmarks.models`.
PRETRAINED: Mapping[str, Pretrained] = MappingProxyType({case.name: case for case in _CASES})
