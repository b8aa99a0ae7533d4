"""Small tensor networks of every common format, as programs: what the planner is judged on by `benchmarks.oracle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.ir import Index, Network, Program, Tensor, Term, Value


@dataclass(frozen=True)
class Layer:
    """A tensorized linear layer: an einsum of x[batch, (i ...)] with cores, and the sizes of its indices."""

    name: str
    operand: str
    cores: tuple[str, ...]
    output: str
    sizes: dict[str, int]

    def program(self) -> Program:
        """The layer as a program of one network, with cores of random numbers."""
        generator = np.random.default_rng(0)
        index = {name: Index(name, size) for name, size in self.sizes.items()}
        batch = Index("batch", "batch")

        def axes(names: str) -> tuple[Index, ...]:
            return tuple(index[n] for n in names)

        def core(number: int, names: str) -> Tensor:
            shape = [self.sizes[n] for n in names]
            data = generator.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape))
            return Tensor(f"core_{number}", tuple((index[n],) for n in names), data.astype(np.float32))

        x = Tensor("x", ((batch,), axes(self.operand)))
        y = Tensor("y", ((batch,), axes(self.output)))
        term = Term((x, *(core(k, names) for k, names in enumerate(self.cores))))
        network = Network("", (term,), y, "float32")
        return Program((Value("x", "float32", x.shape),), (network,), (("y", "y"),))


def _sizes(groups: Sequence[tuple[str, Sequence[int] | int]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for names, given in groups:
        numbers = [given] * len(names) if isinstance(given, int) else list(given)
        sizes |= dict(zip(names, numbers, strict=True))
    return sizes


def tt_matrix(inputs: Sequence[int], outputs: Sequence[int], rank: int, ring: bool = False) -> Layer:
    """A TT-matrix (MPO), or with a bond from the last core to the first a tensor ring."""
    sites = len(inputs)
    i, o, bonds = "ijklm"[:sites], "abcde"[:sites], "pqrst"[: sites if ring else sites - 1]
    cores = []
    for k in range(sites):
        left = bonds[k - 1] if k or ring else ""
        right = bonds[k] if k < len(bonds) else ""
        cores.append(left + i[k] + o[k] + right)
    sizes = _sizes([(i, inputs), (o, outputs), (bonds, rank)])
    form = "ring" if ring else "TT"
    return Layer(f"{form} {_by(inputs)} to {_by(outputs)}, rank {rank}", i, tuple(cores), o, sizes)


def mps(inputs: Sequence[int], outputs: Sequence[int], rank: int) -> Layer:
    """A TT of the weight as one long tensor: the inputs' sites, then the outputs'."""
    i, o = "ijk"[: len(inputs)], "abc"[: len(outputs)]
    sites, bonds = i + o, "pqrst"[: len(inputs) + len(outputs) - 1]
    cores = tuple(bonds[k - 1 : k] * (k > 0) + site + bonds[k : k + 1] for k, site in enumerate(sites))
    sizes = _sizes([(i, inputs), (o, outputs), (bonds, rank)])
    return Layer(f"MPS {_by(inputs)} to {_by(outputs)}, rank {rank}", i, cores, o, sizes)


def tucker(inputs: Sequence[int], outputs: Sequence[int], rank: int) -> Layer:
    """A core tensor with a factor on every mode."""
    i, o = "ijk"[: len(inputs)], "abc"[: len(outputs)]
    inner = "pqrstu"[: len(i + o)]
    cores = (inner, *(mode + bond for mode, bond in zip(i + o, inner, strict=True)))
    sizes = _sizes([(i, inputs), (o, outputs), (inner, rank)])
    return Layer(f"Tucker {_by(inputs)} to {_by(outputs)}, rank {rank}", i, cores, o, sizes)


def cp(inputs: Sequence[int], outputs: Sequence[int], rank: int) -> Layer:
    """A factor on every mode, all on one hyperedge."""
    i, o = "ijk"[: len(inputs)], "abc"[: len(outputs)]
    sizes = _sizes([(i, inputs), (o, outputs), ("r", rank)])
    return Layer(f"CP {_by(inputs)} to {_by(outputs)}, rank {rank}", i, tuple(m + "r" for m in i + o), o, sizes)


def tree(inputs: Sequence[int], outputs: Sequence[int], rank: int) -> Layer:
    """Hierarchical Tucker: a leaf for each pair of modes, joined two by two."""
    i, o = "ijk"[: len(inputs)], "abc"[: len(outputs)]
    if len(i) == 2:
        cores, bonds = ("ip", "jq", "pqt", "tab"), "pqt"
    else:
        cores, bonds = ("iap", "jbq", "pqt", "tkc"), "pqt"
    sizes = _sizes([(i, inputs), (o, outputs), (bonds, rank)])
    return Layer(f"HT {_by(inputs)} to {_by(outputs)}, rank {rank}", i, cores, o, sizes)


def block(inputs: Sequence[int], outputs: Sequence[int], rank: int) -> Layer:
    """Block TT of two cores (BTT, of which Monarch is rank 1): each has a mode that the other has too."""
    sizes = _sizes([("ij", inputs), ("ab", outputs), ("r", rank)])
    return Layer(f"BTT {_by(inputs)} to {_by(outputs)}, rank {rank}", "ij", ("ijar", "rjab"), "ab", sizes)


def kronecker(inputs: Sequence[int], outputs: Sequence[int]) -> Layer:
    """A Kronecker product: one core a site, no bond."""
    i, o = "ijk"[: len(inputs)], "abc"[: len(outputs)]
    sizes = _sizes([(i, inputs), (o, outputs)])
    return Layer(f"Kronecker {_by(inputs)} to {_by(outputs)}", i, tuple(map("".join, zip(i, o, strict=True))), o, sizes)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def layers() -> Iterator[Layer]:
    """At least forty layers of up to five cores."""
    for rank in (2, 8, 32):
        yield tt_matrix((32, 32), (32, 32), rank)
        yield tt_matrix((8, 8, 12), (8, 8, 8), rank)
    for rank in (4, 16):
        yield tt_matrix((4, 7, 28), (8, 8, 16), rank)
        yield tt_matrix((16, 8, 4), (4, 8, 16), rank)
        yield tt_matrix((4, 4, 8, 8), (8, 8, 4, 4), rank)
        yield tt_matrix((8, 8, 12), (16, 12, 16), rank)
        yield tt_matrix((4, 6, 8), (8, 6, 4), rank, ring=True)
        yield tt_matrix((16, 16), (16, 32), rank, ring=True)
        yield mps((16, 32), (32, 16), rank)
        yield mps((8, 8, 8), (16, 32), rank)
        yield tucker((16, 32), (32, 16), rank)
        yield tucker((24, 32), (20, 25), rank)
        yield tree((16, 32), (32, 16), rank)
        yield tree((8, 8, 8), (8, 8, 8), rank)
        yield block((16, 48), (16, 32), rank)
    for rank in (16, 64, 256):
        yield cp((24, 32), (16, 32), rank)
        yield cp((8, 8, 12), (16, 32), rank)
    yield tt_matrix((4, 4, 4, 4, 4), (4, 4, 4, 4, 4), 4)
    yield tt_matrix((4, 4, 4, 4, 3), (4, 4, 4, 4, 4), 8)
    yield block((32, 32), (32, 32), 1)
    yield block((28, 28), (32, 32), 4)
    yield kronecker((16, 32), (32, 16))
    yield kronecker((8, 8, 8), (8, 8, 16))
