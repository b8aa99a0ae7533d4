"""An equation over labels -> a `Network`, for any graph that tells what its tensors are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from tncompile.errors import SourceRef
from tncompile.frontend.equation import Equation, NotMultilinear, Product, Reshape
from tncompile.ir import dims
from tncompile.ir.core import Array, Axis, Index, Network, Tensor, Term
from tncompile.ir.edit import fresh, refine, substitute
from tncompile.ir.opaque import Value

S = TypeVar("S")


@dataclass(frozen=True)
class Result:
    """The value that a network is to compute, the layer that it is of, and where that stands in the user's code."""

    value: Value
    layer: str = ""
    source: SourceRef = field(default=SourceRef())

    @property
    def shape(self) -> tuple[dims.Dim, ...]:
        """The value's shape; NotMultilinear where not even its rank is known."""
        if self.value.shape is None:
            raise NotMultilinear(f"the shape of {self.value.name} is not known")
        return self.value.shape


@dataclass(frozen=True)
class Source:
    """A tensor that a network reads: a value, or a weight where `data` is given."""

    value: Value
    data: Array | None = None


class NetworkBuilder(Generic[S]):
    """Builds networks; `source` looks up what stands for a tensor, `reserved` are names that cores must not have."""

    def __init__(self, source: Callable[[S], Source], reserved: Collection[str] = ()) -> None:
        self.source = source
        self.reserved = reserved

    def build(self, translation: Equation[S] | Reshape[S], result: Result) -> Network:
        """The network of an operation. NotMultilinear or CannotEdit where its sizes allow none."""
        if isinstance(translation, Reshape):
            return self._reshape(translation.source, result)
        return self._equation(translation, result)

    def _equation(self, equation: Equation[S], result: Result) -> Network:
        shape = result.shape
        sizes: dict[Any, dims.Dim] = dict(equation.sizes)
        for label, size in [*self._labelled(equation), *zip(equation.output, shape, strict=True)]:
            if isinstance(label, tuple):
                continue
            if size != 1 and sizes.setdefault(label, size) != size:
                raise NotMultilinear(f"sizes {sizes[label]} and {size} of one mode")
        for factors in (term.factors for term in equation.terms):
            for _, labels in factors:
                if any(labels.count(x) > 1 and isinstance(sizes.get(x), str) for x in labels):
                    raise NotMultilinear("the diagonal of a dynamic mode")
        indices: dict[Any, Index] = {}
        for label, size in sizes.items():
            name = size if isinstance(size, str) and size.isidentifier() else re.sub(r"\W", "_", str(label)) or "d"
            indices[label] = Index(fresh(name, {i.name for i in indices.values()}), size)

        slid = {label for w in equation.windows for label in w.names}
        for label in sorted(slid - {*indices}):
            indices[label] = Index(fresh(label, {i.name for i in indices.values()}), 1)

        def axis(label: Any, size: dims.Dim) -> Axis:
            if isinstance(label, tuple):
                return tuple(indices[part] for part in label if sizes[part] != 1)
            return () if size == 1 and label not in slid else (indices[label],)

        def axes(labels: Sequence[Any], shape: Sequence[dims.Dim]) -> tuple[Axis, ...]:
            return tuple(axis(label, size) for label, size in zip(labels, shape, strict=True))

        windows = [
            replace(w, axis=indices[w.axis].name, kernel=indices[w.kernel].name, out=indices[w.out].name)
            for w in equation.windows
        ]
        terms = tuple(self._term(product, axes, result.value) for product in equation.terms)
        terms = tuple(replace(t, windows=tuple(w for w in windows if w.axis in t.indices)) for t in terms)
        output = Tensor(result.value.name, axes(equation.output, shape))
        present = {i.name for t in terms for x in t.tensors for i in x.indices} | {w.out for w in windows}
        for index in output.indices:
            if index.name not in present and not isinstance(index.size, int):
                raise NotMultilinear("an expand to a dynamic size")
        return Network(result.layer, terms, output, result.value.dtype, result.source)

    def _term(self, product: Product[S], axes: Any, value: Value) -> Term:
        tensors = [self._tensor(x, axes(labels, self._shape_of(x)), value.dtype) for x, labels in product.factors]
        for name, constant, labels in product.constants:
            data = _rounded(constant, value.dtype)
            tensors.append(Tensor(fresh(name, self.reserved), axes(labels, data.shape), data))
        if product.scale != 1.0:
            name = fresh(f"{value.name}.scale", self.reserved)
            tensors.append(Tensor(name, (), _rounded(np.asarray(product.scale), value.dtype)))
        return Term(tuple(tensors))

    def _labelled(self, equation: Equation[S]) -> list[tuple[Any, dims.Dim]]:
        pairs: list[tuple[Any, dims.Dim]] = []
        for term in equation.terms:
            for x, labels in term.factors:
                pairs += zip(labels, self._shape_of(x), strict=True)
            for _, constant, labels in term.constants:
                pairs += zip(labels, constant.shape, strict=True)
        return pairs

    def _shape_of(self, x: S) -> tuple[dims.Dim, ...]:
        shape = self.source(x).value.shape
        if shape is None:
            raise NotMultilinear("a tensor of unknown rank")
        return shape

    def _tensor(self, x: S, axes: tuple[Axis, ...], dtype: str) -> Tensor:
        source = self.source(x)
        if source.value.dtype != dtype:
            raise NotMultilinear("operands of several dtypes")
        return Tensor(source.value.name, axes, source.data)

    def _reshape(self, x: S, result: Result) -> Network:
        """A view is a network of one tensor whose modes are grouped in another way."""
        before = self._shape_of(x)
        names: set[str] = set()

        def axis(prefix: str, k: int, size: dims.Dim) -> Axis:
            if size == 1:
                return ()
            name = fresh(size if isinstance(size, str) and size.isidentifier() else f"{prefix}{k}", names)
            names.add(name)
            return (Index(name, size),)

        inputs = tuple(axis("d", k, s) for k, s in enumerate(before))
        outputs = tuple(axis("e", k, s) for k, s in enumerate(result.shape))
        flat_in = tuple(i for a in inputs for i in a)
        flat_out = tuple(i for a in outputs for i in a)
        split_in, split_out = refine(flat_in, flat_out, names)
        dtype, name = result.value.dtype, result.value.name
        terms = (Term((self._tensor(x, inputs, dtype),)),)
        network = substitute(Network(result.layer, terms, Tensor(name, inputs), dtype, result.source), split_in)
        parts = iter([i for a in network.output.axes for i in a])
        outputs = tuple(tuple(p for i in a for p in split_out.get(i.name, (i,))) for a in outputs)
        grouped = tuple(tuple(next(parts) for _ in a) for a in outputs)
        return Network(network.name, network.terms, Tensor(name, grouped), dtype, network.source)


def _rounded(constant: Array, dtype: str) -> Array:
    """A constant of ours in the network's dtype. NotMultilinear where that would lose it."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray(constant.astype(dtype))
    tiny = (constant != 0) & (np.abs(rounded) < np.finfo(dtype).tiny)
    if not np.all(np.isfinite(rounded)) or np.any(tiny):
        raise NotMultilinear(f"a factor beyond the range of {dtype}")
    return rounded
