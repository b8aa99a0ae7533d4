"""A model made smaller and faster within a budget: the one place that joins what tensorizing is made of."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from tncompile import __version__
from tncompile.compiler import naming
from tncompile.emit.file import adopt
from tncompile.errors import OutputError, TNCompileError, UnsupportedError
from tncompile.frontend.load import LoadOptions, load
from tncompile.frontend.model import LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.trace import trace
from tncompile.runtime import rivals
from tncompile.runtime.files import check_writable, write_file
from tncompile.runtime.probe import Limits, probe
from tncompile.runtime.quantize import BITS, whole
from tncompile.runtime.session import Session
from tncompile.runtime.settle import write_rival
from tncompile.tensorizer.budget import FORMATS, Budget, kind_of
from tncompile.tensorizer.fit import FIRST, Fitted, fit
from tncompile.tensorizer.heal import heal
from tncompile.tensorizer.judge import Found, Judge
from tncompile.tensorizer.measure import Measured, times
from tncompile.tensorizer.options import rounded
from tncompile.tensorizer.prepare import Prepared, prepare
from tncompile.tensorizer.realize import Realized, realize, replacements, substituted
from tncompile.tensorizer.refit import refit
from tncompile.tensorizer.report import TensorizeReport, WeightSummary, verdict
from tncompile.tensorizer.saved import fingerprint, load_plan, save_plan
from tncompile.tensorizer.search import Plan, Sites, choose
from tncompile.tensorizer.ways import fronts
from tncompile.training import to_torch

OURS, DENSE = "tensorized", "dense, fp32"

CORRECTIONS, SMALLER = 3, 0.7
"""How many plans are made until a file is within the budget, and the share of the error that each next one is for."""

HEALED = (3.0, 1.7)
"""Times the error that fits by evaluation, that healing is tried on first."""

MARGIN = 0.02
"""By how much a tensorized model must be better than one that is only quantized: less is noise."""

EXPORT = 120.0
"""Seconds that torch's exporter may take."""

REFIT = 120.0
"""Seconds for correcting each layer for the errors before it."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Healing:
    """How many seconds to train the cores for, part by part, then, where `end_to_end`, all together; and where that is
    kept."""

    seconds: float | None = None
    end_to_end: bool = False
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Tensorized:
    """A tensorized model: the ONNX file that won, the model with its cores, and the report."""

    onnx: bytes = field(repr=False)
    student: LoadedModel = field(repr=False)
    report: TensorizeReport

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ONNX file (``.onnx``) or the model with its cores as an exported program (``.pt``, ``.pt2``).

        Whole or not at all; OutputError where that cannot be done.
        """
        check_writable(path)
        if kind_of(path) == "onnx":
            write_file(path, self.onnx)
            return
        if isinstance(self.student, OnnxModel):
            raise OutputError(f"{os.fspath(path)}: the model came in as ONNX, and so it can only be written as .onnx")
        buffer = io.BytesIO()
        torch.export.save(self.student, buffer)
        write_file(path, buffer.getvalue())

    def to_torch(self, **options: Any) -> torch.nn.Module:
        """The model with its cores as parameters, to be trained further; options as in `tncompile.to_torch`."""
        return to_torch(self.student, **options)


def tensorize(
    module: torch.nn.Module,
    calibration: Any = None,
    *,
    example_inputs: Any = None,
    max_error: float | None = None,
    metric: Any = None,
    max_drop: float | None = None,
    max_size: float | None = None,
    min_speedup: float | None = None,
    prefer: Any = "both",
    dynamic_shapes: Any = "batch",
    **options: Any,
) -> Tensorized:
    """Make a module smaller and faster within a budget (see `Budget`); call ``.eval()`` first.

    `calibration`: inputs of the kind the model will see: a tensor or array (first axis: samples), a tuple of them or a
    dict by input name, or an iterable of such batches, as a DataLoader without labels is one. The module is traced on
    `example_inputs`, by default on the first of these. Further `options` as in `tensorize_model`.
    """
    budget = Budget(max_error, metric, max_drop, max_size, min_speedup, prefer)
    if example_inputs is None and calibration is None:
        raise TNCompileError("a module needs calibration data, or example_inputs to be traced on")
    args, kwargs = _example(calibration if example_inputs is None else example_inputs)
    exported = trace(module, args, kwargs, dynamic_shapes)
    return tensorize_model(exported, calibration, budget, model=type(module).__name__, **options)


