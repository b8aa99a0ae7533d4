"""Training of a stretch of a model to give what its teacher gives there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tncompile.errors import UnsupportedError
from tncompile.tensorizer.flow import Part, Values

Loss = Literal["mse", "kl"]
RATE = 0.03
FINE = 0.01
"""Steps of Adam at the start, relative to the root mean square of each weight: to heal, and to refine that."""

SMALLEST = 1e-2
"""The root mean square that a weight is taken to have at least, so that a bias of zeros can move."""

PATIENCE = 5
"""Evaluations without a gain of `GAIN` after which training goes back to the best weights, with smaller steps."""

GAIN = 1e-3
FALL = 0.3
FALLS = 4
"""By how much the steps then fall, and how often: after that training ends early."""


@dataclass(frozen=True)
class Lesson:
    """What is learned: by `part`, from `inputs` to `targets`, both by run; `taught` runs to learn from, `held_out` ones
    to judge by. `loss`: the relative mean squared error, averaged over targets, or (``"kl"``) the divergence between
    the distributions over the last axis of which the targets are logits."""

    part: Part
    inputs: Mapping[int, Values]
    targets: Mapping[int, Values]
    taught: tuple[int, ...]
    held_out: tuple[int, ...]
    loss: Loss = "mse"

    def scales(self) -> dict[int, float]:
        """The sum of squares of each target, its mean over all runs: errors of one size weigh the same in each."""
        found: dict[int, float] = {}
        for number in self.part.gives:
            squares = [float(run[number].detach().double().square().sum()) for run in self.targets.values()]
            found[number] = max(sum(squares) / len(squares), 1e-30)
        return found

    def error(self, run: int, state: Mapping[str, torch.Tensor], scales: Mapping[int, float]) -> torch.Tensor:
        """The loss on one run."""
        given = self.part(self.inputs[run], state)
        terms = [self._distance(given[n], self.targets[run][n], scales[n]) for n in self.part.gives]
        return torch.stack(terms).mean()

    def _distance(self, given: torch.Tensor, target: torch.Tensor, scale: float) -> torch.Tensor:
        given, target = _wide(given), _wide(target)
        if self.loss == "kl":
            ours, theirs = given.log_softmax(-1), target.log_softmax(-1)
            return (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return (given - target).square().sum() / scale


@dataclass
class Progress:
    """Where training is; all that is needed to go on from it, with the same numbers."""

    now: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    before: float
    loss: float
    step: int = 0
    waited: int = 0
    falls: int = 0
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)


class Training:
    """One lesson being learned, step by step.

    `state` are all weights; those that are `trained` begin as there, or as in `old`. Best is what did best on the runs
    held out, the start included. `rate` is as `RATE`; `seed` determines the order of the runs.
    """

    def __init__(
        self,
        lesson: Lesson,
        state: Mapping[str, torch.Tensor],
        trained: Sequence[str],
        rate: float,
        seed: int,
        old: Progress | None,
    ) -> None:
        self.lesson, self.rate, self.seed = lesson, rate, seed
        self.state = dict(state)
        self.scales = lesson.scales()
        self.every = max(10, len(lesson.taught))
        start = {key: state[key] for key in trained}
        self.rates = {key: max(_root_mean_square(_wide(tensor)), SMALLEST) for key, tensor in start.items()}
        if old is None:
            now = {key: _wide(tensor).clone() for key, tensor in start.items()}
            loss = self._judged(now)
            old = Progress(now, {key: tensor.clone() for key, tensor in now.items()}, loss, loss)
            old.first, old.second = ({key: torch.zeros_like(t) for key, t in now.items()} for _ in range(2))
        self.progress = old

    def run(self, done: Callable[[Progress], float]) -> dict[str, torch.Tensor]:
        """Train until `done`, asked before each step, is 1 or more; the best weights, in their own dtypes.

        The learning rate falls with it, from the start to nothing. UnsupportedError where the loss has no gradient.
        """
        progress = self.progress
        while (share := done(progress)) < 1 and progress.falls < FALLS and progress.before > 0:
            self._step(share)
            if progress.step % self.every == 0:
                self._evaluate()
        if progress.step % self.every:
            self._evaluate()
        return {key: tensor.to(self.state[key].dtype) for key, tensor in progress.best.items()}

    def _step(self, share: float) -> None:
        progress = self.progress
        weights = {key: tensor.detach().requires_grad_() for key, tensor in progress.now.items()}
        with torch.enable_grad():
            error = self.lesson.error(self._next_run(), self._with(weights), self.scales)
        if not error.requires_grad:
            raise UnsupportedError("the loss does not depend on the replaced weights by way of anything differentiable")
        gradients = torch.autograd.grad(error, [*weights.values()], allow_unused=True)
        progress.step += 1
        rate = (
            RATE * FALL**progress.falls * min(1.0, progress.step / 10) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        )
        for (key, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None and bool(torch.isfinite(gradient).all()):
                progress.now[key] = self._moved(key, weight.detach(), gradient, rate * self.rates[key])

    def _moved(self, key: str, weight: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
        """A step of Adam (arXiv 1412.6980)."""
        first, second, step = self.progress.first[key], self.progress.second[key], self.progress.step
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        scale = (second / (1 - 0.99**step)).sqrt_().add_(1e-12)
        return weight.addcdiv(first, scale, value=-rate / (1 - 0.9**step))

    def _next_run(self) -> int:
        """Each run once in turn, in an order that the seed and the epoch alone determine."""
        taught = self.lesson.taught
        epoch, place = divmod(self.progress.step, len(taught))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return taught[int(torch.randperm(len(taught), generator=generator)[place])]

    def _evaluate(self) -> None:
        progress = self.progress
        loss = self._judged(progress.now)
        progress.waited = 0 if loss < progress.loss * (1 - GAIN) else progress.waited + 1
        if loss < progress.loss:
            progress.loss = loss
            progress.best = {key: tensor.clone() for key, tensor in progress.now.items()}
        if progress.waited == PATIENCE:
            progress.now = {key: tensor.clone() for key, tensor in progress.best.items()}
            progress.waited, progress.falls = 0, progress.falls + 1

    def _judged(self, weights: Mapping[str, torch.Tensor]) -> float:
        """The loss on what is held out."""
        with torch.no_grad():
            state = self._with(weights)
            errors = [float(self.lesson.error(run, state, self.scales)) for run in self.lesson.held_out]
        loss = sum(errors) / len(errors)
        return loss if math.isfinite(loss) else math.inf

    def _with(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**self.state, **{key: tensor.to(self.state[key].dtype) for key, tensor in weights.items()}}


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: halves are trained, and compared, in it."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
