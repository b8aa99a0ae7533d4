"""Measure a device: the primitives' times in ONNX Runtime, as the tables of a device profile."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.cost import devices
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.table import Table
from tncompile.errors import UnsupportedError
from tncompile.runtime.primitives import PRIMITIVES, Primitive, steps_model
from tncompile.runtime.session import Memory, Session, available_providers
from tncompile.runtime.timing import no_garbage_collection

#: Told the share that is done, from 0 to 1.
Progress = Callable[[float], None]

#: ONNX Runtime's threads keep spinning for a moment after a call: so long they need to fall asleep.
_PAUSE_S = 0.002
_BLOCK_S = 150e-6
_STEPS, _VISITS = 8, 8  # what a call costs is taken off every time, so it is measured in several places
_ROUNDS = 5
_AGREE = 1.03

#: How far a time may lie above what its smaller neighbour suggests: a share, the start of threads, and bytes per
#: second, as the neighbour may have been in a cache.
_SLACK, _THREADS_S, _SLOWEST = 1.1, 5e-6, 10e9


@dataclass(frozen=True)
class Grid:
    """The sizes at which a table is measured; points of more `work` than that are extrapolated.

    Along the first `monotone` axes (all, by default) no more work takes less time.
    """

    axes: tuple[tuple[int, ...], ...]
    work: int
    monotone: int | None = None

    def points(self) -> list[tuple[int, ...]]:
        """All points, last axis fastest."""
        return [*itertools.product(*self.axes)]


_WIDTHS = (1, 4, 16, 64, 256)
GRIDS: dict[str, Grid] = {
    "matmul": Grid(
        (
            (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 1024, 4096),
            (1, 4, 16, 64, 128, 256, 512, 1024, 2048),
            (1, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048),
        ),
        1 << 26,
    ),
    "batched": Grid(((1, 2, 16, 256), (*_WIDTHS, 1024), (*_WIDTHS, 1024), (1, 4, 8, 16, 32, 64, 256, 1024)), 1 << 23),
    "conv": Grid(((1, 16, 256), (4, 16, 64, 256), (4, 16, 64, 256), (1, 4, 16, 64, 256, 1024)), 1 << 24),
    "swap": Grid(((1, 2, 16, 256), (2, 4, 8, 16, 64, 256, 4096), (2, 4, 8, 16, 64, 256, 4096)), 1 << 19, monotone=1),
    "moved": Grid(((16, 256, 4096, 65536), (2, 3, 4, 8, 16, 64, 256, 1024)), 1 << 20),
    "shuffled": Grid(((16, 256, 4096, 65536), (1, 2, 4, 8, 16, 64, 256, 1024)), 1 << 20),
    "multiply": Grid(((1, 16, 256, 4096, 65536), (1, 4, 16, 64, 256, 4096, 65536)), 1 << 20),
    "reduce": Grid(((1, 16, 256, 4096), (2, 4, 16, 64, 256), (2, 16, 64, 256, 4096, 65536)), 1 << 21),
    "reduce_last": Grid(((1, 16, 256, 4096, 65536), (4, 16, 64, 256, 1024)), 1 << 20),
    "copy": Grid((tuple(4**k for k in range(2, 13)),), 1 << 25),
    "read": Grid((tuple(1 << k for k in range(12, 28)),), 1 << 25),
}


class Stopwatch:
    """Times primitives against each other on one device, ``cpu`` or ``cuda``, on so many threads (0: one a core).

    Rounds are interleaved: each visits the sessions in a new order and times their primitives for a short block
    of calls. What else the machine does only ever adds time, so what counts are the two lowest samples of a
    primitive; it is settled once they agree, and the later rounds are for the others.
    """

    def __init__(self, primitives: Sequence[Primitive], device: str = "cpu", threads: int = 0) -> None:
        self.threads = threads
        self.providers = _providers(device)
        most = max((p.elements for p in primitives), default=0) + 4096
        numbers = np.random.default_rng(0).uniform(0.5, 1.0, most).astype(np.float32)
        self.memory = Memory(numbers, device), Memory(np.zeros_like(numbers), device)
        self.calls: list[Callable[[], None]] = []
        sessions: dict[object, tuple[Session, list[int]]] = {}
        for position, primitive in enumerate(primitives):
            if primitive.key not in sessions:
                sessions[primitive.key] = (self._session(primitive.model()), [])
            session, group = sessions[primitive.key]
            group.append(position)
            self.calls.append(session.bind(primitive.inputs, [primitive.output], *self.memory))
        self.groups = [group for _, group in sessions.values()]
        for count in (0, _STEPS):
            call = self._session(steps_model(count)).bind([(1, 4)], [(1, 4)], *self.memory)
            self.groups += [[len(self.calls) + k] for k in range(_VISITS)]
            self.calls += [call] * _VISITS

    def _session(self, model: bytes) -> Session:
        session = Session(model, self.providers, threads=self.threads)
        if self.providers[0] not in session.providers:
            raise UnsupportedError(
                f"ONNX Runtime has {self.providers[0]} but cannot load it: are the GPU's driver and CUDA's libraries "
                "those that this onnxruntime needs?"
            )
        return session

    def run(self, seconds: float, progress: Progress = lambda share: None) -> tuple[float, list[float]]:
        """Seconds of a step that does nothing, and of each primitive without what a call costs.

        Takes until all are settled, at most about so many seconds, but at least a few rounds.
        """
        samples: list[list[float]] = [[] for _ in self.calls]
        counts = [1] * len(self.calls)
        shuffle = random.Random(0).shuffle
        start, rounds = time.perf_counter(), 0
        groups = [[*group] for group in self.groups]
        with no_garbage_collection():
            while groups and (rounds < _ROUNDS or time.perf_counter() - start < seconds):
                shuffle(groups)
                for group in groups:
                    time.sleep(_PAUSE_S)
                    for position in group:
                        self._sample(position, counts, samples[position])
                    progress(min((time.perf_counter() - start) / seconds, 1.0))
                rounds += 1
                if rounds >= _ROUNDS:
                    groups = [left for group in groups if (left := [p for p in group if not _settled(samples[p])])]
        times = [sum(sorted(values)[:2]) / 2 for values in samples]
        one, many = min(times[-2 * _VISITS : -_VISITS]), min(times[-_VISITS:])
        node = max((many - one) / _STEPS, 1e-8)
        call = one - node  # so that a MatMul of next to nothing is a node: in a network a Reshape goes with it
        return node, [max(t - call, node / 2) for t in times[: -2 * _VISITS]]

    def _sample(self, position: int, counts: list[int], samples: list[float]) -> None:
        call = self.calls[position]
        call()
        count = counts[position]
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken = (time.perf_counter() - start) / count
        samples.append(taken)
        counts[position] = max(1, int(_BLOCK_S / max(taken, 1e-7)))


def _settled(samples: Sequence[float]) -> bool:
    first, second = sorted(samples)[:2]
    return second <= _AGREE * first


def measure(
    device: str = "cpu", threads: int = 0, seconds: float = 40.0, progress: Progress = lambda share: None
) -> DeviceProfile:
    """The profile of a device, ``cpu`` or ``cuda``, on so many threads (0: one a core), measured in about so many
    seconds.

    UnsupportedError where ONNX Runtime cannot use the device.
    """
    primitives: list[Primitive] = []
    places: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, grid in GRIDS.items():
        for point in grid.points():
            primitive = PRIMITIVES[name](*point)
            if primitive.work <= grid.work:
                places[name, point] = len(primitives)
                primitives.append(primitive)
    node, times = Stopwatch(primitives, device, threads).run(seconds, progress)
    tables = {}
    for name in GRIDS:
        known = {point: times[place] for (table, point), place in places.items() if table == name}
        tables[name] = fill(name, known)
    return DeviceProfile(
        device=devices.machine(device, threads), measured=True, strip=_strip(device), node=node, **tables
    )


def fill(name: str, known: dict[tuple[int, ...], float]) -> Table:
    """A whole table from its measured points.

    What was not measured grows in proportion from its neighbours below. A measured time can only be too long, so
    each is lowered to what its neighbours allow: where the grid is `monotone`, more work takes no less time, and r
    times the work takes at most r times as long, but for threads that start and caches that end.
    """
    grid = GRIDS[name]
    axes = grid.axes
    seconds: dict[tuple[int, ...], float] = {}
    for point in grid.points():
        below = []
        for position, axis in enumerate(axes):
            if place := axis.index(point[position]):
                neighbour = (*point[:position], axis[place - 1], *point[position + 1 :])
                below.append(seconds[neighbour] * axis[place] / axis[place - 1])
        if point in known:
            bound = _SLACK * min(below, default=math.inf) + _THREADS_S
            bound += 4 * PRIMITIVES[name](*point).elements / _SLOWEST
            seconds[point] = min(known[point], bound)
        elif below:
            seconds[point] = math.exp(sum(map(math.log, below)) / len(below))
        else:
            raise ValueError(f"{name} was not measured at {point}")
    array = np.array([*seconds.values()]).reshape([len(axis) for axis in axes])
    for k in range(array.ndim)[: grid.monotone]:
        array = np.flip(np.minimum.accumulate(np.flip(array, k), k), k)
    return Table(axes, tuple(array.ravel().tolist()))


def _strip(device: str) -> int:
    """MLAS packs B in strips of 16 columns on every processor."""
    return 16 if device == "cpu" else 1


def _providers(device: str) -> list[str]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    name = f"{device.upper()}ExecutionProvider"
    if name not in available_providers():
        raise UnsupportedError(
            f"no {name} in this ONNX Runtime; it has {', '.join(available_providers())}. Install onnxruntime-gpu "
            "on a machine with an NVIDIA GPU, or measure `--device cpu`"
        )
    return [name, "CPUExecutionProvider"]
