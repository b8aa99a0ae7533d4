"""Is the compiled model right? Fresh inputs through ONNX Runtime, against the traced model in float64."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tncompile.errors import CheckError, TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array
from tncompile.runtime.accuracy import (
    EXPORTED,
    FACTOR,
    FLOORS,
    ROUNDINGS,
    TELLING,
    CheckReport,
    OutputCheck,
    relative_error,
    scales,
)
from tncompile.runtime.inputs import affordable, fitting, other_sizes, random_inputs, sizes_to_check
from tncompile.runtime.reference import OnnxReference
from tncompile.runtime.rivals import export_plain
from tncompile.runtime.session import Session
from tncompile.runtime.traced import TracedReference


def check(
    session: Session,
    traced: ImportedModel,
    batches: Sequence[int] = (1, 3),
    examples: Sequence[Mapping[str, Array]] = (),
    seed: int = 0,
) -> CheckReport:
    """Compare a session with the float64 evaluation of the model as it came in.

    Runs `examples` (arrays by input name) where given, else random inputs at each of `batches` for a model
    with a dynamic batch. Other dynamic dimensions take the example's size, then one more, or what the model runs at
    otherwise (`other_sizes`). A lean session is closed before the reference computes, so that the weights are not in
    memory twice.
    """
    program = traced.program
    expected = {v.name for v in program.inputs}
    if {*session.inputs} != expected or session.outputs != _public(session, traced):
        raise CheckError(
            f"the compiled model has inputs {', '.join(sorted(session.inputs))} and outputs "
            f"{', '.join(session.outputs)}; the model has {', '.join(sorted(expected))} and "
            f"{', '.join(name for name, _ in program.outputs)}"
        )
    original = OnnxReference(traced) if isinstance(traced, OnnxModel) else TracedReference(traced)
    runs: list[tuple[str, Mapping[str, Array]]] = []
    if examples:
        runs = [(f"example {k}", fitting(example, traced)) for k, example in enumerate(examples)]
    else:
        generator = np.random.default_rng(seed)
        wanted = [affordable(traced, sizes) for sizes in sizes_to_check(traced, batches)]
        for number, sizes in enumerate(wanted):
            if sizes and sizes in wanted[:number]:
                continue
            # every second run away from zero, where sums and means do not cancel
            feeds: Mapping[str, Array] = random_inputs(traced, sizes, generator, mean=number % 2)
            # a lean session's model is large: its original is not opened beside it
            others = [] if session.lean and isinstance(traced, OnnxModel) else other_sizes(traced, sizes)
            while others and not original.runs_on(feeds):
                sizes = others.pop(0)
                feeds = random_inputs(traced, sizes, generator, mean=number % 2)
            label = ", ".join(f"{k}={v}" for k, v in sizes.items()) or f"fixed shapes, {number}"
            runs.append((label, feeds))
    answers: list[Mapping[str, Array] | Exception] = []
    for _, feeds in runs:
        try:
            answers.append(session.run(feeds))
        except Exception as error:  # whatever ONNX Runtime raises; the original may not run there either
            answers.append(error)
    if session.lean:
        session.close()
    errors: dict[str, list[tuple[float, float, str]]] = {}
    least, largest = scales(program), [0.0] * len(program.outputs)
    failed: dict[str, TNCompileError] = {}
    for (label, feeds), outputs in zip(runs, answers, strict=True):
        try:
            reference, eager = original.run(feeds)
        except TNCompileError as error:
            if examples or not isinstance(original, OnnxReference):
                raise
            failed[label] = error  # a file may claim sizes that it does not take
            continue
        if isinstance(outputs, Exception):
            raise CheckError(f"ONNX Runtime fails at {label}: {str(outputs).splitlines()[0]}") from outputs
        if not errors:
            _refuse_random(original, feeds, eager)
        if examples and not any(np.any(np.isfinite(wide) & (wide != 0)) for wide in reference):
            raise CheckError(f"{label} proves nothing: the model's outputs on it are all 0 or not finite")
        for k, ((name, result), wide, plain) in enumerate(zip(outputs.items(), reference, eager, strict=True)):
            if result.shape != wide.shape:
                raise CheckError(f"output {name} has shape {result.shape} at {label}, the model's has {wide.shape}")
            dtype = str(plain.dtype)
            ours, theirs = (relative_error(array, wide, least[k]) for array in (result, plain))
            errors.setdefault(name, []).append((ours, theirs, dtype))
            largest[k] = max(largest[k], float(np.max(np.abs(wide), initial=0.0)))
    if len(failed) == len(runs):
        raise next(iter(failed.values()))
    checks = []
    floors = []
    for name, found in errors.items():
        worst, eager_error = max(e for e, _, _ in found), max(e for _, e, _ in found)
        if any(math.isnan(e) for e, _, _ in found):
            worst = math.nan
        floors.append(original.slack * FLOORS.get(found[0][2], 0.0))
        bound = max(floors[-1], FACTOR * eager_error)  # this order: eager's may be no number
        checks.append(OutputCheck(name, worst, eager_error, bound, original.baseline))
    if isinstance(original, TracedReference) and not all(check.passed for check in checks):
        checks = _as_exported(checks, floors, least, original, [feeds for label, feeds in runs if label not in failed])
    notes = [original.note] * bool(original.note) + [f"the original cannot run at {label}" for label in failed]
    notes += [
        f"{name} is at most {size:.1g} on them, too little to tell: give inputs with --example"
        for (name, _), lower, size, check in zip(program.outputs, least, largest, checks, strict=True)
        if size < lower * max(TELLING, 10 * check.bound)
    ]
    return CheckReport(tuple(checks), tuple(label for label, _ in runs if label not in failed), "; ".join(notes))


def _as_exported(
    checks: Sequence[OutputCheck],
    floors: Sequence[float],
    least: Sequence[float],
    original: TracedReference,
    runs: Sequence[Mapping[str, Array]],
) -> list[OutputCheck]:
    """The checks with bounds that what anyone gets without tncompile would keep to: ONNX Runtime's own operators may be
    less exact than PyTorch's, as means of many numbers are."""
    names = [value.name for value in original.traced.program.inputs]
    worst = [0.0] * len(checks)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exported.onnx"
            export_plain(original.traced.exported, path)
            session = Session(path)
            for feeds in runs:
                given = dict(zip(session.inputs, (feeds[name] for name in names), strict=True))
                reference, _ = original.run(feeds)
                pairs = zip(session.run(given).values(), reference, strict=True)
                found = [relative_error(*pair, lower) for pair, lower in zip(pairs, least, strict=True)]
                worst = [float(np.maximum(*pair)) for pair in zip(worst, found, strict=True)]
            session.close()
    except Exception:  # whatever the exporter raises: then there is nothing to compare with
        return list(checks)
    changed = []
    for check, floor, error in zip(checks, floors, worst, strict=True):
        bound = max(check.bound, EXPORTED * error) if error <= ROUNDINGS * floor else check.bound
        changed.append(replace(check, exported=error, bound=bound))
    return changed


def _public(session: Session, traced: ImportedModel) -> list[str]:
    """The outputs' public names; one that an input of a PyTorch model has too carries a suffix in the file."""
    inputs = set() if isinstance(traced, OnnxModel) else {*session.inputs}
    return [f"{name}_out" if name in inputs else name for name, _ in traced.program.outputs]


def _refuse_random(
    original: OnnxReference | TracedReference, feeds: Mapping[str, Array], outputs: Sequence[Array]
) -> None:
    """Refuse a model whose numbers differ from run to run. (Attention with dropout 0 may be random, and is not.)"""
    draws, source = original.draws()
    if not draws:
        return
    _, again = original.run(feeds)
    if all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(outputs, again, strict=True)):
        return
    raise CheckError(
        f"the model draws random numbers ({draws}), so its numbers cannot be checked; "
        "export it in inference mode (model.eval()), or compile with --no-check",
        source,
    )
