"""Takes the time of networks in ONNX Runtime: what `--tune` chooses by.

Times are kept per user, by what was timed and where: a second compile of the same network reads them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import platformdirs

from tncompile import __version__
from tncompile.cost.devices import machine
from tncompile.emit.program import network_model
from tncompile.errors import OutputError, TNCompileWarning
from tncompile.ir import Array, Index, Network, Tensor, dims
from tncompile.runtime.device import providers
from tncompile.runtime.files import write_file
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race

CACHE = "TNCOMPILE_CACHE"
"""The environment variable that moves the folder of measured times."""

FINALISTS = 5
"""How many are timed again, and longer, after a first look at all."""

SESSIONS = 3
"""Of each of them: two sessions of one model may differ by a fifth, by where their memory lies."""


class Tuner:
    """A `tncompile.passes.Timer` with a budget of seconds for everything it is asked, on so many threads (0: all).

    A stored time is that of a network on one kind of machine with one version of ONNX Runtime and of tncompile.
    """

    def __init__(self, seconds: float, device: str = "cpu", threads: int = 0, stored: bool = True) -> None:
        self.seconds = seconds
        self.providers = providers(device)
        self.threads = threads
        self.place = f"{machine(device, threads)}; tncompile {__version__}"
        self.jobs = 1
        self.timed = 0
        self.known = 0
        self._spent = 0.0
        self._store = TimeStore() if stored else None

    def start(self, jobs: int) -> None:
        """Expect so many calls of `times`."""
        self.jobs = max(jobs, 1)

    def times(self, networks: Sequence[Network], symbols: Mapping[str, int], shown: bool) -> list[float]:
        """Seconds of networks that compute the same, run in turns; inf for one that cannot run."""
        keys = [self._key(network, symbols, shown) for network in networks]
        stored = self._store.get(keys) if self._store else None
        if stored is not None:
            self.known += len(keys)
            self.jobs = max(self.jobs - 1, 1)
            return stored
        start = time.perf_counter()
        left = max(self.seconds - self._spent, 0.1 * self.seconds)
        found = self._race(networks, symbols, shown, left / self.jobs)
        self._spent += time.perf_counter() - start
        self.jobs = max(self.jobs - 1, 1)
        self.timed += len(keys)
        if self._store:
            # what failed may do better another time
            self._store.put({k: t for k, t in zip(keys, found, strict=True) if math.isfinite(t)})
        return found

    def _race(self, networks: Sequence[Network], symbols: Mapping[str, int], shown: bool, budget: float) -> list[float]:
        feeds = feeds_of(networks[0], symbols)
        entrants = {}
        models: dict[str, bytes] = {}
        for number, network in enumerate(networks):
            try:
                model = model_of(network, shown)
                call = self._call(model, feeds)
                call()
            except Exception:  # ONNX Runtime's own have no common base; what cannot run is no candidate
                continue
            entrants[str(number)], models[str(number)] = call, model
        first = race(entrants, rounds=7, budget_s=0.5 * budget)
        times = {name: first.median(name) / 1e3 for name in entrants}
        best = sorted(times, key=lambda name: times[name])[:FINALISTS]
        calls = {
            f"{name}.{k}": self._call(models[name], feeds) if k else entrants[name]
            for name in best
            for k in range(SESSIONS)
        }
        final = race(calls, rounds=60, budget_s=0.5 * budget)
        longer = {n: statistics.median(final.median(f"{n}.{k}") for k in range(SESSIONS)) / 1e3 for n in best}
        # of those out of the running a time is only known to be above those of the finalists
        worst = max(longer.values(), default=0.0)
        times = {name: max(seconds, worst) for name, seconds in times.items()} | longer
        return [times.get(str(number), math.inf) for number in range(len(networks))]

    def _call(self, model: bytes, feeds: Mapping[str, Array]) -> Callable[[], object]:
        return Session(model, self.providers, threads=self.threads).bound(feeds)

    def _key(self, network: Network, symbols: Mapping[str, int], shown: bool) -> str:
        text = repr((self.place, sorted(symbols.items()), shown, canonical(network)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def feeds_of(network: Network, symbols: Mapping[str, int]) -> dict[str, Array]:
    """Normal numbers for the operands; a symbol nobody knows counts as the batch."""
    generator = np.random.default_rng(0)

    def size(dim: int | str) -> int:
        missing = dict.fromkeys(dims.symbols(dim) - symbols.keys(), symbols.get("batch", 1))
        return dims.evaluate(dim, {**symbols, **missing})

    shapes = {t.name: [size(d) for d in t.shape] for t in network.operands}
    return {name: np.asarray(generator.standard_normal(shape), network.dtype) for name, shape in shapes.items()}


def model_of(network: Network, shown: bool = True) -> bytes:
    """A scheduled network alone as an ONNX model, to be timed; with `shown` as in `network_model`.

    Cores get numbers of ordinary size, as denormal ones are slow.
    """
    generator = np.random.default_rng(0)

    def filled(tensor: Tensor) -> Tensor:
        if tensor.data is None:
            return tensor
        numbers = generator.standard_normal(tensor.data.shape, np.float32) / math.sqrt(max(tensor.data.size, 1))
        return Tensor(f"core_{id(tensor)}", tensor.axes, numbers.astype(tensor.data.dtype))

    terms = tuple(replace(term, tensors=tuple(map(filled, term.tensors))) for term in network.terms)
    model = network_model(replace(network, terms=terms), shown)
    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def canonical(network: Network) -> object:
    """What a network computes and how, whatever its tensors and indices are called."""
    number: dict[str, int] = {}

    def of(index: Index) -> tuple[int, int | str]:
        return number.setdefault(index.name, len(number)), index.size

    def axes(tensor: Tensor) -> object:
        return tuple(tuple(map(of, axis)) for axis in tensor.axes)

    output = axes(network.output)
    terms = [
        (
            [(t.is_core, axes(t)) for t in term.tensors],
            [window.form(number) for window in term.windows],
            [(s.left, s.right, s.form, [number[i] for i in s.order]) for s in term.steps or ()],
            [(number[part.index], part.count) for part in term.slices],
        )
        for term in network.terms
    ]
    return terms, output, network.dtype


class TimeStore:
    """Seconds by key, in one JSON file of this user's. A damaged or unwritable file only costs time."""

    def __init__(self) -> None:
        folder = os.environ.get(CACHE) or platformdirs.user_cache_dir("tncompile")
        self.path = Path(folder) / "times.json"
        try:
            loaded = json.loads(self.path.read_text())
            self.seconds = {str(k): float(v) for k, v in loaded.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            self.seconds = {}

    def get(self, keys: Sequence[str]) -> list[float] | None:
        """The times of all keys, which may come from several runs; None where one is missing."""
        return [self.seconds[k] for k in keys] if all(k in self.seconds for k in keys) else None

    def put(self, times: Mapping[str, float]) -> None:
        """Remember times; those that are known already are replaced."""
        self.seconds |= times
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(self.seconds).encode())
        except (OSError, OutputError) as error:
            warnings.warn(f"what was timed is not remembered: {error}", TNCompileWarning, stacklevel=2)