def tensorize_file(
    path: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None,
    budget: Budget,
    loading: LoadOptions | None = None,
    **options: Any,
) -> Tensorized:
    """Make the model in a file smaller and faster; options as in `tensorize_model`."""
    loaded = load(path, loading)
    with naming(path):
        return tensorize_model(loaded, calibration, budget, model=str(path), **options)


def tensorize_model(
    loaded: LoadedModel,
    calibration: Any,
    budget: Budget,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    bits: Sequence[str] = BITS,
    healing: Healing = Healing(),
    model: str = "",
    progress: Progress = lambda message: None,
    **compiling: Any,
) -> Tensorized:
    """Make a model smaller and faster within a budget.

    `calibration`: data as in `tensorize`, the path of a file or folder of it, or None. `formats` and `bits` are what
    weights may become; ``("fp32",)`` gives a model to train further. Further options as in `compile_exported`. Raises
    TNCompileError where nothing is within the budget.
    """
    if isinstance(loaded, OnnxModel) and healing.seconds:
        raise UnsupportedError("a model that came in as ONNX cannot be trained, and so not be healed")
    if calibration is None and healing.seconds:
        raise TNCompileError("healing needs calibration data (--calibrate)")
    return _Search(loaded, calibration, budget, formats, bits, healing, model, progress, compiling).run()


