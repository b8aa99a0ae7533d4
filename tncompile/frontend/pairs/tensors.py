"""Rules for what moves complex numbers, makes tensors of them, or takes them apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tncompile.frontend.pairs.builder import Builder, Node, is_complex, rule

_aten = torch.ops.aten


# ------------------------------------------------------------------------------------ views


@rule(_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.resolve_conj.default)
@rule(_aten.view_as_real.default, _aten.view_as_complex.default, _aten.contiguous.default)
def _same(b: Builder, x: Node, **_: Any) -> Node:
    return b.pairs.get(x, x)


@rule(_aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims)
@rule(_aten.transpose.int, _aten.permute.default, _aten.flip.default, _aten.index_select.default)
def _along(b: Builder, x: Node, dim: Any, *rest: Any, **kwargs: Any) -> Node:
    """Operations whose dims count from the end, where there now is one more."""
    target, ndim = b.node.target, b.value(x).ndim + (b.node.target is _aten.unsqueeze.default)
    if target is _aten.permute.default:
        return b.call(target, b.pairs[x], [*_from_front(dim, ndim), ndim])
    if target is _aten.transpose.int:
        return b.call(target, b.pairs[x], *_from_front([dim, *rest], ndim))
    dims = _from_front(dim, ndim) if isinstance(dim, (list, tuple)) else _from_front([dim], ndim)[0]
    return b.call(target, b.pairs[x], dims, *rest, **kwargs)


@rule(_aten.slice.Tensor)
def _slice(b: Builder, x: Node, dim: int = 0, *rest: Any, **kwargs: Any) -> Node:
    return _along(b, x, dim, *rest, **kwargs)


def _from_front(dims: Sequence[int], ndim: int) -> list[int]:
    return [d + ndim if d < 0 else d for d in dims]


@rule(_aten.t.default)
def _t(b: Builder, x: Node) -> Node:
    return b.call(_aten.transpose.int, b.pairs[x], 0, 1) if b.value(x).ndim == 2 else b.pairs[x]


@rule(_aten.squeeze.default)
def _squeeze(b: Builder, x: Node) -> Node:
    return b.call(_aten.squeeze.default, b.pairs[x])


@rule(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default)
def _shaped(b: Builder, x: Node, size: Sequence[Any], **_: Any) -> Node:
    return b.call(b.node.target, b.pairs[x], [*size, 2])


@rule(_aten.repeat.default)
def _repeated(b: Builder, x: Node, repeats: Sequence[Any]) -> Node:
    return b.call(_aten.repeat.default, b.pairs[x], [*repeats, 1])


@rule(_aten.diagonal.default)
def _diagonal(b: Builder, x: Node, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Node:
    ndim = b.value(x).ndim
    found = b.call(_aten.diagonal.default, b.pairs[x], offset, *_from_front([dim1, dim2], ndim))
    return b.call(_aten.transpose.int, found, -1, -2)


@rule(_aten.roll.default)
def _rolled(b: Builder, x: Node, shifts: Any, dims: Any = ()) -> Node | None:
    axes = [dims] if isinstance(dims, int) else list(dims)
    if not axes:
        return None
    return b.call(_aten.roll.default, b.pairs[x], shifts, _from_front(axes, b.value(x).ndim))


@rule(_aten.pad.default, _aten.constant_pad_nd.default)
def _padded(b: Builder, x: Node, pad: Sequence[Any], *rest: Any) -> Node | None:
    value = rest[-1] if rest and not isinstance(rest[-1], str) else None
    if value or (rest and rest[0] not in ("constant", 0, 0.0, None)):
        return None
    return b.call(_aten.constant_pad_nd.default, b.pairs[x], [0, 0, *pad])


@rule(_aten.cat.default, _aten.stack.default)
def _joined(b: Builder, parts: Sequence[Node], dim: int = 0) -> Node:
    ndim = b.value(parts[0]).ndim + (b.node.target is _aten.stack.default)
    return b.call(b.node.target, [b.pair(p) for p in parts], *_from_front([dim], ndim))


@rule(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)
def _parted(b: Builder, x: Node, sizes: Any, dim: int = 0) -> Node:
    return b.call(b.node.target, b.pairs[x], sizes, *_from_front([dim], b.value(x).ndim))


@rule(_aten.unbind.int)
def _unbound(b: Builder, x: Node, dim: int = 0) -> Node:
    return b.call(_aten.unbind.int, b.pairs[x], *_from_front([dim], b.value(x).ndim))


@rule(operator.getitem)
def _item(b: Builder, parts: Node, number: int) -> Node:
    return b.call(operator.getitem, b.pairs[parts], number)


# ------------------------------------------------------------------------------------ writing into a part


@rule(_aten.slice_scatter.default, _aten.select_scatter.default)
def _written(b: Builder, x: Node, part: Node, dim: int = 0, *rest: Any, **kwargs: Any) -> Node | None:
    if not is_complex(b.node):
        return None
    return b.call(b.node.target, b.pair(x), b.pair(part), *_from_front([dim], b.value(x).ndim), *rest, **kwargs)


@rule(_aten.copy.default)
def _copied(b: Builder, x: Node, source: Node, *_: Any) -> Node | None:
    """What a write into a part writes: the source, as wide as the part."""
    if not is_complex(b.node):
        return None
    pair, wanted = b.pair(source), b.node.meta["val"].dtype.to_real()
    if pair.meta["val"].dtype != wanted:
        pair = b.call(_aten._to_copy.default, pair, dtype=wanted)
    return b.call(_aten.add.Tensor, b.call(_aten.zeros_like.default, b.pair(x)), pair)


@rule(_aten.index.Tensor)
def _indexed(b: Builder, x: Node, indices: Sequence[Any]) -> Node:
    return b.call(_aten.index.Tensor, b.pairs[x], indices)


@rule(_aten.index_put.default)
def _put(b: Builder, x: Node, indices: Sequence[Any], values: Node, accumulate: bool = False) -> Node:
    return b.call(_aten.index_put.default, b.pair(x), indices, b.pair(values), accumulate)


@rule(_aten.where.self)
def _where(b: Builder, condition: Node, x: Node, y: Node) -> Node:
    wide = b.call(_aten.unsqueeze.default, condition, -1)
    return b.call(_aten.where.self, wide, b.pair(x), b.pair(y))


@rule(_aten.masked_fill.Scalar)
def _masked(b: Builder, x: Node, mask: Node, value: complex) -> Node:
    pair = b.pairs[x]
    number = b.number(value, pair.meta["val"].dtype)
    return b.call(_aten.where.self, b.call(_aten.unsqueeze.default, mask, -1), number, pair)


# ------------------------------------------------------------------------------------ tensors of one number


def _of_number(b: Builder, zeros: Node, value: Any) -> Node:
    return zeros if not value else b.call(_aten.add.Tensor, zeros, b.number(value, zeros.meta["val"].dtype))


def _filled(b: Builder, size: Sequence[Any], value: Any) -> Node | None:
    if isinstance(value, Node) or not is_complex(b.node):
        return None
    zeros = b.call(_aten.zeros.default, [*size, 2], dtype=b.node.meta["val"].dtype.to_real())
    return _of_number(b, zeros, value)


@rule(_aten.zeros.default, _aten.empty.memory_format)
def _zeros(b: Builder, size: Sequence[Any], **_: Any) -> Node | None:
    return _filled(b, size, 0)


@rule(_aten.ones.default)
def _ones(b: Builder, size: Sequence[Any], **_: Any) -> Node | None:
    return _filled(b, size, 1)


@rule(_aten.full.default)
def _full(b: Builder, size: Sequence[Any], value: Any, **_: Any) -> Node | None:
    return _filled(b, size, value)


@rule(_aten.new_zeros.default, _aten.new_empty.default)
def _new_zeros(b: Builder, x: Node, size: Sequence[Any], **_: Any) -> Node | None:
    return _filled(b, size, 0)


@rule(_aten.new_ones.default)
def _new_ones(b: Builder, x: Node, size: Sequence[Any], **_: Any) -> Node | None:
    return _filled(b, size, 1)


@rule(_aten.new_full.default)
def _new_full(b: Builder, x: Node, size: Sequence[Any], value: Any, **_: Any) -> Node | None:
    return _filled(b, size, value)


@rule(_aten.scalar_tensor.default)
def _scalar(b: Builder, value: Any, **_: Any) -> Node | None:
    return _filled(b, [], value)


def _like(b: Builder, x: Node, value: Any) -> Node | None:
    """A tensor of the shape of another; real where that alone was complex."""
    dtype = b.node.meta["val"].dtype
    if isinstance(value, Node):
        return None
    if not is_complex(b.node):
        part = b.call(_aten.select.int, b.pairs[x], -1, 0)
        return b.call(_aten.full_like.default, part, value, dtype=dtype)
    return _of_number(b, b.call(_aten.zeros_like.default, b.pair(x), dtype=dtype.to_real()), value)


@rule(_aten.zeros_like.default, _aten.empty_like.default)
def _zeros_like(b: Builder, x: Node, **_: Any) -> Node | None:
    return _like(b, x, 0)


@rule(_aten.ones_like.default)
def _ones_like(b: Builder, x: Node, **_: Any) -> Node | None:
    return _like(b, x, 1)


@rule(_aten.full_like.default, _aten.fill.Scalar)
def _full_like(b: Builder, x: Node, value: Any, **_: Any) -> Node | None:
    return _like(b, x, value)


@rule(_aten.fill.Tensor)
def _fill(b: Builder, x: Node, value: Node) -> Node | None:
    return _copied(b, x, value)


@rule(_aten.eye.default, _aten.eye.m)
def _eye(b: Builder, *size: Any, **_: Any) -> Node:
    return b.pair(b.call(b.node.target, *size, dtype=b.node.meta["val"].dtype.to_real()))


# ------------------------------------------------------------------------------------ parts and conversions


def _part(number: int) -> Callable[[Builder, Node], Node]:
    return lambda b, x: b.call(_aten.select.int, b.pairs[x], -1, number)


rule(_aten.real.default)(_part(0))
rule(_aten.imag.default)(_part(1))


@rule(_aten._to_copy.default, _aten.to.dtype)
def _converted(b: Builder, x: Node, *_: Any, **__: Any) -> Node | None:
    if not is_complex(b.node):
        return None
    pair, wanted = b.pair(x), b.node.meta["val"].dtype.to_real()
    return pair if pair.meta["val"].dtype == wanted else b.call(_aten._to_copy.default, pair, dtype=wanted)


@rule(_aten.complex.default)
def _built(b: Builder, real: Node, imaginary: Node) -> Node:
    return b.call(_aten.stack.default, [real, imaginary], -1)


@rule(_aten.polar.default)
def _polar(b: Builder, magnitude: Node, angle: Node) -> Node:
    parts = [b.call(f, angle) for f in (_aten.cos.default, _aten.sin.default)]
    return _built(b, *(b.call(_aten.mul.Tensor, magnitude, part) for part in parts))
