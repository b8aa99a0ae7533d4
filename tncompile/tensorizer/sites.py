"""Where a model can be tensorized: its large weights, each seen as a matrix from what is contracted to what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tncompile.decomp import SVD, Factorized
from tncompile.errors import TNCompileError
from tncompile.frontend.factors import Core, Factors
from tncompile.frontend.model import ImportedModel
from tncompile.ir import Array, Network, Program, Term
from tncompile.passes import Clean, Context, Fold, Pipeline
from tncompile.passes.positions import tables_of
from tncompile.tensorizer.held import Held, held

MIN_SIZE = 1024
"""Weights of fewer numbers are left alone: there is nothing to gain."""


@dataclass(frozen=True)
class Use:
    """One network that contracts the weight: the tensor at `position` of one of its terms."""

    network: Network = field(repr=False)
    term: Term = field(repr=False)
    position: int


@dataclass(frozen=True)
class Part:
    """A weight of the model as it came in, and which of its axes are contracted with what comes from the input.

    `name` is the program's name for it. Axes `ins` are contracted (for a table, `gathered`, its rows); all others are
    `outs`. `uses` are networks of the folded program (see `composed`), none for a table, nor for what a node has to
    have whole (`held`: see `tensorizer.held`).
    """

    name: str
    array: Array = field(repr=False)
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    uses: tuple[Use, ...] = ()
    gathered: bool = False
    held: bool = False

    @property
    def matrix(self) -> Array:
        """The weight as a matrix [in, out], a view where that can be."""
        return self.array.transpose(*self.ins, *self.outs).reshape(self.size(self.ins), self.size(self.outs))

    def size(self, axes: Iterable[int]) -> int:
        """The product of the sizes of some axes."""
        return math.prod(self.array.shape[axis] for axis in axes)

    def restored(self, matrix: Array) -> Array:
        """A matrix [in, out] in the shape of the weight."""
        axes = (*self.ins, *self.outs)
        return matrix.reshape([self.array.shape[axis] for axis in axes]).transpose(np.argsort(axes))


@dataclass(frozen=True)
class Site:
    """What is replaced at once: a weight, or several side by side along their outputs, that read the same input; or,
    `apart`, each its own."""

    parts: tuple[Part, ...]
    apart: bool = False

    @property
    def name(self) -> str:
        """The weight's name, or those of all."""
        return ("&" if self.apart else "+").join(part.name for part in self.parts)

    @cached_property
    def matrix(self) -> Array:
        """All parts as one matrix [in, out]."""
        return np.concatenate([part.matrix for part in self.parts], axis=1)

    @property
    def size(self) -> int:
        """Numbers in the weights."""
        return sum(part.array.size for part in self.parts)

    def restored(self, matrix: Array) -> dict[str, Array]:
        """The weights of another matrix, by name, each in its own shape and dtype."""
        pieces = zip(self.parts, self.split(matrix), strict=True)
        return {part.name: part.restored(piece).astype(part.array.dtype) for part, piece in pieces}

    def split(self, array: Array) -> list[Array]:
        """An array whose last axis has the outputs of all parts, cut into those of each."""
        return np.split(array, np.cumsum([part.size(part.outs) for part in self.parts])[:-1], axis=-1)

    @property
    def held(self) -> bool:
        """Whether nodes have to have its weights whole."""
        return any(part.held for part in self.parts)

    @property
    def in_sizes(self) -> tuple[int, ...]:
        """The sizes of the axes that are contracted."""
        return tuple(self.parts[0].array.shape[axis] for axis in self.parts[0].ins)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """The sizes of the axes that are left; of several parts one axis."""
        if len(self.parts) > 1:
            return (self.matrix.shape[1],)
        return tuple(self.parts[0].array.shape[axis] for axis in self.parts[0].outs)


@dataclass(frozen=True)
class Replacement:
    """A factorization in the place of a site's matrix. TNCompileError where it is of another shape, or where a site of
    several parts gets anything but an SVD, whose left factor they share."""

    site: Site
    factorized: Factorized

    def __post_init__(self) -> None:
        rows, columns = math.prod(self.site.in_sizes), math.prod(self.site.out_sizes)
        if self.factorized.shape != (rows, columns):
            raise TNCompileError(f"{self.site.name} is {rows} x {columns}, not {self.factorized.shape}")
        if len(self.site.parts) > 1 and not isinstance(self.factorized, SVD):
            raise TNCompileError(f"{self.site.name}: several weights can share the factor of an SVD only")

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return self.factorized.parameters

    def factors(self) -> tuple[Factors, ...]:
        """What `frontend.factors.substitute` puts in the place of each weight: cores ``fc1.weight.core_0``, ...; of
        several weights the first one's left factor is that of all."""
        cores, labels = self.factorized.cores, self.factorized.labels
        names = [f"core_{k}" for k in range(len(cores))]
        modes, found = tuple(self.factorized.modes), list[Factors]()
        shared = Core(f"{self.site.parts[0].name}.{names[0]}", cores[0], labels[0])
        for k, part in enumerate(self.site.parts):
            own = [Core(f"{part.name}.{n}", c, on) for n, c, on in zip(names, cores, labels, strict=True)]
            if len(self.site.parts) > 1:
                own = [shared, replace(own[1], array=self.site.split(cores[1])[k])]
            axes = (*part.ins, *part.outs)
            sizes = tuple(part.array.shape[axis] for axis in axes)
            found.append(Factors(part.name, tuple(own), modes, sizes, tuple(int(a) for a in np.argsort(axes))))
        return tuple(found)

    def dense(self) -> dict[str, Array]:
        """What each weight becomes, by name, in its own shape and dtype."""
        return self.site.restored(self.factorized.dense())


