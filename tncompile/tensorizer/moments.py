"""Second moments of what the weights of a model are contracted with, over calibration data.

Moments are raw: the mean of an input is a part of it, unless a bias takes it over (`Moments.centred`). A layer whose
inputs are `x` has the output error ``E |x W - x V|^2 = tr (W - V)' M (W - V)`` with ``M = E x' x``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from tncompile.decomp import Metric
from tncompile.decomp.metric import apply
from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.tensorizer.data import Calibration
from tncompile.tensorizer.inputs import Lookup, Reading, readings
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sites import Part, Site, separate
from tncompile.tensorizer.upstream import Upstream

LARGEST = 4096
"""Rows of a matrix of moments; above that they are those of groups of axes apart."""

_WORK = 4e10  # floating-point operations for the moments of one weight
_MEMORY = 1 << 30  # bytes of all moments that are collected in one pass
_PRIOR = 1e-3
"""Of the mean power of an input, how much each direction is given that samples do not show, times inputs over rows."""


@dataclass(frozen=True, eq=False)
class Moments:
    """``E x' x`` of an input ``x[in]``, as the Kronecker product of `factors`: ``[n, n]``, or ``[n]`` where diagonal.

    One factor is exact. `mean` is ``E x``, `rows` how many inputs were seen. `shared` moments are the mean over
    several matrices that the weight is (of groups of channels, of experts).
    """

    factors: tuple[Array, ...]
    mean: Array = field(repr=False)
    rows: int
    shared: bool = False

    @property
    def modes(self) -> tuple[int, ...]:
        """The sizes of the factors."""
        return tuple(map(len, self.factors))

    @property
    def matrix(self) -> Array:
        """The moments as one matrix ``[in, in]``."""
        return np.asarray(reduce(np.kron, [np.diag(f) if f.ndim == 1 else f for f in self.factors]))

    @property
    def arrays(self) -> Array | tuple[Array, ...]:
        """The moments as `candidates` takes them: ``[in, in]``, the diagonal ``[in]``, or one such for each axis."""
        return self.factors[0] if len(self.factors) == 1 else self.factors

    @property
    def exact(self) -> bool:
        """Whether these are the moments, and not a Kronecker product or a diagonal near them."""
        return len(self.factors) == 1 and self.factors[0].ndim == 2 and not self.shared

    def metric(self, modes: Sequence[int] | None = None, regularization: float | None = None) -> Metric:
        """For truncation of a matrix whose input has these modes; by default one for each factor.

        Where few rows were seen, directions that they do not show are given more weight. TNCompileError for modes
        that fit neither into the factors nor around them.
        """
        if regularization is None:
            regularization = 1e-6 + _PRIOR * math.prod(self.modes) / max(1, self.rows)
        modes = tuple(modes or self.modes)
        if math.prod(modes) != math.prod(self.modes):
            raise TNCompileError(f"an input of {math.prod(self.modes)} numbers has no modes {modes}")
        scales: list[Array] = []
        inverses: list[Array] = []
        for factor, inner in _aligned(self.factors, modes):
            part = Metric.of_moments(factor, inner, regularization)
            scales += part.scales
            inverses += part.inverses
        return Metric(tuple(scales), tuple(inverses))

    def norm(self, matrix: Array) -> float:
        """``sqrt(E |x D|^2)`` for a matrix ``D[in, out]``: how large the layer's output is, or its error."""
        tensor = np.asarray(matrix, np.float64).reshape(*self.modes, -1)
        weighed = tensor
        for axis, factor in enumerate(self.factors):
            weighed = apply(factor, weighed, axis)
        return math.sqrt(max(0.0, float(np.vdot(tensor, weighed))))

    def error(self, exact: Array, other: Array) -> float:
        """The relative error that a matrix in the place of another makes in the layer's output."""
        norm = self.norm(exact)
        wrong = self.norm(np.asarray(exact, np.float64) - other)
        return wrong / norm if norm else (0.0 if wrong == 0 else math.inf)

    def centred(self) -> Moments:
        """The covariances: what is left to err where a bias follows the mean. TNCompileError for several factors."""
        if len(self.factors) > 1:
            raise TNCompileError("moments that are a Kronecker product have no covariances of that form")
        (factor,) = self.factors
        shift = self.mean**2 if factor.ndim == 1 else np.outer(self.mean, self.mean)
        return replace(self, factors=(factor - shift,))


def local_error(exact: Array, other: Array, moments: Moments | None) -> float:
    """``|x (W - V)| / |x W|`` over inputs of some moments; of the weights where there are none."""
    if moments is not None:
        return moments.error(exact, other)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - other)) / norm if norm else 0.0


