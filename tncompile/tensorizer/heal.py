"""Healing: weights that were replaced are trained to compute what the model computed before, without labels.

Slice by slice (arXiv 2605.19842), each given what the healed slices before it compute, so that their error is made good
as well; then, where asked for, all at once by the model's outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tncompile.errors import TNCompileError, UnsupportedError
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.runtime.files import check_writable
from tncompile.runtime.temporary import folder_in
from tncompile.tensorizer import checkpoint as checkpoints
from tncompile.tensorizer.activations import Feeds, Store
from tncompile.tensorizer.checkpoint import Position, Stage
from tncompile.tensorizer.distil import FINE, RATE, Lesson, Loss, Progress, Training
from tncompile.tensorizer.flow import Flow, Passage, Values
from tncompile.tensorizer.material import FEWEST, Material
from tncompile.tensorizer.slices import Slice, read_outside, slices_of, trainable, trained
from tncompile.tensorizer.student import aligned, changed, with_weights

MEMORY = 1 << 30
END_TO_END = "end to end"
FOR_SLICES = 0.7
"""The share of the time that slices have where training from end to end follows."""

FOR_PASSES = 0.25
PASSES = 3
"""How often each run goes through the model besides training, and the share of the time that this may take."""


@dataclass(frozen=True)
class Message:
    """How far healing is: the `step` of stage `number` of `stages`, and its loss on held-out data at first and now."""

    stage: str
    number: int
    stages: int
    step: int
    before: float
    loss: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.number + 1}/{self.stages} {self.stage}: step {self.step}, loss {self.before:.2e} -> {self.loss:.2e}"
        )


@dataclass(frozen=True)
class Healed:
    """The healed model, and its relative output error on held-out data ``|y - y0| / |y0|`` before and after.

    `slices`: what came of each slice, `end_to_end` of training all at once. `notes` say what was not as asked.
    """

    exported: torch.export.ExportedProgram
    before: float
    after: float
    slices: tuple[Stage, ...]
    end_to_end: Stage | None
    seconds: float
    notes: tuple[str, ...] = ()


def heal(
    student: torch.export.ExportedProgram,
    teacher: torch.export.ExportedProgram,
    calibration: Sequence[Feeds],
    *,
    held_out: Sequence[Feeds] | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    end_to_end: bool = False,
    loss: Loss = "mse",
    vectors: bool = True,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    progress: Callable[[Message], None] | None = None,
    memory: int = MEMORY,
    clock: Callable[[], float] = time.monotonic,
) -> Healed:
    """Train the weights of `student` that `teacher` does not have, so that it computes what the teacher does.

    Both are exported in evaluation mode, and the same but for weights. `calibration` has inputs by name, one mapping a
    run; a fifth is held out to judge by, unless `held_out` are given. `seconds` limits the time, `steps` those of each
    slice and of training from end to end, which follows where `end_to_end`, with `loss` ``"kl"`` for outputs that are
    logits. Biases and scales near replaced weights are trained too, where `vectors`.

    With a `checkpoint`, the same call goes on from there after it was interrupted; the file is written after each
    slice and every `checkpoint_every` seconds. Activations take `memory` bytes, and beyond that temporary files.

    The result is never worse on what is held out: what does not help is undone. UnsupportedError for what cannot be
    trained, TNCompileError for wrong arguments, data of another model and another model's checkpoint.
    """
    for model in (student, teacher):
        if isinstance(model, OnnxModel):
            raise UnsupportedError(
                "an ONNX model cannot be trained by PyTorch; heal the model that it was exported from"
            )
    if seconds is None and steps is None:
        raise TNCompileError("healing needs a limit: give seconds or steps")
    if (seconds is not None and not seconds >= 0) or (steps is not None and steps < 0):
        raise TNCompileError("the limit of healing cannot be negative")
    if loss not in ("mse", "kl"):
        raise TNCompileError(f"no loss {loss!r}; choose mse or kl")
    if checkpoint is not None:
        check_writable(checkpoint)
    limits = _Limits(seconds, steps, end_to_end, loss, vectors, checkpoint, checkpoint_every)
    with ExitStack() as stack:
        folder = stack.enter_context(folder_in(None))
        stack.enter_context(_undisturbed())
        healing = _Healing(student, teacher, limits, Store(memory, folder), progress, clock)
        return healing.run(calibration, held_out)


@dataclass(frozen=True)
class _Limits:
    """What was asked for."""

    seconds: float | None
    steps: int | None
    end_to_end: bool
    loss: Loss
    vectors: bool
    checkpoint: Path | None
    every: float


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients where they are asked for, whatever the caller's mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Healing:
    """One call of `heal`."""

    def __init__(
        self,
        student: torch.export.ExportedProgram,
        teacher: torch.export.ExportedProgram,
        limits: _Limits,
        store: Store,
        report: Callable[[Message], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.original, self.limits, self.store, self.clock = student, limits, store, clock
        self.report = report or (lambda message: None)
        self.student, self.teacher = Flow(student), Flow(teacher)
        aligned(self.teacher, self.student)
        self.cores, self.changed = changed(self.student, self.teacher)
        self.slices = slices_of(self.student, self.changed)
        self.notes: list[str] = []
        self.position = Position()
        self.given: dict[int, Values] = {}  # what the student's slice is given, and what the teacher's is, by run
        self.right: dict[int, Values] = {}
        self.began = self.saved = self.told = clock()

    def run(self, calibration: Sequence[Feeds], held_out: Sequence[Feeds] | None) -> Healed:
        """Heal, or go on healing."""
        if not self.slices:
            why = "no weight was replaced" if not self.changed else "no output depends on replaced weights"
            return Healed(self.original, 0.0, 0.0, (), None, 0.0, (f"{why}: nothing to heal",))
        material = Material(self.student, self.teacher, self.slices, self.store, calibration, held_out)
        self.material = material
        mark = self._resume()
        material.use(self._runs())
        material.begin(self.limits.end_to_end)
        if material.judged_by_itself:
            self.notes.append("one run of calibration data: nothing is held out, errors are those on what was learned")
        before = material.output_error({})
        for number, part in enumerate(self.slices):
            self._slice(number, part, mark)
        if len(self.position.stages) == len(self.slices) and material.output_error(self.position.healed) > before:
            self.notes.append("healing slice by slice did not help on held-out data: undone")
            self.position = replace(self.position, healed={})
        if self.limits.end_to_end:
            self._end_to_end(mark)
        after = material.output_error(self.position.healed)
        if not after <= before and self.limits.loss == "mse":
            self.notes.append("healing did not help on held-out data: undone")
            self.position, after = replace(self.position, healed={}), before
        stages = self.position.stages
        return Healed(
            with_weights(self.original, self.position.healed),
            before,
            after,
            stages[: len(self.slices)],
            stages[len(self.slices)] if self.limits.end_to_end else None,
            self._seconds(),
            tuple(self.notes),
        )

    def _resume(self) -> str:
        """Go to where the checkpoint is, if there is one; what names this call."""
        limits, material = self.limits, self.material
        if limits.checkpoint is None:
            return ""
        asked = (limits.steps, limits.end_to_end, limits.loss, limits.vectors, material.taught, material.held_out)
        graphs = [str(flow.exported.graph_module.graph) for flow in (self.student, self.teacher)]
        weights = [x for flow in (self.student, self.teacher) for item in sorted(flow.tensors.items()) for x in item]
        data = [run[number] for run in material.runs for number in sorted(run)]
        mark = checkpoints.fingerprint([torch.__version__, asked, *graphs, *weights, *data])
        if limits.checkpoint.exists():
            self.position = checkpoints.load(limits.checkpoint, mark)
        return mark

    def _runs(self) -> int:
        """How many runs to use: so many that to let all of them through the model takes little of the time."""
        material = self.material
        count = len(material.taught) + len(material.held_out)
        if self.limits.seconds is None or self.position.runs:
            return self.position.runs or count
        material.answered(material.taught[0])
        begin = self.clock()
        material.answered(material.held_out[0])
        once = max(self.clock() - begin, 1e-6)
        chosen = min(count, max(FEWEST, int(self.limits.seconds * FOR_PASSES / (PASSES * once))))
        if chosen < count:
            self.notes.append(f"{chosen} of {count} runs of calibration data were used: there was no time for more")
        self.position = replace(self.position, runs=chosen)
        return chosen

    # -------------------------------------------------------------------------------- stages

    def _slice(self, number: int, part: Slice, mark: str) -> None:
        """Heal a slice unless that is done, and let all runs through it."""
        ours, theirs, material = self.student, self.teacher, self.material
        if number == 0:
            self.given, self.right = dict(material.base), dict(material.base)
        through = Passage(theirs, part.start, part.end, part.targets)
        targets = {run: self.store.keep(through(values, theirs.tensors)) for run, values in self.right.items()}
        if len(self.position.stages) <= number:
            keys = trained(ours, part, self.cores, self.limits.vectors, read_outside(ours, part))
            stretch = ours.part(part.start, part.end, part.targets)
            lesson = Lesson(stretch, self.given, targets, material.taught, material.held_out)
            if not keys:
                self.notes.append(f"{part.name}: its weights are shared with other slices, and not trained in this one")
            self._train(number, part.name, lesson, keys, mark, part.sites)
        if number + 1 == len(self.slices):
            self.given, self.right = {}, {}
            return
        start = self.slices[number + 1].start
        bridge = Passage(theirs, part.end, start)
        self.right = {run: self.store.keep(bridge(values, theirs.tensors)) for run, values in targets.items()}
        both, state = Passage(ours, part.start, start), {**ours.tensors, **self.position.healed}
        self.given = {run: self.store.keep(both(values, state)) for run, values in self.given.items()}

    def _end_to_end(self, mark: str) -> None:
        number = len(self.slices)
        if len(self.position.stages) > number:
            return
        start = self.slices[0].start
        before = frozenset[str]().union(*self.student.reads[:start])
        nodes = range(start, len(self.student.varying))
        keys = trainable(self.student, nodes, self.cores, self.limits.vectors, before)
        data = self.material
        lesson = Lesson(data.whole, data.base, data.answers, data.taught, data.held_out, self.limits.loss)
        self._train(number, END_TO_END, lesson, keys, mark, tuple(sorted(self.cores)))

    def _train(
        self, number: int, name: str, lesson: Lesson, keys: list[str], mark: str, sites: tuple[str, ...]
    ) -> None:
        """Train one stage, and write down what came of it."""
        old = self.position
        stages = len(self.slices) + self.limits.end_to_end
        share = old.share if old.training is not None else self._share(number)
        start = self.clock() - old.part
        rate = FINE if number == len(self.slices) else RATE
        training = Training(lesson, {**self.student.tensors, **old.healed}, keys, rate, number, old.training)

        def message(progress: Progress) -> Message:
            return Message(name, number, stages, progress.step, progress.before, progress.loss, self._seconds())

        def watch(progress: Progress) -> float:
            now = self.clock()
            if self.limits.checkpoint is not None and now - self.saved >= self.limits.every:
                middle = replace(old, training=progress, seconds=self._seconds(), part=now - start, share=share)
                checkpoints.save(self.limits.checkpoint, mark, middle)
                self.saved = self.clock()
            if now - self.told >= 1:
                self.report(message(progress))
                self.told = now
            used = [0.0] if keys else [1.0]
            if self.limits.steps is not None:
                used.append(progress.step / self.limits.steps if self.limits.steps else 1.0)
            if share is not None:
                used.append((now - start) / share if share else 1.0)
            return max(used)

        best = training.run(watch)
        done = training.progress
        self.report(message(done))
        stage = Stage(name, sites, done.before, done.loss, done.step, self.clock() - start)
        self.position = Position(old.runs, (*old.stages, stage), {**old.healed, **best}, seconds=self._seconds())
        self.began = self.clock()
        if self.limits.checkpoint is not None:
            checkpoints.save(self.limits.checkpoint, mark, self.position)
            self.saved = self.clock()

    # -------------------------------------------------------------------------------- time

    def _seconds(self) -> float:
        """Seconds taken, those before an interruption too."""
        return self.position.seconds + self.clock() - self.began

    def _share(self, number: int) -> float | None:
        """Seconds for a stage: what is left is divided by how many numbers the replaced weights have."""
        if self.limits.seconds is None:
            return None
        if number == len(self.slices):
            return max(0.0, self.limits.seconds - self._seconds())
        whole = self.limits.seconds * (FOR_SLICES if self.limits.end_to_end else 1.0)
        sizes = {key: tensor.numel() for key, tensor in self.student.tensors.items()}
        left = [sum(sizes[site] for site in part.sites) for part in self.slices[number:]]
        return max(0.0, whole - self._seconds()) * left[0] / sum(left)
