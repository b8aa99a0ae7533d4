"""Large tensor networks of common shapes, as programs: what `benchmarks.planning` plans."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from tncompile.ir import Index, Network, Program, Tensor, Term, Value

MODE, BOND = 2, 4


class _Builder:
    """Collects the cores of a network, and an operand ``x[batch, mode]`` for each open mode of a core."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.cores: list[list[str]] = []
        self.open: list[tuple[int, str]] = []

    def core(self, bonds: list[tuple[str, int]], mode: int | None = MODE) -> None:
        """Add a core with some bonds and, unless None, a mode of its own."""
        self.sizes |= dict(bonds)
        names = [name for name, _ in bonds]
        if mode is not None:
            name = f"k{len(self.cores)}"
            self.sizes[name] = mode
            self.open.append((len(self.cores), name))
            names.append(name)
        self.cores.append(names)

    def program(self, operands: int | None = None) -> Program:
        """One network ``y[batch]``: an operand on each open mode, or one operand on the first few, and a product of
        the others' modes with constant vectors."""
        batch = Index("batch", "batch")
        generator = np.random.default_rng(0)

        def core(name: str, indices: list[str]) -> Tensor:
            shape = [self.sizes[i] for i in indices]
            data = generator.standard_normal(shape).astype(np.float32) / np.float32(math.sqrt(math.prod(shape) or 1))
            return Tensor(name, tuple((Index(i, self.sizes[i]),) for i in indices), data)

        modes = [(k, Index(i, self.sizes[i])) for k, i in self.open]
        flowing: dict[int, Tensor] = {}
        if operands is None:
            flowing = {k: Tensor(f"x{k}", ((batch,), (index,))) for k, index in modes}
        else:
            operands = min(operands, len(modes))
            first = Tensor("x", ((batch,), tuple(index for _, index in modes[:operands])))
            flowing = {modes[operands - 1][0]: first}
            flowing |= {k: core(f"vector_{k}", [index.name]) for k, index in modes[operands:]}
        tensors = []  # each core with what meets it, so that the order as traced is one that can be run
        for k, names in enumerate(self.cores):
            tensors += [core(f"core_{k}", names), *([flowing[k]] if k in flowing else [])]
        network = Network("", (Term(tuple(tensors)),), Tensor("y", ((batch,),)), "float32")
        inputs = tuple(Value(t.name, "float32", t.shape) for t in network.operands)
        return Program(inputs, (network,), (("y", "y"),))


def chain(cores: int) -> _Builder:
    """A tensor train (matrix product state)."""
    builder = _Builder()
    for k in range(cores):
        builder.core([(f"b{j}", BOND) for j in (k, k + 1) if 0 < j < cores])
    return builder


def ring(cores: int) -> _Builder:
    """A tensor ring."""
    builder = _Builder()
    for k in range(cores):
        builder.core([(f"b{k}", BOND), (f"b{(k + 1) % cores}", BOND)])
    return builder


def grid(cores: int) -> _Builder:
    """A grid of four rows (PEPS), bonds of 2."""
    builder, rows = _Builder(), 4
    for k in range(cores):
        column, row = divmod(k, rows)
        bonds = [f"h{column}_{row}"] if k + rows < cores else []
        bonds += [f"h{column - 1}_{row}"] if column else []
        bonds += [f"v{column}_{row}"] if row < rows - 1 and k + 1 < cores else []
        bonds += [f"v{column}_{row - 1}"] if row else []
        builder.core([(name, 2) for name in bonds])
    return builder


def tree(cores: int) -> _Builder:
    """A binary tree, with modes at its leaves."""
    builder = _Builder()

    def grow(k: int) -> None:
        children = [c for c in (2 * k + 1, 2 * k + 2) if c < cores]
        for child in children:
            grow(child)
        bonds = [(f"b{c}", BOND) for c in ([k] if k else []) + children]
        builder.core(bonds, None if children else MODE)

    grow(0)
    return builder


def cp(cores: int) -> _Builder:
    """Factors that share one bond (CP)."""
    builder = _Builder()
    for _ in range(cores):
        builder.core([("r", 8)])
    return builder


def hyper(cores: int) -> _Builder:
    """Cores at random places of a chain of neighbours, every fourth bond on three of them."""
    builder, draw = _Builder(), random.Random(0)
    bonds: list[list[str]] = [[] for _ in range(cores)]
    for k in range(1, cores):
        name = f"b{k}"
        ends = {k, max(0, k - draw.randint(1, 4))}
        if k % 4 == 0:
            ends.add(max(0, k - draw.randint(5, 8)))
        for end in ends:
            bonds[end].append(name)
    for names in bonds:
        builder.core([(name, 2) for name in names])
    return builder


SHAPES: Mapping[str, Callable[[int], _Builder]] = MappingProxyType(
    {"chain": chain, "ring": ring, "grid": grid, "tree": tree, "cp": cp, "hyper": hyper}
)
ONE_OPERAND = 6
"""Modes of the one operand, where it is not one for each core."""


def networks(cores: int) -> Iterator[tuple[str, Program]]:
    """Every shape with so many cores: an operand for each, and one operand alone."""
    for name, make in SHAPES.items():
        yield f"{name}, an operand a core", make(cores).program()
        yield f"{name}, one operand", make(cores).program(ONE_OPERAND)
