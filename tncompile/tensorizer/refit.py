"""Replacements fitted anew to the inputs that their layers have once what is upstream is replaced too.

From the first layers to the last, each gets the matrix that is best for its inputs ``x'`` as they now are, against what
the layer gave for its inputs ``x`` in the model as it came in: ``argmin E |x W - x' V|^2 + ridge |W - V|^2``, truncated
to the same format and ranks in the metric of ``x'``, which of all matrices of a rank gives the best (reduced-rank
regression). Where the layer has a bias of its own, that takes over the mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from tncompile.decomp import Factorized, Metric, Ranks
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.errors import TNCompileError
from tncompile.ir import Array, Network, Program
from tncompile.tensorizer.data import Calibration
from tncompile.tensorizer.evaluation import Evaluation
from tncompile.tensorizer.inputs import readings
from tncompile.tensorizer.moments import Cross, Moments, crosses
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sites import Part, Replacement, separate
from tncompile.tensorizer.upstream import Upstream

RIDGE = 1e-3
"""How much a matrix is held to what it was, of the mean power of an input; more where few rows were seen."""


@dataclass(frozen=True)
class Refit:
    """Replacements, and new numbers of biases by name. `before` and `after` are output errors on held-out data."""

    replacements: tuple[Replacement, ...]
    biases: Mapping[str, Array]
    before: float
    after: float
    notes: tuple[str, ...] = ()

    def weights(self) -> dict[str, Array]:
        """What the weights and biases of the model become, by name."""
        return {**dense(self.replacements), **self.biases}


def dense(replacements: Sequence[Replacement]) -> dict[str, Array]:
    """What the weights of the model become, by name."""
    return {name: array for replacement in replacements for name, array in replacement.dense().items()}


def refit(
    replacements: Sequence[Replacement],
    runner: Runner,
    calibration: Calibration,
    held_out: Calibration,
    seconds: float | None = None,
    biases: bool = True,
    progress: Callable[[int, int, float], None] = lambda done, total, error: None,
    clock: Callable[[], float] = time.monotonic,
) -> Refit:
    """Fit the replacements to `calibration`, layers of one depth at a time; a depth at which that makes the error on
    `held_out` larger stays as it was.

    What cannot be fitted so is kept: tables, grouped layers, layers of several inputs that share a factor, inputs of
    over `moments.LARGEST` numbers, and formats that alternating least squares fit. After `seconds` the rest is kept
    too, with a note.
    """
    start, program = clock(), separate(runner.model)
    evaluation = Evaluation(runner, held_out)
    done = Refit(tuple(replacements), {}, 0.0, 0.0)
    error = before = evaluation.of_weights(done.weights())
    levels = _levels(program, replacements)
    own_biases = [_biases(program, one.site.parts) if biases else {} for one in replacements]
    exact, fitted, held = Upstream(runner, calibration), Upstream(runner, calibration), Upstream(runner, held_out)
    notes: tuple[str, ...] = ()
    for count, places in enumerate(levels):
        left = [k for later in levels[count:] for k in later]
        if seconds is not None and clock() - start > seconds:
            notes = (f"{len(left)} of {len(replacements)} replacements are not fitted again: the time was up",)
            break
        group = [done.replacements[k] for k in places]
        alike = [one.site for one in group if not one.site.apart]
        changing = {part.name for k in left for part in replacements[k].site.parts}
        changing |= {bias for k in left for bias in own_biases[k].values()}
        found = crosses(alike, exact, fitted, done.weights(), changing)
        held.advance(changing, done.weights())
        new, changed = list(done.replacements), dict(done.biases)
        for k, one in zip(places, group, strict=True):
            cross = found.get(one.site.parts[0].name)
            if cross is not None and isinstance(one.factorized, TreeFactorized):
                new[k], moved = _fitted(one, cross, own_biases[k], runner.model.program.arrays)
                changed |= moved
        tried = replace(done, replacements=tuple(new), biases=changed)
        after = evaluation.of_each(ran.outputs for ran in held.runs(tried.weights(), outputs=True))
        if after < error:
            done, error = tried, after
        progress(count + 1, len(levels), error)
    return replace(done, before=before, after=error, notes=notes)


def _biases(program: Program, parts: Sequence[Part]) -> dict[str, str]:
    """The biases of some weights, by name, of those that have one."""
    return {part.name: bias for part in parts if (bias := bias_of(program, part)) is not None}


def _fitted(
    one: Replacement, cross: Cross, biases: Mapping[str, str], arrays: Mapping[str, Array]
) -> tuple[Replacement, dict[str, Array]]:
    """A replacement for the inputs that there are now, and the biases of its layer, where all of its parts have one."""
    exact = np.asarray(one.site.matrix, np.float64)
    follow = len(biases) == len(one.site.parts)
    moments = cross.after.centred() if follow else cross.after
    between = cross.between - np.outer(cross.after.mean, cross.before.mean) if follow else cross.between
    best = _regression(moments, between, exact)
    factorized = same_format(one.factorized, best, moments.metric)
    new = replace(one, factorized=factorized)
    if not follow:
        return new, {}
    shift = cross.before.mean @ exact - cross.after.mean @ factorized.dense()
    changed = dict[str, Array]()
    for part, moved in zip(one.site.parts, one.site.split(shift), strict=True):
        bias = arrays[biases[part.name]]
        changed[biases[part.name]] = (bias + moved.reshape(bias.shape)).astype(bias.dtype)
    return new, changed


def _regression(moments: Moments, between: Array, exact: Array) -> Array:
    """The matrix V that is best for ``x' V = x W``, held a little to the W that it stands for."""
    (square,) = moments.factors
    size = len(square)
    ridge = (RIDGE + 10 * RIDGE * size / max(1, moments.rows)) * float(np.trace(square)) / size
    solved: Array = np.linalg.solve(square + ridge * np.eye(size), between @ exact + ridge * exact)
    return solved


