"""One search: all ways are made and measured, plans are tried until a file is within the budget, the best is chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from tncompile import __version__
from tncompile.compiler import Progress
from tncompile.errors import CheckError, LoadError, TNCompileError, UnsupportedError
from tncompile.frontend.model import LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.runtime.quantize import BITS
from tncompile.runtime.session import Session
from tncompile.tensorizer.budget import Budget
from tncompile.tensorizer.fit import FIRST, Fitted, fit
from tncompile.tensorizer.heal import heal
from tncompile.tensorizer.judge import Found, Judge
from tncompile.tensorizer.measure import Measured, times
from tncompile.tensorizer.options import rounded
from tncompile.tensorizer.plain import exported, in_fewer_bits, weight_error
from tncompile.tensorizer.prepare import Prepared, prepare
from tncompile.tensorizer.realize import Realized, realize, replacements, substituted
from tncompile.tensorizer.refit import refit
from tncompile.tensorizer.report import TensorizeReport, WeightSummary, verdict
from tncompile.tensorizer.saved import fingerprint, load_plan, save_plan
from tncompile.tensorizer.search import Plan, Sites, choose
from tncompile.tensorizer.ways import fronts

OURS, MIXED, DENSE = "tensorized", "mixed bits", "dense, fp32"
"""What a search makes, with tensor formats in it or without any; and the dense file."""

CORRECTIONS, SMALLER = 3, 0.7
"""How many plans are made until a file is within the budget, and the share of the error that each next one is for."""

HEALED = (3.0, 1.7)
"""Times the error that fits by evaluation, that healing is tried on first."""

SLOWER = 0.85
"""The share of the time that the next plan is for where a file was too slow."""

MARGIN = 0.02
"""By how much a tensorized model must be better than one that is only quantized: less is noise."""

REFIT = 120.0
"""Seconds for correcting each layer for the errors before it."""

LARGEST = 1_500_000_000
"""Bytes of weights above which a file is in two parts, which quantization does not take."""


@dataclass(frozen=True)
class Healing:
    """How many seconds to train the cores for, part by part, then, where `end_to_end`, all together; and where that is
    kept."""

    seconds: float | None = None
    end_to_end: bool = False
    checkpoint: Path | None = None


NO_HEALING = Healing()


@dataclass(frozen=True)
class Won:
    """What a search ends with: the file, the model that it was compiled from, the bits that it keeps weights in, the
    report, and what healing left to resume from."""

    onnx: bytes = field(repr=False)
    model: LoadedModel = field(repr=False)
    bits: tuple[str, ...]
    report: TensorizeReport
    temporary: tuple[Path, ...] = ()


class Search:
    """One search for the best way to keep a model within a budget; holds what is known so far."""

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Any,
        budget: Budget,
        formats: Sequence[str],
        bits: Sequence[str],
        healing: Healing,
        threads: int,
        model: str,
        progress: Progress,
        compiling: Mapping[str, Any],
    ) -> None:
        self.budget, self.healing, self.threads = budget, healing, threads
        self.formats = tuple(formats)
        self.bits = tuple(b for b in BITS if b in bits)
        self.loaded, self.calibration, self.model, self.progress = loaded, calibration, model, progress
        compact = budget.prefer != "speed" or budget.max_size is not None
        # whole batches throughout: what quantizes reads no micro-batches
        self.compiling = {**compiling, "compact": compact, "threads": threads, "micro_batch": False}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.temporary: list[Path] = []
        self.known: dict[str, Found] = {}
        self.overhead, self.slower = 0.0, 1.0  # bytes of a file that are no weights; what too slow a file has taught
        self.left = healing.seconds or 0.0
        self.last = time.perf_counter()

    def run(self) -> Won:
        """All stages in order."""
        if _size(self.loaded) > LARGEST:
            raise UnsupportedError(f"models of over {LARGEST / 1e9:g} GB cannot be tensorized yet")
        made = prepare(self.loaded, self.calibration, self.formats, self.compiling, self.progress)
        self.notes += made.notes
        self._took("prepare")
        dense = realize(self.loaded, Plan(()), (), self.compiling)
        files = {DENSE: dense.data}
        if {*self.bits} - {"fp32"}:
            for found, notes in (
                in_fewer_bits(made, dense.data, self.bits, "", self.progress),
                exported(made, self.bits, self.progress),
            ):
                files |= found
                self.notes += notes
        judge = Judge(self.budget, made.runner, made.held, made.inputs)
        self._took("without formats")
        measured = self._measured(made, judge, files)
        self._took("measure")
        sites = fronts(made, self.bits, measured[DENSE].ms, self.progress, self.threads)
        self._took("ways")
        ours = self._tensorized(made, judge, sites, self._fitted(made, judge, sites, measured[DENSE]), measured[DENSE])
        name = OURS
        if ours is not None:
            realized, plan = ours
            name = OURS if replacements(plan) else MIXED
            self.known[name] = self.known.pop(OURS)
            files[name] = realized.data
            measured = self._measured(made, judge, files)
            self.notes += realized.notes
        self._took("measure")
        chosen = self._chosen(judge, measured)
        report = self._report(made, sites, Plan(()) if ours is None else ours[1], judge, measured, chosen)
        won = ours if chosen == name else None
        student = self.loaded if won is None else won[0].student
        bits = tuple(dict.fromkeys(o.bits for o in won[1].options)) if won is not None else (chosen.partition(",")[0],)
        return Won(files[chosen], student, ("fp32",) if chosen == DENSE else bits, report, tuple(self.temporary))

    # ------------------------------------------------------------------------------ stages

    def _measured(self, made: Prepared, judge: Judge, files: Mapping[str, bytes]) -> dict[str, Measured]:
        """All files beside each other; what is known of one is not measured again, but for its time."""
        sessions = {name: Session(data, threads=self.threads) for name, data in files.items()}
        self.progress("timing " + ", ".join(files))
        ms = times(sessions, made.feeds)
        found = {}
        for name, session in sessions.items():
            if name not in self.known:
                self.progress(f"evaluating {name}")
                bits = "fp32" if name == DENSE else name.partition(",")[0]
                weights = weight_error(made, bits) if made.held is None else 0.0  # not looked at beside measured ones
                self.known[name] = self._judged(judge, session, weights)
            like = self.known[name]
            found[name] = Measured(name, len(files[name]), ms[name], like.error, like.metric, like.drop)
        return found

    def _judged(self, judge: Judge, session: Session, weights: float) -> Found:
        return judge(lambda feeds: session.run(session.feeds(feeds)), weights)

    def _fitted(self, made: Prepared, judge: Judge, sites: Sites, dense: Measured) -> Fitted | None:
        """The plan for the largest error that an evaluation of its weights accepts; None where none is bounded."""
        if not self.budget.bounds_error:
            return None

        def evaluate(plan: Plan) -> Found:
            weights = {name: array for option in plan.options for name, array in rounded(option).items()}
            return judge(lambda feeds: made.runner.run(feeds, weights).outputs, plan.error)

        return fit(judge, lambda limit: self._plan(made, sites, dense, limit), evaluate, self.progress)

    def _plan(self, made: Prepared, sites: Sites, dense: Measured, limit: float | None) -> Plan | None:
        budget, size = self.budget, self._max_size(dense)
        seconds = None if budget.min_speedup is None else dense.mean_ms / 1e3 / budget.min_speedup
        return choose(
            sites,
            budget.prefer,
            max_error=None if limit is None else limit / made.additivity,
            max_seconds=None if seconds is None else seconds * self.slower,
            max_size=None if size is None else size - self.overhead,
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
            plan = self._resumed(made, number) or self._plan(made, sites, dense, limit)
            if plan is None or all(option.label == DENSE for option in plan.options):
                continue
            labels = tuple(option.label for option in plan.options)
            if labels in tried:
                continue
            tried.append(labels)
            self.progress(f"making plan {len(tried)}: expected error {plan.error:.2g}")
            try:
                plan, student = self._improved(made, plan, number)
                self._took("improve")
                realized = realize(student, plan, made.train, self.compiling, self.bits)
                self._took("compile")
                session = Session(realized.data, threads=self.threads)
                like = self._judged(judge, session, plan.error)
            except (CheckError, LoadError, UnsupportedError) as error:
                self.notes.append(f"plan {len(tried)}: {error}")
                continue
            self._took("measure")
            if judge.accepts(like) and self._is_small(realized, dense) and self._is_fast(made, session, dense):
                self.known[OURS] = like
                return realized, plan
        if tried:
            self.notes.append(f"none of {len(tried)} plans with other formats or mixed bits was within the budget")
        return None

    def _is_small(self, realized: Realized, dense: Measured) -> bool:
        most = self._max_size(dense)
        over = 0.0 if most is None else len(realized.data) - most
        self.overhead += 1.05 * max(over, 0.0)
        return over <= 0

    def _is_fast(self, made: Prepared, session: Session, dense: Measured) -> bool:
        if self.budget.min_speedup is None:
            return True
        found = Measured(OURS, ms=times({OURS: session}, made.feeds)[OURS])
        fast = dense.mean_ms >= self.budget.min_speedup * found.mean_ms
        self.slower *= 1.0 if fast else SLOWER
        return fast

    def _limits(self, found: Fitted | None) -> Iterator[float | None]:
        """Errors to plan for, one after the other: what healing may bring within the budget, what fits by evaluation,
        and less."""
        if not self.budget.bounds_error:
            yield from [None] * CORRECTIONS
            return
        base = min(FIRST, self.budget.max_error or FIRST) if found is None else found.limit
        for factor in (*(HEALED if self.healing.seconds else ()), *(SMALLER**k for k in range(CORRECTIONS))):
            yield base * factor

    def _improved(self, made: Prepared, plan: Plan, number: int) -> tuple[Plan, LoadedModel]:
        """The plan with cores that know of the errors upstream, and the model with them, healed while there is time."""
        saved = self._saved(number)
        if saved is None or not saved.exists():
            plan = self._corrected(made, plan)
        student = substituted(self.loaded, replacements(plan))
        if not replacements(plan) or self.left < 1:
            return plan, student
        if saved is not None:
            save_plan(saved, plan, self._mark(made, number))
            self.temporary += [saved, saved.with_suffix("")]
        healed = heal(
            cast("torch.export.ExportedProgram", student),
            cast("torch.export.ExportedProgram", self.loaded),
            made.train,
            held_out=None if made.held is None else [*made.held],
            seconds=self.left / max(1, len(HEALED) + 1 - number),
            end_to_end=self.healing.end_to_end,
            checkpoint=None if saved is None else saved.with_suffix(""),
            progress=lambda message: self.progress(f"healing: {message}"),
        )
        self.left -= healed.seconds
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

    # ------------------------------------------------------------------------------ healing that was killed

    def _saved(self, number: int) -> Path | None:
        kept = self.healing.checkpoint
        return None if kept is None or not self.healing.seconds else kept.with_name(f"{kept.name}.{number}.plan")

    def _mark(self, made: Prepared, number: int) -> str:
        metric = getattr(self.budget.metric, "__qualname__", "")
        asked = (self.budget, metric, self.healing.seconds, self.healing.end_to_end, self.formats, self.bits, number)
        return fingerprint(made.sites, f"{made.described} {asked[1:]} {self.budget}")

    def _resumed(self, made: Prepared, number: int) -> Plan | None:
        """The plan whose healing was interrupted."""
        saved = self._saved(number)
        plan = None if saved is None else load_plan(saved, (*made.sites, *made.joint), self._mark(made, number))
        if plan is not None:
            self.notes.append(f"resumed from {saved}")
        return plan

    # ------------------------------------------------------------------------------ the end

    def _chosen(self, judge: Judge, measured: Mapping[str, Measured]) -> str:
        """The best way within the budget. TNCompileError where there is none."""
        within = self._within(judge, measured)
        if not within:
            raise TNCompileError(self._nothing(measured))
        if not self.budget.bounds_error:
            return min(within, key=lambda way: (way.error or 0.0, way.mean_ms * way.size)).name
        return min(within, key=lambda way: self._value(way) * (1.0 if way.name == OURS else 1 - MARGIN)).name

    def _within(self, judge: Judge, measured: Mapping[str, Measured]) -> list[Measured]:
        dense, most = measured[DENSE], self._max_size(measured[DENSE])
        return [
            way
            for name, way in measured.items()
            if judge.accepts(self.known[name])
            and (most is None or way.size <= most)
            and (self.budget.min_speedup is None or dense.mean_ms >= self.budget.min_speedup * way.mean_ms)
        ]

    def _value(self, way: Measured) -> float:
        exponents = {"both": (1.0, 1.0), "speed": (1.0, 0.02), "size": (0.02, 1.0)}[self.budget.prefer]
        return float(way.mean_ms ** exponents[0] * way.size ** exponents[1])

    def _nothing(self, measured: Mapping[str, Measured]) -> str:
        told = []
        for way in measured.values():
            numbers = [f"{way.size / 1e6:.3g} MB", f"{measured[DENSE].mean_ms / way.mean_ms:.2f} times as fast"]
            numbers += [] if way.error is None else [f"error {way.error:.2g}"]
            numbers += [] if way.drop is None else [f"drop {way.drop:.3g}"]
            told.append(f"{way.name} ({', '.join(numbers)})")
        tried = f"; {'; '.join(self.notes)}" if self.notes else ""
        return f"nothing is within the budget ({self.budget}): there is {'; '.join(told)}{tried}"

    def _report(
        self, made: Prepared, sites: Sites, plan: Plan, judge: Judge, measured: Mapping[str, Measured], chosen: str
    ) -> TensorizeReport:
        ways = {options[0].site.name: options for options in (*sites.alone, *sites.joint)}
        weights = []
        for option in plan.options:
            parts = option.site.parts  # of which each has ways of its own
            exact = [[o.seconds for o in ways.get(part.name, ()) if o.error == 0] for part in parts]
            before = sum(min(seconds) for seconds in exact) if all(exact) else option.seconds
            rows, columns = option.site.matrix.shape
            weights.append(
                WeightSummary(
                    option.site.name,
                    (int(rows), int(columns)),
                    option.label,
                    option.error,
                    (before, option.seconds),
                    (sum(part.array.nbytes for part in parts), option.size),
                    len(ways[option.site.name]),
                )
            )
        others = [way for way in self._within(judge, measured) if way.name != OURS]
        return TensorizeReport(
            self.model,
            str(self.budget),
            made.described,
            tuple(measured.values()),
            chosen,
            verdict(measured[chosen], measured[DENSE], others, chosen == OURS),
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


def _size(model: LoadedModel) -> int:
    """Bytes of a model's weights."""
    if isinstance(model, OnnxModel):
        return sum(array.nbytes for array in model.program.arrays.values())
    return sum(tensor.nbytes for tensor in model.state_dict.values())