def _example(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first of some calibration data as arguments to trace a module on."""
    if not isinstance(data, (torch.Tensor, tuple, dict)) and not hasattr(data, "__array__"):
        data = next(iter(data))
    if isinstance(data, dict):
        return (), {name: torch.as_tensor(value) for name, value in data.items()}
    return tuple(torch.as_tensor(value) for value in (data if isinstance(data, (tuple, list)) else (data,))), {}


class _Search:
    """One search; holds what is known so far."""

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Any,
        budget: Budget,
        formats: Sequence[str],
        bits: Sequence[str],
        healing: Healing,
        model: str,
        progress: Progress,
        compiling: Mapping[str, Any],
    ) -> None:
        self.budget, self.formats, self.bits, self.healing = budget, tuple(formats), tuple(bits), healing
        self.loaded, self.calibration, self.model = loaded, calibration, model
        self.progress, self.compiling = progress, {**compiling, "compact": budget.prefer != "speed"}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.last = time.perf_counter()
        self.known: dict[str, Found] = {}
        self.overhead = 0.0  # bytes of a file that are no weights

    def run(self) -> Tensorized:
        """All stages in order."""
        made = prepare(self.loaded, self.calibration, self.formats, self.compiling, self.progress)
        self.notes += made.notes
        self._took("prepare")
        dense = realize(self.loaded, Plan(()), (), self.compiling)
        files = {DENSE: dense.data, **self._whole(made, dense.data, BITS[1:]), **self._exported(made)}
        judge = Judge(self.budget, made.runner, made.held, made.inputs)
        self._took("without formats")
        measured = self._measured(made, judge, files)
        self._took("measure")
        sites = fronts(made, self.bits, measured[DENSE].ms, self.progress)
        self._took("ways")
        found = self._fitted(made, judge, sites, measured[DENSE])
        ours = self._tensorized(made, judge, sites, found, measured[DENSE])
        if ours is not None:
            realized = ours[0]
            files[OURS] = realized.data
            measured = self._measured(made, judge, files)
            self.notes += realized.notes
        self._took("measure")
        chosen = self._chosen(judge, measured)
        student = ours[0].student if ours is not None else self.loaded
        report = self._report(made, sites, ours[1] if ours is not None else Plan(()), measured, chosen)
        return Tensorized(files[chosen], student, report)

    # ------------------------------------------------------------------------------ stages

    def _whole(self, made: Prepared, dense: bytes, ways: Sequence[str], suffix: str = "") -> dict[str, bytes]:
        """A dense file in fewer bits throughout."""
        found: dict[str, bytes] = {}
        for bits in ways:
            if bits in self.bits and (bits != "int8-static" or made.train):
                self.progress(f"quantizing the dense model to {bits}{suffix}")
                try:
                    found[f"{bits}{suffix}"] = whole(dense, bits, made.train)
                except TNCompileError as error:
                    self.notes.append(f"{bits} throughout{suffix}: {error}")
        return found

    def _exported(self, made: Prepared) -> dict[str, bytes]:
        """What torch's exporter makes of the dense model, or the ONNX file as it came in, and that in eight bits."""
        try:
            with tempfile.TemporaryDirectory() as folder, rivals.time_limit(EXPORT):
                path = Path(folder) / "model.onnx"
                write_rival(made.traced, path)
                tried = probe(path, max(made.feeds.items())[1], Limits())
                plain = adopt(path.read_bytes(), made.traced).data
        except Exception as error:  # an exporter raises whatever it likes
            self.notes.append(f"torch's exporter fails on the model ({str(error).splitlines()[0][:100]})")
            return {}
        if tried.ms is None:
            self.notes.append(f"what torch's exporter makes of the model takes too much: {tried.note}")
            return {}
        suffix = ", as it came" if isinstance(self.loaded, OnnxModel) else ", exported by torch"
        return {f"fp32{suffix}": plain, **self._whole(made, plain, ("int8", "int8-static"), suffix)}

    def _measured(self, made: Prepared, judge: Judge, files: Mapping[str, bytes]) -> dict[str, Measured]:
        """All files beside each other; what is known of one is not measured again, but for its time."""
        sessions = {name: Session(data) for name, data in files.items()}
        self.progress("timing " + ", ".join(files))
        ms = times(sessions, made.feeds)
        found = {}
        for name, session in sessions.items():
            if name not in self.known:
                self.progress(f"evaluating {name}")
                self.known[name] = self._judged(judge, session)
            like = self.known[name]
            found[name] = Measured(name, len(files[name]), ms[name], like.error, like.metric, like.drop)
        return found

    def _judged(self, judge: Judge, session: Session) -> Found:
        return judge(lambda feeds: session.run(session.feeds(feeds)))

    def _fitted(self, made: Prepared, judge: Judge, sites: Sites, dense: Measured) -> Fitted | None:
        """The plan for the largest error that an evaluation of its weights accepts."""

        def evaluate(plan: Plan) -> Found:
            if not judge.measures:
                return Found(plan.error)  # that of the weights, which is all there is
            weights = {name: array for option in plan.options for name, array in rounded(option).items()}
            return judge(lambda feeds: made.runner.run(feeds, weights).outputs)

        if self.budget.bounds_error:
            return fit(judge, lambda limit: self._plan(made, sites, dense, limit), evaluate, self.progress)
        plan = self._plan(made, sites, dense, None)
        return None if plan is None else Fitted(plan, plan.error, evaluate(plan))

    def _plan(self, made: Prepared, sites: Sites, dense: Measured, limit: float | None) -> Plan | None:
        budget = self.budget
        return choose(
            sites,
            budget.prefer,
            max_error=None if limit is None else limit / made.additivity,
            max_seconds=None if budget.min_speedup is None else dense.mean_ms / 1e3 / budget.min_speedup,
            max_size=None if (size := self._max_size(dense)) is None else size - self.overhead,
        )

    def _max_size(self, dense: Measured) -> float | None:
        size = self.budget.max_size
        return size * dense.size if size is not None and size < 1 else size

    def _tensorized(
        self, made: Prepared, judge: Judge, sites: Sites, found: Fitted | None, dense: Measured
    ) -> tuple[Realized, Plan] | None:
        """The file of the first plan whose file is within the budget, and that plan as it became."""
        tried: list[tuple[str, ...]] = []
        for number, limit in enumerate(self._limits(found)):
            plan = self._plan(made, sites, dense, limit)
            if plan is None or all(option.label == DENSE for option in plan.options):
                continue
            labels = tuple(option.label for option in plan.options)
            if labels in tried:
                continue
            tried.append(labels)
            self.progress(f"making plan {len(tried)}: expected error {plan.error:.2g}")
            plan, student = self._improved(made, plan, number)
            self._took("improve")
            realized = realize(student, plan, made.train, self.compiling)
            self._took("compile")
            like = self._judged(judge, Session(realized.data))
            self._took("measure")
            most = self._max_size(dense)
            over = 0.0 if most is None else len(realized.data) - most
            if judge.accepts(like) and over <= 0:
                self.known[OURS] = like
                return realized, plan
            self.overhead += 1.05 * max(over, 0.0)
        if tried:
            self.notes.append(f"none of {len(tried)} plans with other formats or mixed bits was within the budget")
        return None

    def _limits(self, found: Fitted | None) -> Iterator[float | None]:
        """Errors to plan for, one after the other: what healing may bring within the budget, what fits by evaluation,
        and less."""
        if not self.budget.bounds_error:
            yield from [None] * CORRECTIONS
            return
        base = FIRST if found is None else found.limit
        for factor in (*(HEALED if self.healing.seconds else ()), *(SMALLER**k for k in range(CORRECTIONS))):
            yield base * factor

    def _improved(self, made: Prepared, plan: Plan, number: int) -> tuple[Plan, LoadedModel]:
        """The plan with cores that know of the errors upstream, and the model with them, healed where asked."""
        kept = self.healing.checkpoint
        mark = fingerprint(made.sites, f"{self.budget} {self.healing.seconds} {self.healing.end_to_end} {number}")
        saved = None if kept is None else kept.with_name(f"{kept.name}.{number}.plan")
        before = None if saved is None else load_plan(saved, (*made.sites, *made.joint), mark)
        if before is not None:
            self.notes.append(f"resumed from {saved}")
        plan = before or self._corrected(made, plan)
        if saved is not None and before is None and self.healing.seconds:
            save_plan(saved, plan, mark)
        student = substituted(self.loaded, replacements(plan))
        if not replacements(plan) or not self.healing.seconds:
            return plan, student
        healed = heal(
            cast("torch.export.ExportedProgram", student),
            cast("torch.export.ExportedProgram", self.loaded),
            made.train,
            held_out=None if made.held is None else [*made.held],
            seconds=self.healing.seconds / (len(HEALED) + 1 if self.budget.bounds_error else 1),
            end_to_end=self.healing.end_to_end,
            checkpoint=None if kept is None else kept.with_name(f"{kept.name}.{number}"),
            progress=lambda message: self.progress(f"healing: {message}"),
        )
        self.notes += [f"healed: output error {healed.before:.2g} -> {healed.after:.2g}", *healed.notes]
        return plan, healed.exported

    def _corrected(self, made: Prepared, plan: Plan) -> Plan:
        cores = replacements(plan)
        if not cores or made.data is None or made.held is None:
            return plan
        self.progress("correcting each layer for the errors before it")
        better = refit(cores, made.runner, made.data, made.held, REFIT, biases=False)
        self.notes += better.notes
        new = {id(old): one for old, one in zip(cores, better.replacements, strict=True)}
        return Plan(tuple(replace(o, replacement=new.get(id(o.replacement))) for o in plan.options))

    # ------------------------------------------------------------------------------ the end

    def _chosen(self, judge: Judge, measured: Mapping[str, Measured]) -> str:
        """The best way within the budget. TNCompileError where there is none."""
        dense, most = measured[DENSE], self._max_size(measured[DENSE])
        within = [
            way
            for name, way in measured.items()
            if judge.accepts(self.known[name])
            and (most is None or way.size <= most)
            and (self.budget.min_speedup is None or dense.mean_ms >= self.budget.min_speedup * way.mean_ms)
        ]
        if not within:
            raise TNCompileError(self._nothing(measured))
        if not self.budget.bounds_error:
            return min(within, key=lambda way: way.error or 0.0).name
        return min(within, key=lambda way: self._value(way) * (1.0 if way.name == OURS else 1 - MARGIN)).name

    def _value(self, way: Measured) -> float:
        exponents = {"both": (1.0, 1.0), "speed": (1.0, 0.02), "size": (0.02, 1.0)}[self.budget.prefer]
        return float(way.mean_ms ** exponents[0] * way.size ** exponents[1])

    def _nothing(self, measured: Mapping[str, Measured]) -> str:
        told = []
        for way in measured.values():
            numbers = [f"{way.size / 1e6:.3g} MB", f"{measured[DENSE].mean_ms / way.mean_ms:.2f} times as fast"]
            numbers += [f"error {way.error:.2g}"] * (way.error is not None)
            numbers += [f"drop {way.drop:.3g}"] * (way.drop is not None)
            told.append(f"{way.name} ({', '.join(numbers)})")
        return f"nothing is within the budget ({self.budget}): there is {'; '.join(told)}"

    def _report(
        self, made: Prepared, sites: Sites, plan: Plan, measured: Mapping[str, Measured], chosen: str
    ) -> TensorizeReport:
        fronts = {options[0].site.name: options for options in (*sites.alone, *sites.joint)}
        weights = []
        for option in plan.options:
            first = min((o for o in fronts[option.site.name] if o.error == 0), key=lambda o: o.seconds, default=option)
            matrix = option.site.matrix.shape
            weights.append(
                WeightSummary(
                    option.site.name,
                    (int(matrix[0]), int(matrix[1])),
                    option.label,
                    option.error,
                    (first.seconds, option.seconds),
                    (first.size, option.size),
                    len(fronts[option.site.name]),
                )
            )
        quantized = [way for name, way in measured.items() if name not in (OURS, DENSE)]
        return TensorizeReport(
            self.model,
            str(self.budget),
            made.described,
            tuple(measured.values()),
            chosen,
            verdict(measured[chosen], measured[DENSE], quantized),
            tuple(weights),
            tuple(self.notes),
            self.seconds,
            __version__,
        )

    def _took(self, stage: str) -> None:
        """Note the time since the last call."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
