"""The one place that joins the stages: model -> program -> passes -> ONNX -> check."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tncompile import __version__
from tncompile.cost.devices import ChosenProfile, choose, cores
from tncompile.cost.profile import DeviceProfile
from tncompile.emit.file import Store, Written, adopt, write
from tncompile.emit.microbatch import in_micro_batches
from tncompile.errors import CheckError, LoadError, TNCompileError, UnsupportedError
from tncompile.frontend.files.exported import dump_exported
from tncompile.frontend.importer import import_exported
from tncompile.frontend.load import LoadOptions, load
from tncompile.frontend.mapped import release_pages
from tncompile.frontend.model import ImportedModel, LoadedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.trace import trace
from tncompile.inspect.summary import Report, summarize
from tncompile.ir import Array, Opaque, Program
from tncompile.passes import DEFAULT, Context, Pass, PassReport, Pipeline
from tncompile.passes.images import images
from tncompile.runtime.accuracy import CheckReport
from tncompile.runtime.check import check
from tncompile.runtime.device import DEVICES
from tncompile.runtime.files import check_writable, write_file
from tncompile.runtime.inputs import sizes_to_check
from tncompile.runtime.session import Session
from tncompile.runtime.settle import Settled, settle, whole_is_faster
from tncompile.runtime.stored import Stored
from tncompile.runtime.tuner import Tuner

DEFAULT_BATCH = (1, 32)
Progress = Callable[[str], None]


def _no_progress(message: str) -> None:
    pass


@dataclass(repr=False)
class CompiledModel:
    """A compiled model: the ONNX file, and everything that led to it.

    `stages` has the program as traced (``"traced"``) and after each pass, by the pass's name.
    """

    stored: Stored
    program: Program
    report: Report
    traced: ImportedModel
    stages: Mapping[str, Program]
    _session: Session | None = None

    def __repr__(self) -> str:
        count = len(self.report.networks)
        checked = f"checked: {self.report.check}" if self.report.check else "not checked"
        return f"<CompiledModel: {count} network{'s' * (count != 1)}, {self.stored.file.size:,} bytes, {checked}>"

    @property
    def onnx(self) -> bytes:
        """The ONNX file. TNCompileError where its weights are in a file of their own."""
        return self.stored.file.data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ONNX file, and beside it ``PATH.data`` where its weights are in a file of their own.

        Both whole or neither; OutputError where that cannot be done.
        """
        self.stored.save(path)

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Run in ONNX Runtime on torch tensors or arrays, in the order or by the names of the model's inputs.

        Returns the output as an array, or a dict of arrays by output name where there are several.
        """
        if self._session is None:
            self._session = Session(self.stored.source)
        names = [v.name for v in self.program.inputs]
        if len(inputs) > len(names) or {*named} - {*names[len(inputs) :]}:
            raise TNCompileError(f"the model's inputs are {', '.join(names)}")
        feeds = {**dict(zip(names, inputs, strict=False)), **named}
        outputs = self._session.run({name: _array(value) for name, value in feeds.items()})
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def compile(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    **options: Any,
) -> CompiledModel:
    """Compile a module, traced in its present mode on example inputs.

    `dynamic_shapes` as in `torch.export.export`; by default the first mode of every tensor input is dynamic
    where the model allows it. Further `options` as in `compile_exported`.
    """
    start = time.perf_counter()
    exported = trace(module, example_inputs, kwargs, dynamic_shapes)
    seconds = time.perf_counter() - start
    return compile_exported(exported, model=type(module).__name__, load_seconds=seconds, **options)


def compile_file(path: str | os.PathLike[str], *, loading: LoadOptions | None = None, **options: Any) -> CompiledModel:
    """Compile a model file of any kind that is taken; `loading` as in `tncompile.LoadOptions`, `options` as in
    `compile_exported`.
    """
    start = time.perf_counter()
    loaded = load(path, loading)
    seconds = time.perf_counter() - start
    with naming(path):
        return compile_exported(loaded, model=str(path), load_seconds=seconds, **options)


def save(
    module: torch.nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic_shapes: Any = "batch"
) -> None:
    """Trace a module and write it as an exported program: a file that holds no code, for `tncompile` to compile.

    `dynamic_shapes` as in `compile`. Call ``.eval()`` first for inference. Classes that the module takes or returns are
    dicts of their fields in the file, which is read without them. UnsupportedError where the module cannot be
    traced; OutputError where the file cannot be written, whole or not at all.
    """
    check_writable(path)
    write_file(path, dump_exported(trace(module, example_inputs, None, dynamic_shapes)))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name in front of what is wrong with the model in it."""
    try:
        yield
    except (UnsupportedError, CheckError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error


def import_file(path: str | os.PathLike[str], loading: LoadOptions | None = None) -> ImportedModel:
    """The model in a file of any kind that is taken."""
    loaded = load(path, loading)
    with naming(path):
        return loaded if isinstance(loaded, OnnxModel) else import_exported(loaded)


def compile_exported(
    exported: LoadedModel,
    *,
    batch: int | Sequence[int] = DEFAULT_BATCH,
    sizes: Mapping[str, int] | None = None,
    passes: Sequence[Pass] = DEFAULT,
    store: Store = "auto",
    external_data: bool = False,
    folder: Path | None = None,
    max_memory: int | None = None,
    compact: bool = False,
    micro_batch: bool = True,
    check: bool = True,
    examples: Sequence[Mapping[str, Array]] = (),
    profile: DeviceProfile | str | None = None,
    device: str = "cpu",
    tune: float | None = None,
    threads: int = 0,
    progress: Progress = _no_progress,
    model: str = "",
    load_seconds: float = 0.0,
) -> CompiledModel:
    """Compile an exported program, or an ONNX model (see `tncompile.frontend.onnx.importer.import_onnx`).

    `batch`: the batch sizes to plan for. `sizes`: typical sizes of other dynamic dimensions, by name. `store`: keep
    folded layers as ``"cores"`` in the file or write them ``"folded"``; ``"auto"`` takes the smaller unless loading
    would take too long. `external_data`: weights go to a file of their own, as they do in any case where one ONNX file
    could not hold them; until it is saved that is kept in `folder` (the system's own place for temporary files where it
    is None). `max_memory`: bytes that the operands and intermediates of a network may take at once, at the
    batch sizes planned for (TNCompileError where that cannot be done). `compact`: nothing is computed at compile time
    that would make the file larger, at the price of speed. `micro_batch`: large batches of images are computed a few
    samples at a time where that gains (see `tncompile.emit.microbatch`). `profile`: of the device to plan for, or as in
    `tncompile.cost.devices.choose`. `device`: ``"cpu"`` or ``"cuda"``. `tune`: seconds to time candidates on this
    machine for, instead of trusting predictions (TNCompileError where ONNX Runtime cannot use the device). `threads`:
    of the sessions that it will run in, 0 for one a core. `check`: run
    the result against the traced model in float64 (CheckError where it is wrong), on `examples` (arrays by input name)
    or on random inputs. Raises UnsupportedError for what cannot be compiled.
    """
    seconds = {"load": load_seconds}
    watch = _Watch(seconds)
    if device not in DEVICES:
        raise TNCompileError(f"no device {device!r}; choose from {', '.join(DEVICES)}")
    plan_for = (
        ChosenProfile(profile, "given") if isinstance(profile, DeviceProfile) else choose(profile, device, threads)
    )
    timer = None if tune is None else Tuner(tune, device, threads)
    progress("importing the graph")
    traced = exported if isinstance(exported, OnnxModel) else import_exported(exported)
    watch("import")
    batches = tuple(dict.fromkeys([batch] if isinstance(batch, int) else batch))
    context = planning_context(traced, batches, sizes or {}, plan_for.profile, max_memory)
    context = replace(context, timer=timer, compact=compact)
    stages, reports = run_passes(traced, context, passes, progress)
    program = list(stages.values())[-1]
    watch("passes")
    progress("writing ONNX")
    served = [sizes["batch"] for sizes in sizes_to_check(traced, batches) if "batch" in sizes]
    composed = stages.get("fold", traced.program)  # the last with cores as they were
    context = replace(context, images=images(program))

    def gained() -> float:
        networks, _ = summarize(composed, program, reports, context)
        return 1e6 * sum(network.gained(min(batches)) for network in networks)

    parts = partial(in_micro_batches, batches=served, threads=threads or cores(), gained=gained)
    file = write(program, traced, store, external_data, parts if micro_batch and device == "cpu" else None)
    stored = Stored(file.file, folder)
    watch("emit")
    if tune is not None and (beyond := _beyond(file, batches)):
        progress("timing micro-batches against whole batches")
        whole = write(program, traced, store, external_data)
        kept = Stored(whole.file, folder)
        if whole_is_faster(kept.source, stored.source, traced, beyond, tune / 8, threads):
            file, stored = whole, kept
        watch("race")
    settled: Settled | None = None
    if tune is not None and max_memory is None:  # the exporter's file keeps to no limit
        progress("timing it against what there is without it")
        settled = settle(stored.source, traced, batches, tune / 4, device, threads)
        if settled.exported is not None:
            theirs = adopt(settled.exported, traced)
            if _passes_check(theirs.data, traced, batches, examples):
                file, stored = theirs, Stored(theirs.file, folder)
            else:
                settled = replace(settled, exported=None, note="its file is faster, but not as exact as it must be")
        watch("settle")
    result: CheckReport | None = None
    session: Session | None = None
    if check:
        progress("checking the numbers")
        result, session = _checked(stored, traced, batches, examples, file.sizes)
        if not result.passed and file.folded is not None:
            file = file.written_out("folding the cores in float32 at load is not as exact as it must be")
            stored = Stored(file.file, folder)
            result, session = _checked(stored, traced, batches, examples, file.sizes)
        watch("check")
    networks, views = summarize(composed, program, reports, context, file.storage.cores)
    report = Report(
        networks=networks,
        passes=reports,
        check=result,
        seconds=seconds,
        model=model,
        size=file.file.size,
        notes=traced.notes,
        storage=file.storage,
        views=views,
        opaque=sum(isinstance(n, Opaque) and n.output.dtype != "scalar" for n in program.nodes),
        batches=context.batches,
        sizes={name: size for name, size in context.sizes.items() if name != "batch"},
        dynamic="batch" in traced.sizes,
        version=__version__,
        device=plan_for.profile.device,
        profile=plan_for.origin,
        settled=settled,
        micro_batches=file.micro_batches,
        lowered="kept as they are" if isinstance(traced, OnnxModel) else "lowered by torch's exporter",
    )
    if result is not None and not result.passed:
        raise CheckError(f"the compiled model is not as exact as it must be: {result}")
    return CompiledModel(stored, program, report, traced, stages, session)


def planning_context(
    traced: ImportedModel,
    batches: Sequence[int],
    sizes: Mapping[str, int],
    profile: DeviceProfile,
    max_memory: int | None = None,
) -> Context:
    """What to plan for. TNCompileError for a dimension that the model does not have."""
    known = {*traced.sizes}
    unknown = sorted({*sizes} - known)
    if unknown:
        has = f"the model has {', '.join(sorted(known))}" if known else "all shapes of the model are fixed"
        raise TNCompileError(f"no dynamic dimension {unknown[0]}; {has}")
    shown = frozenset(value for _, value in traced.program.outputs)
    return Context(tuple(batches), {**traced.sizes, **sizes}, profile, max_memory=max_memory, outputs=shown)


class _Watch:
    """Notes the time since its last call, at the end of a stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        release_pages()  # what a stage has read of mapped weights, the next may not need
        now = time.perf_counter()
        self.seconds[stage] = now - self.last
        self.last = now


def run_passes(
    traced: ImportedModel,
    context: Context,
    passes: Sequence[Pass] = DEFAULT,
    progress: Progress = _no_progress,
    scheduled: bool = True,
) -> tuple[dict[str, Program], tuple[PassReport, ...]]:
    """The program after each pass, by name (``"traced"`` first; of a pass run twice, the last), and the reports.

    Where `scheduled`, the last of them is ready to be emitted.
    """
    stages = {"traced": traced.program}

    def note(name: str, program: Program) -> None:
        stages.pop(name, None)
        stages[name] = program
        release_pages()
        progress(f"{name}: {len(program.networks)} networks")

    _, reports = Pipeline(passes, scheduled).run(traced.program, context, note)
    return stages, reports


def check_session(
    session: Session,
    traced: ImportedModel,
    batches: Sequence[int] = DEFAULT_BATCH,
    examples: Sequence[Mapping[str, Array]] = (),
    also: Sequence[int] = (),
) -> CheckReport:
    """Check at batch sizes that show a fixed batch or a mixed-up mode, none over 64, and at those in `also`."""
    small = tuple(dict.fromkeys([*(min(b, 64) for b in batches), 3, *also]))
    return check(session, traced, small, examples)


def _checked(
    stored: Stored,
    traced: ImportedModel,
    batches: Sequence[int],
    examples: Sequence[Mapping[str, Array]],
    also: Sequence[int],
) -> tuple[CheckReport, Session | None]:
    """Check a written model, also at some more batch sizes; and the session where that is still open: weights in a
    file are not kept in memory.
    """
    try:
        session = stored.session()
    except LoadError as error:
        if isinstance(traced, OnnxModel) and (own := _why_not(traced)):
            raise CheckError(f"ONNX Runtime does not run this model before it is compiled either: {own}") from error
        raise CheckError(f"what was compiled from it does not run: {error}") from error
    result = check_session(session, traced, batches, examples, also)
    return result, session if session.is_open else None


def _why_not(model: OnnxModel) -> str:
    """Why ONNX Runtime cannot load an ONNX model as it came in; "" where it can."""
    try:
        Session(model.original, optimize=False)
    except TNCompileError as error:
        return str(error)
    return ""


def _beyond(file: Written, batches: Sequence[int]) -> list[int]:
    """The batch sizes that are computed in micro-batches."""
    return [size for size in batches if file.micro_batches is not None and size > file.micro_batches.limit]


def _passes_check(
    data: bytes, traced: ImportedModel, batches: Sequence[int], examples: Sequence[Mapping[str, Array]]
) -> bool:
    try:
        return check_session(Session(data), traced, batches, examples).passed
    except CheckError:
        return False


def to_bytes(program: Program, traced: ImportedModel) -> bytes:
    """A scheduled program as the bytes of an ONNX file that passes `onnx.checker`, folded layers written out."""
    return write(program, traced, "folded").data


__all__ = [
    "CompiledModel",
    "check_session",
    "compile",
    "compile_exported",
    "compile_file",
    "import_file",
    "run_passes",
    "save",
    "to_bytes",
]
