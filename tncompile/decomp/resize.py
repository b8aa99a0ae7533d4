"""Bonds that grow without changing the function, and shrink to an error."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tncompile.decomp.base import Factorized
from tncompile.decomp.ranks import Ranks
from tncompile.errors import TNCompileError

if TYPE_CHECKING:
    from tncompile.decomp.module import FactorizedModule

F = TypeVar("F", bound=Factorized)


def grow(factorized: F, bond: str, to: int, seed: int = 0) -> F:
    """The same tensor with a larger bond: `inflate` for cores."""
    if bond not in factorized.bonds:
        raise TNCompileError(f"a {factorized.KIND} has no bond {bond}: it has {', '.join(factorized.bonds)}")
    now = factorized.ranks[bond]
    if to < now:
        raise TNCompileError(f"bond {bond} has size {now} and cannot grow to {to}: truncate makes it smaller")
    generator = np.random.default_rng(seed)
    holders = [k for k, names in enumerate(factorized.labels) if bond in names]
    cores = list(factorized.cores)
    for k in holders:
        core, axis = cores[k], factorized.labels[k].index(bond)
        shape = tuple(to - now if n == axis else size for n, size in enumerate(core.shape))
        scale = float(np.sqrt(np.mean(core**2)))
        new = np.zeros(shape) if k == holders[-1] else scale * generator.standard_normal(shape)
        cores[k] = np.concatenate([core, new], axis)
    return replace(factorized, cores=tuple(cores))


def inflate(target: F | FactorizedModule, bond: str, to: int, seed: int = 0) -> F | FactorizedModule:
    """A factorization, or a module of one, whose bond has size `to`, and which computes the same.

    What is new is zero on the last core that has the bond, so that the function stays, and random of the core's scale
    on the others, so that training can use it at once: the gradient of the zeros is not zero. Raises TNCompileError
    for a bond that there is not, and for a size below its own.
    """
    if isinstance(target, Factorized):
        return grow(target, bond, to, seed)
    return target.with_cores(grow(target.factorized(), bond, to, seed))


def truncate(target: F | FactorizedModule, ranks: Ranks) -> F | FactorizedModule:
    """A factorization, or a module of one, with bonds shrunk to an error, to ranks or to a number of parameters."""
    if isinstance(target, Factorized):
        smaller: F = target.truncated(ranks)  # type: ignore[assignment]  # every format returns its own
        return smaller
    return target.with_cores(target.factorized().truncated(ranks))
