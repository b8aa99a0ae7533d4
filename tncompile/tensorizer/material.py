"""What a model is healed with: calibration data, as far as weights that are the same in teacher and student take it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from tncompile.errors import UnsupportedError
from tncompile.tensorizer.activations import Feeds, Store, runs_of
from tncompile.tensorizer.flow import Flow, Passage, Values
from tncompile.tensorizer.slices import Slice

FEWEST = 10
"""Runs that are used in any case, however little time there is."""


class Material:
    """Runs of the teacher and the student.

    `base` has the values where the first slice begins: up to there the two models are one. `taught` are the runs to
    learn from, `held_out` those to judge by: a fifth, where none are given. `whole` is the student from the first
    slice to its outputs (floating ones; else the targets of the last slice).
    """

    def __init__(
        self,
        student: Flow,
        teacher: Flow,
        slices: Sequence[Slice],
        store: Store,
        calibration: Sequence[Feeds],
        held_out: Sequence[Feeds] | None,
    ) -> None:
        self.student, self.teacher, self.store = student, teacher, store
        self.runs = runs_of(student, calibration)
        count = len(self.runs)
        if held_out is not None:
            self.runs += runs_of(student, held_out)
            self.held_out = tuple(range(count, len(self.runs)))
        else:
            self.held_out = tuple(range(4, count, 5)) or tuple(range(1, count))[-1:]
        self.taught = tuple(number for number in range(count) if number not in {*self.held_out})
        self.judged_by_itself = not self.held_out
        self.held_out = self.held_out or self.taught
        self.start = slices[0].start
        end = len(student.varying)
        ends = tuple(n for n in student.outputs if n >= self.start and student.moving[n])
        if not ends:
            end, ends = slices[-1].end, slices[-1].targets
        self.whole, self._answer = student.part(self.start, end, ends), teacher.part(self.start, end, ends)
        self._prefix = Passage(teacher, len(teacher.inputs), self.start)
        self.base: dict[int, Values] = {}
        self.answers: dict[int, Values] = {}

    def use(self, count: int) -> None:
        """Leave out all but `count` runs, of those held out in proportion."""
        share = count / (len(self.taught) + len(self.held_out))
        if share < 1 and not self.judged_by_itself:
            self.taught = self.taught[: max(1, round(len(self.taught) * share))]
            self.held_out = self.held_out[: max(1, round(len(self.held_out) * share))]

    def begin(self, everything: bool) -> None:
        """Compute `base`, and the teacher's `answers` to what is held out, or to `everything`.

        UnsupportedError where the teacher gives no finite numbers, or others each time.
        """
        for run in {*self.taught, *self.held_out}:
            self.begun(run)
        for run in {*self.taught, *self.held_out} if everything else self.held_out:
            self.answered(run)
        again = self._answer(self.base[self.held_out[0]], self.teacher.tensors)
        for number, answer in self.answers[self.held_out[0]].items():
            if not torch.allclose(answer, again[number], rtol=1e-3, atol=1e-3 * float(answer.abs().max())):
                raise UnsupportedError(
                    "the model draws random numbers, so there is nothing to train towards; export it in evaluation "
                    "mode (model.eval())"
                )

    def begun(self, run: int) -> Values:
        """The values of one run where the first slice begins."""
        if run not in self.base:
            self.base[run] = self.store.keep(self._prefix(self.runs[run], self.teacher.tensors))
        return self.base[run]

    def answered(self, run: int) -> Values:
        """The teacher's outputs of one run."""
        if run not in self.answers:
            self.answers[run] = self.store.keep(self._answer(self.begun(run), self.teacher.tensors))
            if not all(bool(torch.isfinite(answer).all()) for answer in self.answers[run].values()):
                raise UnsupportedError(
                    "the model's outputs are not finite on the calibration data: it cannot be healed"
                )
        return self.answers[run]

    def output_error(self, healed: Mapping[str, torch.Tensor]) -> float:
        """The student's relative error on what is held out, with some weights in the place of its own."""
        state = {**self.student.tensors, **healed}
        wrong = right = 0.0
        for run in self.held_out:
            given = self.whole(self.base[run], state)
            for number, answer in self.answers[run].items():
                wrong += float((given[number].double() - answer.double()).square().sum())
                right += float(answer.double().square().sum())
        error = math.sqrt(wrong / right) if right else math.sqrt(wrong)
        return error if math.isfinite(error) else math.inf