def _aligned(factors: Sequence[Array], modes: Sequence[int]) -> list[tuple[Array, tuple[int, ...]]]:
    """Factors, joined where a mode is of several, each with its modes."""
    found: list[tuple[Array, tuple[int, ...]]] = []
    left, sizes = list(modes), list(factors)
    while sizes:
        factor, inner = sizes.pop(0), list[int]()
        while math.prod(inner) != len(factor):
            if left and len(factor) % (math.prod(inner) * left[0]) == 0:
                inner.append(left.pop(0))
            elif sizes:
                other = sizes.pop(0)
                both = [np.diag(f) if f.ndim == 1 and factor.ndim + other.ndim > 2 else f for f in (factor, other)]
                factor = np.kron(*both)
            else:
                raise TNCompileError(f"modes {tuple(modes)} do not fit moments of {tuple(map(len, factors))}")
        found.append((factor, tuple(inner)))
    while left and left[-1] == 1:
        factor, inner_ = found.pop()
        found.append((factor, (*inner_, left.pop())))
    return found


@dataclass(frozen=True, eq=False)
class Cross:
    """Moments of a layer's input in the model (`before`, ``x``) and with weights replaced (`after`, ``x'``), and
    between them: ``between = E x'' x [in, in]``, rows those of ``x'``."""

    before: Moments
    after: Moments
    between: Array = field(repr=False)


# ------------------------------------------------------------------------------------ collecting


def moments(
    sites: Sequence[Site],
    runner: Runner,
    calibration: Calibration,
    weights: Mapping[str, Array] | None = None,
) -> dict[str, Moments]:
    """Moments of the input of every weight of some sites, by the weight's name, with `weights` replaced.

    Weights that share an input share them. Of inputs of over `LARGEST` numbers they are a Kronecker product, of tables
    the shares of the rows that are read. Weights whose input no value of the model shows are left out.
    """
    found: dict[str, Moments] = {}
    for group in _passes(_collectors(sites, runner)):
        for seed, feeds in enumerate(calibration):
            values = runner.run(feeds, weights, _values(group), outputs=False).values
            for collector in group:
                collector.add(values, seed, len(calibration))
        for collector in group:
            found |= dict.fromkeys(collector.names, collector.moments())
    return found


def crosses(
    sites: Sequence[Site],
    before: Upstream,
    after: Upstream,
    weights: Mapping[str, Array],
    changing: Collection[str] | None = None,
) -> dict[str, Cross]:
    """What `moments` gives of the model as it came in, run by `before`, and with weights replaced, by `after`, and the
    moments between the two, by name; only for weights whose moments are exact.

    Both advance to the weights that are `changing`, which the sites' inputs do not depend on.
    """
    found: dict[str, Cross] = {}
    collectors = [c for c in _collectors(sites, before.runner) if c.exact]
    if changing is not None:
        before.advance(changing, None, _values(collectors))
        after.advance(changing, weights, _values(collectors))
    for group in _passes(collectors):
        pairs = [(c, _Collector(c.names, c.uses, c.groups, c.size)) for c in group]
        between: list[Array | float] = [0.0] * len(group)
        runs = zip(before.runs(None, _values(group)), after.runs(weights, _values(group)), strict=True)
        for seed, (exact, changed) in enumerate(runs):
            for k, (one, other) in enumerate(pairs):
                x = one.add(exact.values, seed, len(before.calibration))
                y = other.add(changed.values, seed, len(before.calibration))
                between[k] = between[k] + sum(b.T @ a for a, b in zip(x, y, strict=True))
        for (one, other), total in zip(pairs, between, strict=True):
            cross = Cross(one.moments(), other.moments(), np.asarray(total) / max(1, one.rows))
            found |= dict.fromkeys(one.names, cross)
    return found


def _values(group: Sequence[_Collector]) -> list[str]:
    return sorted({value for c in group for use in c.uses for value in use.values})


def _collectors(sites: Sequence[Site], runner: Runner) -> list[_Collector]:
    """One for each set of inputs, the largest first."""
    parts: dict[str, Part] = {part.name: part for site in sites for part in site.parts}
    uses = readings(separate(runner.model), parts.values())
    alike: dict[object, list[str]] = {}
    for name in parts:
        if name in uses:
            sizes = tuple(parts[name].array.shape[axis] for axis in parts[name].ins)
            alike.setdefault((sizes, tuple(map(_key, uses[name]))), []).append(name)
    found = []
    for names in alike.values():
        part = parts[names[0]]
        found.append(_Collector(tuple(names), uses[part.name], _groups(part), part.size(part.ins)))
    return sorted(found, key=lambda c: -c.bytes)


