"""Takes the time of networks in ONNX Runtime: what `--tune` chooses by.

Times are kept per user, by what was timed and where: a second compile of the same network reads them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import platformdirs

from tncompile import __version__
from tncompile.emit.program import network_model
from tncompile.errors import OutputError
from tncompile.ir import Array, Index, Network, Tensor, dims
from tncompile.runtime.files import write_file
from tncompile.runtime.session import Session, runtime_version

CACHE = "TNCOMPILE_CACHE"
"""The environment variable that moves the folder of measured times."""

BLOCK_S = 0.002
"""Calls are timed in blocks of about this length, as clocks are coarse and calls are short."""

HOPELESS = 2.5
"""What is this many times slower than the best in its first block is not timed again."""


class Tuner:
    """A `tncompile.passes.Timer` with a budget of seconds for everything it is asked.

    `device` names the machine; with the providers, the version of ONNX Runtime and the network it is the key of a
    stored time.
    """

    def __init__(self, seconds: float, device: str, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.seconds = seconds
        self.providers = tuple(providers)
        self.place = f"{device}; {', '.join(providers)}; onnxruntime {runtime_version()}; tncompile {__version__}"
        self.jobs = 1
        self.timed = 0
        self.known = 0
        self._spent = 0.0
        self._store = _Store()

    def start(self, jobs: int) -> None:
        """Expect so many calls of `times`."""
        self.jobs = max(jobs, 1)

    def times(self, networks: Sequence[Network], symbols: Mapping[str, int]) -> list[float]:
        """Seconds of networks that compute the same, run in turns; inf for one that cannot run."""
        keys = [self._key(network, symbols) for network in networks]
        stored = self._store.get(keys)
        if stored is not None:
            self.known += len(keys)
            self.jobs = max(self.jobs - 1, 1)
            return stored
        start = time.perf_counter()
        budget = max((self.seconds - self._spent) / self.jobs, 0.05 * self.seconds / self.jobs)
        found = self._race(networks, symbols, budget)
        self._spent += time.perf_counter() - start
        self.jobs = max(self.jobs - 1, 1)
        self.timed += len(keys)
        self._store.put(dict(zip(keys, found, strict=True)))
        return found

    def _race(self, networks: Sequence[Network], symbols: Mapping[str, int], budget: float) -> list[float]:
        feeds = _feeds(networks[0], symbols)
        end = time.perf_counter() + budget
        samples: dict[int, list[float]] = {}
        entrants: dict[int, tuple[Session, int]] = {}
        for number, network in enumerate(networks):
            try:
                session = Session(_model(network), self.providers)
                samples[number] = [_block(session, feeds, 1)]  # the first call also allocates
            except Exception:  # a candidate that cannot run is no candidate
                samples[number] = [math.inf]
                continue
            if samples[number][0] > 10 * min(s[0] for s in samples.values()) + BLOCK_S:
                continue
            first = _block(session, feeds, 1)
            samples[number] = [first]
            entrants[number] = (session, max(1, round(BLOCK_S / max(first, 1e-7))))
        shuffle = random.Random(0).shuffle
        order = list(entrants)
        for turn in itertools.count():
            shuffle(order)
            for number in order:
                session, calls = entrants[number]
                _block(session, feeds, 1)  # brings its weights back into the caches
                samples[number].append(_block(session, feeds, calls))
            if turn == 1:
                best = min(min(samples[n]) for n in order) if order else 0.0
                order = [n for n in order if min(samples[n]) <= HOPELESS * best]
            if (turn >= 4 and time.perf_counter() > end) or turn >= 60 or not order:
                break
        return [float(np.median(s[1:] if len(s) > 1 else s)) for s in (samples[n] for n in range(len(networks)))]

    def _key(self, network: Network, symbols: Mapping[str, int]) -> str:
        text = repr((self.place, sorted(symbols.items()), _canonical(network)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _block(session: Session, feeds: Mapping[str, Array], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        session.run(feeds)
    return (time.perf_counter() - start) / calls


def _feeds(network: Network, symbols: Mapping[str, int]) -> dict[str, Array]:
    """Normal numbers for the operands; a symbol nobody knows counts as the batch."""
    generator = np.random.default_rng(0)

    def size(dim: int | str) -> int:
        missing = dict.fromkeys(dims.symbols(dim) - symbols.keys(), symbols.get("batch", 1))
        return dims.evaluate(dim, {**symbols, **missing})

    shapes = {t.name: [size(d) for d in t.shape] for t in network.operands}
    return {name: np.asarray(generator.standard_normal(shape), network.dtype) for name, shape in shapes.items()}


def _model(network: Network) -> bytes:
    """The network alone as an ONNX model; cores get numbers of ordinary size, as denormal ones are slow."""
    generator = np.random.default_rng(0)

    def filled(tensor: Tensor) -> Tensor:
        if tensor.data is None:
            return tensor
        numbers = generator.standard_normal(tensor.data.shape, np.float32) / math.sqrt(max(tensor.data.size, 1))
        return Tensor(f"core_{id(tensor)}", tensor.axes, numbers.astype(tensor.data.dtype))

    terms = tuple(
        type(term)(tuple(map(filled, term.tensors)), term.order, term.steps) for term in network.terms
    )
    model = network_model(Network(network.name, terms, network.output, network.dtype))
    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def _canonical(network: Network) -> object:
    """What a network computes and how, whatever its tensors and indices are called."""
    number: dict[str, int] = {}

    def of(index: Index) -> tuple[int, int | str]:
        return number.setdefault(index.name, len(number)), index.size

    def axes(tensor: Tensor) -> object:
        return tuple(tuple(map(of, axis)) for axis in tensor.axes)

    terms = [
        (
            [(t.is_core, axes(t)) for t in term.tensors],
            [(s.left, s.right, s.form, [number[i] for i in s.order]) for s in term.steps or ()],
        )
        for term in network.terms
    ]
    return terms, axes(network.output), network.dtype


class _Store:
    """Seconds by key, in one JSON file of this user's. A damaged or unwritable file only costs time."""

    def __init__(self) -> None:
        folder = os.environ.get(CACHE) or platformdirs.user_cache_dir("tncompile")
        self.path = Path(folder) / "times.json"
        try:
            loaded = json.loads(self.path.read_text())
            self.seconds = {str(k): float(v) for k, v in loaded.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self.seconds = {}

    def get(self, keys: Sequence[str]) -> list[float] | None:
        """The times of all keys, which were taken together; None where one is missing."""
        return [self.seconds[k] for k in keys] if all(k in self.seconds for k in keys) else None

    def put(self, times: Mapping[str, float]) -> None:
        self.seconds |= times
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(self.seconds).encode())
        except (OSError, OutputError):
            return
