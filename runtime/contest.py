"""One model run in several ways: each is built, tried alone, checked, and then all are raced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export.graph_signature import TensorArgument

from tncompile.errors import TNCompileError
from tncompile.frontend.model import LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array
from tncompile.runtime import rivals
from tncompile.runtime.device import NodeTime, profile, providers, require_on_device
from tncompile.runtime.files import data_path
from tncompile.runtime.probe import Limits, Probe, probe
from tncompile.runtime.rivals import Bound, Inputs, NotApplicable
from tncompile.runtime.session import Session
from tncompile.runtime.timing import ROUNDS, race

OURS, EAGER, COMPILE, EXPORTER, DENSE, NAIVE = "tncompile", "eager", "compile", "exporter", "dense", "naive"
#: The ways that tncompile is measured against, with what a table calls them.
RIVALS: Mapping[str, str] = {
    EXPORTER: "torch.onnx.export + ORT",
    EAGER: "eager PyTorch",
    COMPILE: "torch.compile",
    DENSE: "dense + ORT",
    NAIVE: "opt_einsum order + ORT",
}
_CONTROL = "control"  # tncompile's file in a second session: what tells the two apart is noise

#: Relative error against eager PyTorch above which a way is wrong, by the dtype of the coarsest output.
TOLERANCE = {"float16": 3e-2, "float32": 2e-3, "float64": 1e-8}


@dataclass(frozen=True)
class Subject:
    """What is measured: the traced model, the same as PyTorch calls it, and inputs at a batch size.

    `inputs` takes None where all shapes are fixed. `writers` write the ONNX files that tncompile itself makes: the
    compiled model, and the one with every layer dense. A model that came in as ONNX has no `module`; its original
    file stands in the exporter's place, and what is right. `least` are the outputs' scales (`accuracy.scales`).
    """

    exported: LoadedModel
    module: Callable[..., Any] | None
    inputs: Callable[[int | None], Inputs]
    writers: Mapping[str, Callable[[Path], None]]
    least: Sequence[float] = ()

    @property
    def reference(self) -> str:
        """The way whose outputs the others must give."""
        return EAGER if self.module is not None else EXPORTER

    @property
    def input_names(self) -> list[str]:
        """The model's own names for its inputs, in order."""
        if isinstance(self.exported, OnnxModel):
            return [value.name for value in self.exported.program.inputs]
        specs = self.exported.graph_signature.input_specs
        return [s.arg.name for s in specs if s.kind.name == "USER_INPUT" and isinstance(s.arg, TensorArgument)]


@dataclass(frozen=True)
class Built:
    """An ONNX file that one way wrote: seconds it took, its nodes and bytes, or why there is none."""

    seconds: float
    nodes: int = 0
    size: int = 0
    note: str = ""
    applicable: bool = True


@dataclass(frozen=True)
class Row:
    """All ways at one batch size (None: the only one).

    `ms` are medians a call; a way that has none has a note. `errors` are relative to eager PyTorch. `fastest` is the
    fastest other way, `speed` its time divided by tncompile's, in the median of the rounds: above 1 tncompile is
    faster. Two sessions of tncompile's own file differ by `noise`.
    """

    batch: int | None
    ms: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    fastest: str = ""
    speed: float | None = None
    noise: float | None = None
    rounds: int = 0

    def ratio(self, way: str) -> float | None:
        """How many times faster tncompile is than a way, by their medians; None where one has no time."""
        if way not in self.ms or OURS not in self.ms:
            return None
        return self.speed if way == self.fastest and self.speed is not None else self.ms[way] / self.ms[OURS]