def composed(model: ImportedModel, context: Context | None = None) -> Program:
    """The program with layers composed and every weight still a core of its own."""
    program, _ = Pipeline((Clean(), Fold(add=False), Clean()), scheduled=False).run(model.program, context or Context())
    return program


def separate(model: ImportedModel, context: Context | None = None) -> Program:
    """The program with every layer on its own: the operand beside a weight is what its layer reads in the model."""
    passes = (Clean(), Fold(apart=True, add=False), Clean())
    program, _ = Pipeline(passes, scheduled=False).run(model.program, context or Context())
    return program


def sites_of(program: Program, minimum: int = MIN_SIZE) -> tuple[Site, ...]:
    """The weights of `minimum` numbers or more that a composed program contracts or its nodes hold, each a site of its
    own.

    A weight that is used in several ways is none where its axes play different parts; nor is one that a pass has made
    from others, whose array the model does not have. A table that is contracted too, as a tied head, is what it is
    contracted as.
    """
    found: dict[str, Part | None] = {}
    for use in _uses(program):
        core = use.term.tensors[use.position]
        if core.data is None or core.data.size < minimum or core.recipe is not None:
            continue
        roles = _roles(use)
        if roles is None or (core.name in found and not _fits(found[core.name], roles, core.data)):
            found[core.name] = None
            continue
        known = found.get(core.name)
        uses = (*(known.uses if known is not None else ()), use)
        found[core.name] = Part(core.name, core.data, *roles, uses)
    for name, array in tables_of(program).values():
        if array.size >= minimum and name not in found:
            found[name] = Part(name, array, (0,), (1,), gathered=True)
    for one in held(program):
        array = program.weights[one.weight]
        own = program.sources(one.weight) == (one.weight,)
        if one.weight in found and one.rows is None and not _same(found[one.weight], one):
            found[one.weight] = None
        elif array.size >= minimum and own and one.weight not in found:
            found[one.weight] = Part(one.weight, array, one.ins, one.outs, gathered=one.rows is not None, held=True)
    return tuple(Site((part,)) for part in found.values() if part is not None)


def joint_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites of several weights that read the same value over the same modes, such as queries, keys and values."""
    groups: dict[object, list[Part]] = {}
    for site in sites:
        (part,) = site.parts
        if len(part.uses) == 1 and not part.uses[0].term.windows:
            term = part.uses[0].term
            if len(term.operands) == 1 and len(term.tensors) == 2:
                sizes = tuple(part.array.shape[axis] for axis in part.ins)
                groups.setdefault((term.operands[0].name, sizes, part.array.dtype), []).append(part)
    return tuple(Site(tuple(parts)) for parts in groups.values() if len(parts) > 1)


def _uses(program: Program) -> Iterator[Use]:
    for network in program.networks:
        for term in network.terms:
            if not term.is_constant:
                for position, tensor in enumerate(term.tensors):
                    if tensor.is_core:
                        yield Use(network, term, position)


def _roles(use: Use) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of a core that lead to an operand, and the others; None where one of the two is of size 1."""
    core = use.term.tensors[use.position]
    inner = _reached(use.term, use.position) - {i.name for i in use.network.output.indices}
    ins, outs = list[int](), list[int]()
    for axis, group in enumerate(core.axes):
        names = {index.name for index in group if index.size != 1}
        (ins if names and names <= inner else outs).append(axis)
    sizes = [math.prod(int(core.shape[axis]) for axis in axes) for axes in (ins, outs)]
    return (tuple(ins), tuple(outs)) if min(sizes) > 1 else None


def _reached(term: Term, position: int) -> set[str]:
    """Indices of a core that lead to an operand without passing through the core itself."""
    others = [t for k, t in enumerate(term.tensors) if k != position]
    reached = {i.name for t in others if not t.is_core for i in t.indices}
    reached |= {w.kernel for w in term.windows if w.axis in reached}
    while True:
        more = {i.name for t in others if {j.name for j in t.indices} & reached for i in t.indices}
        more |= {w.kernel for w in term.windows if w.axis in reached | more}
        if more <= reached:
            return reached
        reached |= more


def _same(known: Part | None, one: Held) -> bool:
    """Whether a node holds a weight as others do."""
    return known is not None and known.held and (known.ins, known.outs) == (one.ins, one.outs)


def _fits(known: Part | None, roles: tuple[tuple[int, ...], tuple[int, ...]], array: Array) -> bool:
    return known is not None and (known.ins, known.outs) == roles and known.array is array
