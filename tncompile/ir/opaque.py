"""Values, and the traced operations on them that are no networks and kept whole. All immutable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tncompile.errors import SourceRef
from tncompile.ir.dims import Dim


@dataclass(frozen=True)
class Value:
    """A named value: dtype as numpy spells it and shape, or dtype ``"scalar"`` / ``"tuple"`` and no shape."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None = None


@dataclass(frozen=True)
class Ref:
    """An argument of an opaque node that names a value or a weight."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument that only torch knows how to write, such as ``torch.float32``, by its spelling."""

    spelling: str


Arg = Ref | Constant | int | float | bool | str | None | tuple[Any, ...]


@dataclass(frozen=True)
class Opaque:
    """A traced operation that is not multilinear, kept whole: ``target(*args, **kwargs)``.

    `target` is torch's name of the overload (``"aten.relu.default"``) or of a Python operator
    (``"operator.getitem"``).
    """

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    output: Value
    source: SourceRef = field(default=SourceRef(), compare=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of values and weights read, each once."""
        return tuple(dict.fromkeys(r.name for r in references((*self.args, *(v for _, v in self.kwargs)))))

    @property
    def value(self) -> Value:
        """The value that the operation computes."""
        return self.output


def references(arg: Arg) -> Iterator[Ref]:
    """All the references inside an argument."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from references(item)