def same_format(old: Factorized, matrix: Array, metric: Callable[[Sequence[int]], Metric]) -> Factorized:
    """A matrix in the format, the modes and the ranks of a factorization; in the metric of the input, made for its
    modes, where the format allows that."""
    own = {f.name: getattr(old, f.name) for f in fields(old) if f.name not in ("cores", "axes", "bound", "notes")}
    ranks = Ranks(given=tuple(old.ranks.values()), larger=True)
    make = type(old).from_dense  # type: ignore[attr-defined]
    try:
        found: Factorized = make(matrix, old.axes, ranks, metric=metric(old.axes[0]), **own)
    except TNCompileError:  # modes on which several cores act
        found = make(matrix, old.axes, ranks, **own)
    return found


# ------------------------------------------------------------------------------------ the program


def _levels(program: Program, replacements: Sequence[Replacement]) -> list[list[int]]:
    """The replacements by how many others their input depends on one after another, as numbers."""
    place = {part.name: k for k, one in enumerate(replacements) for part in one.site.parts}
    reads = readings(program, (part for one in replacements for part in one.site.parts))
    made: dict[str, list[int]] = {}  # by value of the layer
    for name, uses in reads.items():
        for use in uses:
            made.setdefault(use.output, []).append(place[name])
    level: dict[str, int] = {}
    own: dict[int, int] = {}
    for node in program.nodes:
        before = max((level.get(name, 0) for name in node.inputs), default=0)
        for k in made.get(node.value.name, ()):
            own.setdefault(k, before)
        level[node.value.name] = before + (node.value.name in made)
    return [sorted(k for k in own if own[k] == depth) for depth in sorted({*own.values()})]


def bias_of(program: Program, part: Part) -> str | None:
    """The weight that is added to what a layer gives, one number for each of its outputs; None where it has none that
    is the layer's alone."""
    users = [n for n in program.networks if any(core.name == part.name for core in n.cores)]
    if len(users) != 1:
        return None
    (network,) = users
    core = next(core for core in network.cores if core.name == part.name)
    outs = tuple(i.name for axis in part.outs for i in core.axes[axis])
    found = [
        t.tensors[0]
        for t in network.terms
        if t.is_constant and len(t.tensors) == 1 and tuple(i.name for i in t.tensors[0].indices) == outs
    ]
    if len(found) != 1 or found[0].recipe is not None or _readers(program, found[0].name) != 1:
        return None
    return found[0].name


def _readers(program: Program, weight: str) -> int:
    inside = sum(core.name == weight for n in program.networks for core in n.cores)
    return inside + sum(weight in node.inputs for node in program.nodes if not isinstance(node, Network))
