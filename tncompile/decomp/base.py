"""A dense tensor written as the contraction of cores: what all formats share.

Every format is one einsum. Its `labels` name the axes of its cores: modes (``i1, i2, ...`` of the input and ``o1, o2,
...`` of the output of a matrix ``W[in, out]``, ``n1, n2, ...`` of any other tensor) and bonds. Numbers are float64.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tncompile.decomp.metric import Metric
from tncompile.decomp.ranks import Ranks, Sizes
from tncompile.errors import TNCompileError
from tncompile.ir import Array, Axis, Index, Network, Tensor, Term
from tncompile.ir.evaluate import contract, einsum

if TYPE_CHECKING:
    from tncompile.decomp.module import FactorizedModule
    from tncompile.decomp.permutation import Permutation

Axes = tuple[tuple[int, ...], ...]
"""The axes of a dense tensor, each a row-major product of modes: ``((8, 8, 12), (16, 12, 16))`` is 768 x 3072."""

Labels = tuple[tuple[str, ...], ...]
"""The names of the axes of each core."""


@dataclass(frozen=True, eq=False)
class Factorized(ABC):
    """A tensor with the given `axes`, as cores.

    `bound` is an upper bound of the relative error in the Frobenius norm (or in that of the `Metric` it was made in)
    that truncation made, guaranteed but for rounding; None where the cores did not come from a dense tensor. `notes`
    say what was done otherwise than asked, such as ranks that were clamped. Raises TNCompileError where cores do not
    fit together.
    """

    cores: tuple[Array, ...]
    axes: Axes
    bound: float | None = None
    notes: tuple[str, ...] = ()

    KIND: ClassVar[str]
    """What a user calls the format."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", normal_axes(self.axes))
        object.__setattr__(self, "cores", tuple(np.ascontiguousarray(c, dtype=np.float64) for c in self.cores))
        shapes = [core.shape for core in self.cores]
        if [len(names) for names in self.labels] != [len(shape) for shape in shapes]:
            wanted = ", ".join(f"[{', '.join(names)}]" for names in self.labels)
            raise TNCompileError(f"cores of a {self.KIND} with these modes are {wanted}; these have shapes {shapes}")
        sizes = dict(self.modes)
        for names, shape in zip(self.labels, shapes, strict=True):
            for name, size in zip(names, shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise TNCompileError(f"cores of a {self.KIND} disagree: {name} is {sizes[name]} and {size}")

    @property
    @abstractmethod
    def labels(self) -> Labels:
        """The names of the axes of each core."""

    @property
    def core_names(self) -> tuple[str, ...]:
        """A name for each core, which is also that of its parameter in PyTorch."""
        return tuple(f"core_{k}" for k in range(len(self.cores)))

    @property
    def modes(self) -> dict[str, int]:
        """The modes of the dense tensor, axis by axis, with their sizes."""
        return dict(zip(mode_names(self.axes), itertools.chain(*self.axes), strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense tensor."""
        return tuple(map(math.prod, self.axes))

    @property
    def sizes(self) -> Sizes:
        """The sizes of all modes and bonds."""
        return {n: s for names, core in zip(self.labels, self.cores, strict=True) for n, s in zip(names, core.shape)}  # noqa: B905

    @property
    def bonds(self) -> tuple[str, ...]:
        """The bonds: what two or more cores share and the dense tensor does not have."""
        return bonds_of(self.labels, self.modes)

    @property
    def ranks(self) -> Sizes:
        """The sizes of the bonds."""
        sizes = self.sizes
        return {bond: sizes[bond] for bond in self.bonds}

    @property
    def parameters(self) -> int:
        """How many numbers the cores have."""
        return sum(core.size for core in self.cores)

    def dense(self) -> Array:
        """The tensor that the cores stand for, in float64."""
        order = connected(self.labels)
        operands = [(self.cores[k], self.labels[k]) for k in order]
        tree: Any = 0
        for position in range(1, len(order)):
            tree = (tree, position)
        result, names = contract(operands, tree, set(self.modes))
        return einsum([(result, names)], list(self.modes)).reshape(self.shape)

    def error(self, dense: Array, metric: Metric | None = None) -> float:
        """The relative error against a dense tensor, in the Frobenius norm or in that of a metric."""
        exact = np.asarray(dense, np.float64).reshape(self.shape)
        difference = exact - self.dense()
        if metric is not None:
            exact, difference = metric.weigh(exact), metric.weigh(difference)
        norm = float(np.linalg.norm(exact))
        wrong = float(np.linalg.norm(difference))
        return wrong / norm if norm else (0.0 if wrong == 0 else math.inf)

    @abstractmethod
    def canonical(self, center: int = -1) -> Factorized:
        """The same tensor with its freedom of gauge used up, as far as the format allows."""

    @abstractmethod
    def spectra(self) -> dict[str, Array]:
        """For each bond the values that say how much it carries, in decreasing order."""

    @abstractmethod
    def truncated(self, ranks: Ranks) -> Factorized:
        """The same tensor with smaller bonds; an error is relative to the tensor as it is."""

    def network(self, name: str = "", dtype: str = "float32", symbol: str = "batch") -> Network:
        """The linear layer ``y[batch, out] = x[batch, in] W[in, out]`` as a network; for matrices only."""
        if len(self.axes) != 2:
            raise TNCompileError(f"a linear layer needs a matrix, and this {self.KIND} has shape {self.shape}")
        batch, sizes = Index(symbol, symbol), self.sizes
        prefix = f"{name}." if name else ""

        def axis(label: str) -> Axis:
            return (Index(label, sizes[label]),) if label in self.modes or label in self.bonds else ()

        def group(letter: str) -> Axis:
            return tuple(Index(n, s) for n, s in self.modes.items() if n.startswith(letter))

        operand = Tensor("x", ((batch,), group("i")))
        order = connected(self.labels, group_names(self.axes, 0))
        cores = [
            Tensor(prefix + self.core_names[k], tuple(map(axis, self.labels[k])), self.cores[k].astype(dtype))
            for k in order
        ]
        return Network(name, (Term((operand, *cores)),), Tensor("y", ((batch,), group("o"))), dtype)

    def to_module(
        self, dtype: str = "float32", bias: Array | None = None, permutation: Permutation | None = None
    ) -> FactorizedModule:
        """A `torch.nn.Module` with the cores as parameters; its `factorized()` is the way back.

        With a `permutation` the cores are those of the permuted matrix, and the layer that of the original one.
        """
        from tncompile.decomp.module import FactorizedModule

        return FactorizedModule(self, dtype, bias, permutation)


def normal_axes(axes: Sequence[Sequence[int]]) -> Axes:
    """Axes as tuples of int; TNCompileError where a mode is below 1 or an axis has none."""
    normal = tuple(tuple(int(size) for size in axis) for axis in axes)
    if not normal or any(not axis or min(axis) < 1 for axis in normal):
        raise TNCompileError(f"axes are groups of modes of size 1 or more, not {axes}")
    return normal


def mode_names(axes: Axes) -> tuple[str, ...]:
    """Names of the modes of some axes, from the first to the last."""
    if len(axes) == 2:
        return (*group_names(axes, 0), *group_names(axes, 1))
    return tuple(f"n{k + 1}" for k in range(sum(map(len, axes))))


def group_names(axes: Axes, axis: int) -> tuple[str, ...]:
    """Names of the modes of the input (axis 0) or the output (1) of a matrix."""
    return tuple(f"{'io'[axis]}{k + 1}" for k in range(len(axes[axis])))


def bonds_of(labels: Labels, modes: Iterable[str]) -> tuple[str, ...]:
    """The names on two cores or more that are no modes, in order of first use."""
    count: dict[str, int] = {}
    for name in itertools.chain(*labels):
        count[name] = count.get(name, 0) + 1
    return tuple(n for n, times in count.items() if times > 1 and n not in set(modes))


def connected(labels: Labels, start: Iterable[str] = ()) -> list[int]:
    """The cores in an order in which each meets `start` or one before it, where there is such."""
    left, seen, order = list(range(len(labels))), set(start), list[int]()
    while left:
        chosen = next((k for k in left if seen & set(labels[k])), left[0])
        left.remove(chosen)
        order.append(chosen)
        seen |= set(labels[chosen])
    return order


def as_modes(dense: Any, axes: Axes) -> Array:
    """A dense tensor with one axis for each mode, if possible a view; TNCompileError where its shape is another."""
    array = np.asanyarray(dense)
    if array.dtype.kind not in "fiu":
        raise TNCompileError(f"only real numbers can be factorized, not {array.dtype}")
    shape = tuple(map(math.prod, axes))
    if array.shape != shape:
        raise TNCompileError(f"the tensor has shape {array.shape}, its modes {axes} are of shape {shape}")
    modes: Array = array.reshape([size for axis in axes for size in axis])
    return modes
