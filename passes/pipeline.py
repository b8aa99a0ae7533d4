"""The pipeline: one visible list of passes, verified around each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from tncompile.errors import TNCompileError, VerificationError
from tncompile.ir import Program, Stage, verify
from tncompile.passes.base import Context, Pass, PassReport
from tncompile.passes.blocks import Blocks
from tncompile.passes.clean import Clean
from tncompile.passes.dense import Dense
from tncompile.passes.fold import Fold
from tncompile.passes.gathers import Gathers
from tncompile.passes.images import images
from tncompile.passes.join import Join
from tncompile.passes.layout import Layout
from tncompile.passes.limit import Limit
from tncompile.passes.merge_cores import MergeCores
from tncompile.passes.order import Order
from tncompile.passes.stacks import Stacks
from tncompile.passes.steps import Steps
from tncompile.passes.tables import Tables
from tncompile.passes.trim import Trim

DEFAULT: tuple[Pass, ...] = (
    Clean(),  # size-1 bonds and copies would hide which cores are adjacent, or which slices belong together
    Stacks(),  # what is taken apart and stacked again would part networks
    Gathers(),  # while tables are networks yet: fold computes what depends on weights alone
    Fold(),  # before any core is merged: across layers there is more to merge
    Clean(),  # duplicates that composition made visible
    Trim(),  # of whole layers: what is picked may lie beyond several products
    Fold(),  # what had picks between it
    Steps(),  # of whole layers: before, their parts are networks of their own
    Join(),  # before cores of one of many equal networks are merged, and of another not
    Stacks(),  # what was joined may be put together again
    Fold(),  # and may have nothing between it now
    Clean(),  # selections that nothing reads any more
    MergeCores(),  # leaves a smaller network to search
    Tables(),  # after what needs no search, as it weighs what is left
    Blocks(),  # merged bonds are gone
    Clean(),  # gathers that nothing reads any more
    Order(),  # its schedules fit the networks as they now are: only what knows of them may follow
    Layout(),  # moves the boundaries that those schedules took as given
)

_EVERY = (Clean, Stacks, Gathers, Trim, Fold, Join, Steps, MergeCores, Tables, Blocks, Dense, Order, Layout, Limit)
PASSES: dict[str, type[Pass]] = {p.name(): p for p in _EVERY}

_SCHEDULED = (Layout, Limit)  # passes over a scheduled program


@dataclass(frozen=True)
class Pipeline:
    """Runs passes in order; where `scheduled`, `Order` too if no pass before it is to follow: nothing can be emitted
    without.

    `Layout`, where it is named, and then `Limit`, where it is named or the context has a limit of memory, come last:
    they need those schedules.
    """

    passes: Sequence[Pass] = DEFAULT
    scheduled: bool = True

    def run(
        self, program: Program, context: Context, progress: Callable[[str, Program], None] = lambda name, program: None
    ) -> tuple[Program, tuple[PassReport, ...]]:
        """The final program and a report for each pass. `progress` sees each pass's name and result."""
        verify(program, "traced")
        reports = []
        passes = list(self.passes)
        if self.scheduled:
            layouts = [p for p in passes if isinstance(p, Layout)]
            limits = [p for p in passes if isinstance(p, Limit)] or [Limit()] * (context.max_memory is not None)
            passes = [p for p in passes if not isinstance(p, _SCHEDULED)]
            passes += [Order()] * (not (passes and isinstance(passes[-1], Order)))
            passes += [*layouts, *limits]
        stage: Stage = "traced"
        for step in passes:
            start = time.perf_counter()
            program, changes = step.run(program, replace(context, images=images(program)))
            if not isinstance(step, _SCHEDULED):
                stage = "scheduled" if isinstance(step, Order) else "traced"
            try:
                verify(program, stage)
            except VerificationError as error:
                raise VerificationError(f"the pass {step.name()} left a broken program: {error}") from error
            reports.append(PassReport(step.name(), tuple(changes), time.perf_counter() - start))
            progress(step.name(), program)
        return program, tuple(reports)


def parse_passes(text: str) -> tuple[Pass, ...]:
    """``"clean,fold,order{max_trials=8}"`` -> passes.

    Raises TNCompileError for a name or an option that does not exist, and where a pass would undo the schedules.
    """
    passes: list[Pass] = []
    for item in re.findall(r"[^,{}\s]+(?:\{[^}]*\})?", text):
        name, _, options = item.partition("{")
        if name not in PASSES:
            raise TNCompileError(f"no pass {name!r}; the passes are {', '.join(PASSES)}")
        passes.append(_with_options(PASSES[name](), options.rstrip("}")))
    before = [p for p in passes if not isinstance(p, _SCHEDULED)]
    if any(isinstance(p, Order) for p in before[:-1]):
        raise TNCompileError(
            "order must be the last pass, but for layout and limit: its schedules fit the networks as they then are"
        )
    return tuple(passes)


def _with_options(default: Pass, text: str) -> Pass:
    types = {f.name: type(getattr(default, f.name)) for f in fields(default)}  # type: ignore[arg-type]
    values = {}
    for item in filter(None, re.split(r"[,;\s]+", text)):
        key, _, value = item.partition("=")
        if key not in types:
            raise TNCompileError(f"{default.name()} has no option {key!r}; it has {', '.join(types) or 'none'}")
        try:
            values[key] = _truth(value) if types[key] is bool else types[key](value)
        except ValueError:
            raise TNCompileError(f"{default.name()}: {key} takes {types[key].__name__}, not {value!r}") from None
    return replace(default, **values)  # type: ignore[type-var]


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"
