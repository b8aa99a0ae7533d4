"""What a pass is: a small frozen class whose fields are its options."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tncompile.cost.devices import default_profile
from tncompile.cost.profile import DeviceProfile
from tncompile.ir import Program, dims
from tncompile.ir.core import Network


class Timer(Protocol):
    """Takes the time of networks on the device."""

    def start(self, jobs: int) -> None:
        """Expect so many calls of `times`, between which the time there is has to be shared."""

    def times(self, networks: Sequence[Network], symbols: Mapping[str, int], shown: bool) -> list[float]:
        """Seconds of scheduled networks that compute the same, run in turns at given sizes; inf for one that fails.

        `shown`: the value is an output of the model, else something reads it."""


@dataclass(frozen=True)
class Context:
    """What passes may know besides the program: the sizes to plan for and the device.

    `batches` are the sizes of the symbol ``batch`` that matter; `sizes` those of all other symbols. Without a
    `timer`, plans are chosen by prediction alone. `max_memory` bounds the bytes that the operands and intermediates
    of a network take at once. `outputs` names the values that the model shows,
    `attended` those that meet another run-time value, as in attention, `images` those that convolutions leave in blocks
    of channels. `compact`: nothing is computed at compile time
    that has more numbers than what it is made of, and each network has one plan, so that the file does not grow.
    """

    batches: tuple[int, ...] = (1, 32)
    sizes: Mapping[str, int] = field(default_factory=dict)
    profile: DeviceProfile = field(default_factory=default_profile)
    timer: Timer | None = None
    max_memory: int | None = None
    outputs: frozenset[str] = frozenset()
    attended: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    compact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(sorted({*self.batches})))

    def symbols(self, batch: int) -> dict[str, int]:
        """Sizes of all symbols at one batch size."""
        return {**self.sizes, "batch": batch}

    def size(self, dim: dims.Dim, batch: int) -> int:
        """A size at one batch size; a symbol nobody knows counts as that batch size."""
        try:
            return dims.evaluate(dim, self.symbols(batch))
        except KeyError:
            return batch

    def index_sizes(self, network: Network, batch: int) -> dict[str, int]:
        """Sizes of a network's indices at one batch size."""
        return {name: self.size(index.size, batch) for name, index in network.indices.items()}


@dataclass(frozen=True)
class Change:
    """One thing that a pass did, or (`declined`) did not do, to one network, and why."""

    network: str
    what: str
    why: str = ""
    declined: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"{self.network}: {'left alone, ' if self.declined else ''}{self.what}{why}"


@dataclass(frozen=True)
class PassReport:
    """What a pass did."""

    name: str
    changes: tuple[Change, ...]
    seconds: float = 0.0


class Pass(abc.ABC):
    """A program in, a program out. Subclasses are frozen dataclasses; their name on the command line is
    their own in snake case, with options in braces: ``order{max_trials=64}``."""

    @classmethod
    def name(cls) -> str:
        """``MergeCores`` -> ``merge_cores``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @abc.abstractmethod
    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        """The new program, and what was changed or declined."""
