"""How large the bonds of a factorization become: given, by an error, or by a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.errors import TNCompileError
from tncompile.ir import Array

Sizes = dict[str, int]
"""The size of each bond, by name."""


class NoGainError(TNCompileError):
    """The factorization would have as many parameters as the dense tensor, or more than were allowed."""


@dataclass(frozen=True)
class Ranks:
    """What bonds may become; of the first three at most one, and without any the result is exact.

    `given`: one rank for all bonds, or one for each in the format's order of bonds. `error`: the largest relative error
    in the Frobenius norm. `parameters`: the largest number of parameters. Both of these keep the largest singular
    values of all bonds together, down to one threshold. `larger` allows results with as many parameters as the dense
    tensor or more, which are refused otherwise. Raises TNCompileError for values that mean nothing.
    """

    given: int | tuple[int, ...] | None = None
    error: float | None = None
    parameters: int | None = None
    larger: bool = False

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.given, self.error, self.parameters)) > 1:
            raise TNCompileError("ranks are given, or follow from an error, or from a number of parameters: name one")
        given = (self.given,) if isinstance(self.given, int) else self.given or ()
        if any(rank < 1 for rank in given):
            raise TNCompileError(f"ranks must be 1 or more, not {self.given}")
        if self.error is not None and not 0 <= self.error < 1:
            raise TNCompileError(f"a relative error is at least 0 and below 1, not {self.error}")
        if self.parameters is not None and self.parameters < 1:
            raise TNCompileError(f"a number of parameters is 1 or more, not {self.parameters}")

    def named(self, bonds: Sequence[str]) -> Sizes:
        """The given ranks by the names of bonds; TNCompileError where their number differs."""
        given = (self.given,) * len(bonds) if isinstance(self.given, int) else self.given or ()
        if len(given) != len(bonds):
            raise TNCompileError(f"{len(given)} ranks for {len(bonds)} bonds: {', '.join(bonds)}")
        return dict(zip(bonds, given, strict=True))

    def choose(self, spectra: Mapping[str, Array], size: Callable[[Sizes], int], norm: float) -> Sizes:
        """Ranks by one threshold on the singular values across all bonds.

        `size` counts the parameters at some ranks, `norm` is that of the whole tensor. The squared error of a
        sequence of truncations is at most the sum of all squares that are dropped, so keeping the largest values of
        all is the best that a bound on it can choose. Raises NoGainError where rank 1 everywhere has too many
        parameters.
        """
        if self.given is not None:
            return self.named(tuple(spectra))
        names = tuple(spectra)
        values = np.concatenate([spectra[n] for n in names]) if names else np.zeros(0)
        owner = np.repeat(np.arange(len(names)), [len(spectra[n]) for n in names])
        order = np.argsort(-values, kind="stable")
        values, owner = values[order], owner[order]

        def ranks(kept: int) -> Sizes:
            counts = np.bincount(owner[:kept], minlength=len(names))
            return {n: max(1, int(c)) for n, c in zip(names, counts, strict=True)}

        if self.parameters is None:
            dropped = np.append(np.cumsum((values**2)[::-1])[::-1], 0.0)
            limit = (self.error or 0.0) * norm * (1 - 1e-5)  # the values may be rounded
            return ranks(int(np.argmax(dropped <= limit**2)))
        if size(ranks(0)) > self.parameters:
            raise NoGainError(
                f"even with every rank 1 there are {size(ranks(0)):,} parameters, more than {self.parameters:,}: "
                "factorize into other modes, or allow more"
            )
        low, high = 0, len(values)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(ranks(middle)) <= self.parameters else (low, middle - 1)
        chosen, full = ranks(low), set[str]()
        for owned in owner[low:]:  # a smaller value may still fit where a larger one of another bond does not
            name = names[owned]
            larger = {**chosen, name: chosen[name] + 1}
            if name not in full and size(larger) <= self.parameters:
                chosen = larger
            else:
                full.add(name)
        return chosen

    def require_gain(self, what: str, parameters: int, dense: int) -> None:
        """Raise NoGainError where a result is no smaller than the dense tensor, unless `larger` allows that."""
        if parameters >= dense and not self.larger:
            raise NoGainError(
                f"a {what} would have {parameters:,} parameters and the dense tensor has {dense:,}, no gain: "
                "allow a larger error, give smaller ranks or other modes, or say Ranks(larger=True)"
            )


EXACT = Ranks()
"""Every singular value above rounding is kept."""


def rounding(rows: int, columns: int, largest: float) -> float:
    """The size below which a singular value of a float64 matrix is rounding, as in numpy's `matrix_rank`."""
    return max(rows, columns) * float(np.finfo(np.float64).eps) * largest


def clamp(ranks: Sizes, limits: Callable[[Sizes], Mapping[str, int]]) -> tuple[Sizes, tuple[str, ...]]:
    """Lower ranks until none is above its limit, which depends on the others; with a note for each that was lowered."""
    lowered = dict(ranks)
    while True:
        most = limits(lowered)
        over = [n for n, r in lowered.items() if r > most.get(n, math.inf)]
        if not over:
            break
        lowered.update({n: most[n] for n in over})
    notes = [f"rank {r} of {n} is {lowered[n]}: more is of no use" for n, r in ranks.items() if r > lowered[n]]
    return lowered, tuple(notes)