@dataclass
class Contest:
    """The ways to run one model. `against` are names of `RIVALS`; files go to `folder`."""

    subject: Subject
    folder: Path
    against: Sequence[str] = tuple(RIVALS)
    device: str = "cpu"
    threads: int = 0
    limits: Limits = field(default_factory=Limits)
    progress: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        providers(self.device)  # refuse before any work
        self.built: dict[str, Built] = {}
        self.memory: dict[str, int] = {}
        self._probes: dict[tuple[str, int | None], Probe] = {}
        self._sessions: dict[str, Session] = {}
        self._modules: dict[str, Callable[..., Any]] = {}
        self._given_up: dict[str, str] = {}

    def run(self, batches: Sequence[int | None], seconds: float, rounds: int = ROUNDS) -> Iterator[Row]:
        """Build every way, then measure at each batch size, for about so many seconds each."""
        self._build(batches)
        ordered = sorted(batches, key=lambda b: b or 0)
        for way in self.files:
            largest = self._probe(way, ordered[-1])
            if largest.memory is not None:
                self.memory[way] = largest.memory
        for batch in ordered:
            self.progress(f"timing at batch {batch}" if batch else "timing")
            yield self._row(batch, seconds, rounds)

    @property
    def files(self) -> list[str]:
        """The ways that are an ONNX file, those that could be written."""
        return [way for way, built in self.built.items() if not built.note]

    def path(self, way: str) -> Path:
        """The ONNX file of a way."""
        return self.folder / f"{way}.onnx"

    def profile(self, way: str, batch: int | None) -> tuple[NodeTime, ...]:
        """Where the time of a way that is an ONNX file goes."""
        feeds = self._session(way).feeds(self._arrays(batch))
        return profile(self.path(way), feeds, self.device, self.threads)

    # ------------------------------------------------------------------------------ building

    @property
    def names(self) -> Mapping[str, str]:
        """What a table calls each way."""
        original = {EXPORTER: "the original file + ORT"} if isinstance(self.subject.exported, OnnxModel) else {}
        return {**RIVALS, **original}

    def _build(self, batches: Sequence[int | None]) -> None:
        first = next((b for b in batches if b), 1)
        writers: dict[str, Callable[[Path], None]] = {**self.subject.writers}
        exported = self.subject.exported
        if isinstance(exported, OnnxModel):
            writers[EXPORTER] = exported.save
            writers[NAIVE] = rivals.not_pytorch
        else:
            writers[EXPORTER] = lambda path: rivals.export_plain(exported, path)
            writers[NAIVE] = lambda path: rivals.export_pairwise(exported, path, first)
        for way in (OURS, EXPORTER, DENSE, NAIVE):
            if way in (OURS, self.subject.reference) or way in self.against:
                self.progress(f"building {way}")
                self.built[way] = self._write(writers[way], self.path(way))

    def _write(self, writer: Callable[[Path], None], path: Path) -> Built:
        start = time.perf_counter()
        try:
            with rivals.time_limit(self.limits.build_s):
                writer(path)
        except NotApplicable as error:
            return Built(time.perf_counter() - start, note=str(error), applicable=False)
        except Exception as error:  # an exporter raises whatever it likes
            return Built(time.perf_counter() - start, note=_failure(error))
        seconds = time.perf_counter() - start
        return Built(seconds, len(onnx.load(path, load_external_data=False).graph.node), _size(path))

    # ------------------------------------------------------------------------------ trying

    def _probe(self, way: str, batch: int | None) -> Probe:
        key = (way, batch)
        if key not in self._probes:
            self.progress(f"trying {way}" + (f" at batch {batch}" if batch else ""))
            self._probes[key] = probe(
                self.path(way), self._arrays(batch), self.limits, device=self.device, threads=self.threads
            )
        return self._probes[key]

    def _admitted(self, way: str, batch: int | None) -> Probe:
        """The probe of a file at a batch size; what ran at a larger one need not be tried again."""
        for (other, size), found in self._probes.items():
            if other == way and found.ms is not None and (size or 0) >= (batch or 0):
                return found
        return self._probe(way, batch)

    def _arrays(self, batch: int | None) -> dict[str, Array]:
        """The inputs by the model's own names for them."""
        return dict(zip(self.subject.input_names, self.subject.inputs(batch).arrays(), strict=True))

    def _session(self, way: str) -> Session:
        if way not in self._sessions:
            session = Session(self.path(OURS if way == _CONTROL else way), providers(self.device), threads=self.threads)
            require_on_device(session, (), self.device)
            self._sessions[way] = session
        return self._sessions[way]

    # ------------------------------------------------------------------------------ racing

    def _row(self, batch: int | None, seconds: float, rounds: int) -> Row:
        notes: dict[str, str] = {}
        errors: dict[str, float] = {}
        bound: dict[str, Bound] = {}
        applicable = [way for way, built in self.built.items() if built.applicable]
        modules = [way for way in (EAGER, COMPILE) if way in (*self.against, self.subject.reference)]
        reference = self.subject.reference
        for way in dict.fromkeys((reference, *applicable, *modules)):
            try:
                bound[way] = self._bind(way, batch)
            except Exception as error:  # a way that fails is a result
                notes[way] = _failure(error)
        expected = bound[reference].outputs() if reference in bound else None
        for way in [w for w in bound if w != reference]:
            try:
                found = bound[way].outputs()
            except Exception as error:
                notes[way] = _failure(error)
                del bound[way]
                continue
            if expected is None:
                continue
            errors[way] = rivals.output_error(found, expected, self.subject.least)
            if not errors[way] <= _tolerance(expected):
                notes[way] = f"wrong: relative error {errors[way]:.2g}"
                del bound[way]
        if reference not in self.against:
            bound.pop(reference, None)
        if OURS in bound:
            bound[_CONTROL] = self._bind(_CONTROL, batch)
        times = race({w: b.call for w, b in bound.items()}, rounds=rounds, budget_s=seconds)
        ms = {way: times.median(way) for way in bound if way != _CONTROL}
        others = times.without(OURS, _CONTROL)
        if OURS not in ms or not others.samples:
            return Row(batch, ms, notes, errors)
        fastest = others.fastest()
        noise = abs(times.ratio(_CONTROL, OURS) - 1)
        return Row(batch, ms, notes, errors, fastest, times.ratio(fastest, OURS), noise, times.rounds(OURS))

    def _bind(self, way: str, batch: int | None) -> Bound:
        """A way at one batch size. Raises what it fails with, or its note as TNCompileError."""
        if way in self._given_up:
            raise TNCompileError(self._given_up[way])
        if way in (EAGER, COMPILE):
            bound = rivals.bind_module(self._module(way), self.subject.inputs(batch), self.device)
            limit = self.limits.build_s if way == COMPILE else self.limits.first_call_s
            try:
                with rivals.quiet(), rivals.time_limit(limit):
                    bound.call()  # torch.compile does its work now
            except TimeoutError as error:  # what takes too long at one batch size does at a larger one
                self._given_up[way] = str(error)
                raise
            return bound
        if way != _CONTROL:
            if self.built[way].note:
                raise TNCompileError(self.built[way].note)
            tried = self._admitted(way, batch)
            if tried.ms is None:
                raise TNCompileError(tried.note)
        session = self._session(way)
        if self.device != "cpu" and way != _CONTROL:
            require_on_device(session, self.profile(way, batch), self.device)
        return rivals.bind_session(session, self._arrays(batch))

    def _module(self, way: str) -> Callable[..., Any]:
        if way not in self._modules:
            module = self.subject.module
            if module is None:
                raise NotApplicable(rivals.NO_PYTORCH)
            self._modules[way] = torch.compile(module) if way == COMPILE else module
        return self._modules[way]


def _size(path: Path) -> int:
    """Bytes of a model and of the weights beside it."""
    data = data_path(path)
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _failure(error: Exception) -> str:
    """``> 20 s`` and the like as they are, anything else as the first line of what was raised."""
    told = isinstance(error, TNCompileError) and str(error).startswith((">", "fails"))
    if told or isinstance(error, (TimeoutError, NotApplicable)):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"fails: {first[:200]}"


def _tolerance(outputs: Sequence[Array]) -> float:
    return max((TOLERANCE.get(str(a.dtype), 0.0) for a in outputs), default=0.0)