def _key(use: Reading | Lookup) -> object:
    """What two readings have in common that read the same rows."""
    if isinstance(use, Lookup):
        return use
    if use.shared or len(use.tensors) > 1:
        return id(use)
    (tensor,) = use.tensors
    place = {i.name: k for k, i in enumerate(tensor.indices)}
    windows = tuple((place[w.axis], n, w.stride, w.dilation, w.padding) for w, n in use.windows)
    kernels = {w.kernel: -1 - k for k, (w, _) in enumerate(use.windows)}
    return tensor.name, tuple((place | kernels)[i.name] for i in use.ins), windows


def _groups(part: Part) -> tuple[int, ...]:
    """The sizes of the factors of a part's moments: one, or the axes apart (of one axis, a diagonal: 0)."""
    sizes = [part.array.shape[axis] for axis in part.ins if part.array.shape[axis] > 1]
    total = math.prod(sizes)
    if part.gathered:
        return (0,)
    if total <= LARGEST:
        return (total,)
    return tuple(sizes) if max(sizes) <= LARGEST else (0,)


def _passes(collectors: Sequence[_Collector]) -> list[list[_Collector]]:
    """Collectors that fit into memory together."""
    found: list[list[_Collector]] = []
    room = 0
    for collector in collectors:
        if not found or collector.bytes > room:
            found.append([])
            room = _MEMORY
        found[-1].append(collector)
        room -= collector.bytes
    return found


class _Collector:
    """Sums of the moments of one input, which some weights share."""

    def __init__(
        self, names: tuple[str, ...], uses: Sequence[Reading | Lookup], groups: tuple[int, ...], size: int
    ) -> None:
        self.names = names
        self.size = size
        self.uses = uses
        self.groups = groups
        self.rows = 0
        self.sums: list[Array | float] = [0.0] * len(groups)
        self.total: Array | float = 0.0

    @property
    def bytes(self) -> int:
        """Memory for the sums, and for what is computed of one run."""
        return sum(12 * n * n for n in self.groups)

    @property
    def exact(self) -> bool:
        """Whether the moments are those of one matrix, and whole."""
        whole = len(self.groups) == 1 and self.groups[0] > 0
        return whole and not any(isinstance(use, Lookup) or use.shared for use in self.uses)

    def add(self, values: Mapping[str, Array], seed: int, runs: int) -> list[Array]:
        """Take one of so many runs in; the rows of each use ``[rows, in]``, none of a lookup."""
        seen = []
        for use in self.uses:
            if isinstance(use, Lookup):
                self._count(values[use.ids])
                continue
            most = math.ceil(self._most / (runs * len(self.uses)))
            rows = use.rows(values, most, seed)
            flat = rows.reshape(len(rows), -1)
            self.rows += len(flat)
            self.total = self.total + flat.sum(0, dtype=np.float64)
            if self.groups == (0,):
                self._add(0, np.square(flat, dtype=np.float64).sum(0))
            elif len(self.groups) == 1:
                self._add(0, flat.T @ flat)
            else:
                split = flat.reshape(len(flat), *self.groups)
                for k in range(len(self.groups)):
                    side = np.moveaxis(split, 1 + k, -1).reshape(-1, self.groups[k])
                    self._add(k, side.T @ side)
            seen.append(flat)
        return seen

    @property
    def _most(self) -> int:
        """Rows that are worth the time."""
        largest = max(*self.groups, 1)
        return int(max(4 * largest, _WORK / (2 * largest * math.prod(g for g in self.groups if g))))

    def _add(self, k: int, part: Array) -> None:
        self.sums[k] = self.sums[k] + part.astype(np.float64, copy=False)

    def _count(self, ids: Array) -> None:
        ids = ids.reshape(-1)
        ids = np.clip(np.where(ids < 0, ids + self.size, ids), 0, self.size - 1)  # ONNX counts some from the end
        self._add(0, np.bincount(ids, minlength=self.size))
        self.rows += ids.size

    def moments(self) -> Moments:
        """What was collected."""
        rows, shared = max(1, self.rows), any(isinstance(u, Reading) and u.shared for u in self.uses)
        if any(isinstance(use, Lookup) for use in self.uses):  # a row that was not read may be: as if each was once
            share = (np.asarray(self.sums[0]) + 1) / (rows + self.size)
            return Moments((share,), share, self.rows)
        parts = [np.asarray(total) / rows for total in self.sums]
        power = float(np.trace(parts[-1])) if len(parts) > 1 else 1.0  # of a product the traces multiply
        factors = (parts[0], *(p / power if power > 0 else p for p in parts[1:]))
        return Moments(factors, np.asarray(self.total) / rows, self.rows, shared)
