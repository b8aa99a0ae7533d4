"""Attention, however it is written, as one MultiHeadAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir

from tncompile.emit.fuse import match
from tncompile.emit.fuse.match import MICROSOFT, Dims, Editor, constant, only_reader, producer, shape_of
from tncompile.emit.fuse.movement import Chain, chain, numbered, probes
from tncompile.ir import Array


def fuse_attention(graph: onnx_ir.Graph) -> int:
    """Softmax between two matmuls over heads -> MultiHeadAttention; the number of places.

        scores = scale · MatMul(heads(q), transposed(heads(k)))        q, k, v: [batch, sequence, heads·size]
        y = moved(MatMul(Softmax(scores + mask), heads(v)))
    ->
        y = moved(MultiHeadAttention(q, k, v, bias, mask))

    ONNX Runtime knows a few spellings of few exporters; none of what torch's exporter writes, and none of ours.

    Conditions:
    1. float32: ONNX Runtime has the CPU kernel for nothing else;
    2. `heads` are moves and scalings of elements that do what ``reshape(b, s, h, d).transpose(0, 2, 1, 3)`` does
       (see `movement`); batch and sequence of q, k, v agree; shapes are known;
    3. the mask is added, and broadcasts to [batch, heads, queries, keys]; where a ``Where(IsNaN(p), 0, p)`` follows the
       softmax, as torch's exporter writes it for masks of booleans, y is 0 for a query that may look at no key;
    4. nobody else reads what lies between.
    """
    editor = Editor(graph)
    count = 0
    guards: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for softmax in [n for n in graph if match.is_op(n, "Softmax")]:
        found = _find(softmax)
        if found is not None:
            _rewrite(found, editor, guards)
            count += 1
    return count


@dataclass(frozen=True)
class _Heads:
    """q, k or v: [batch, sequence, heads·size], and by what it is scaled on its way to the matmul."""

    value: onnx_ir.Value
    shape: Dims
    size: int
    scale: float

    @property
    def heads(self) -> int:
        assert isinstance(self.shape[2], int)
        return self.shape[2] // self.size


@dataclass(frozen=True)
class _Attention:
    query: _Heads
    key: _Heads
    value: _Heads
    scale: float
    mask: onnx_ir.Value | None
    guarded: bool
    last: onnx_ir.Node  # the second matmul


def _find(softmax: onnx_ir.Node) -> _Attention | None:
    if match.attribute(softmax, "axis", -1) not in (-1, len(softmax.inputs[0].shape or ()) - 1):  # type: ignore[union-attr]
        return None
    scores = _scores(softmax)
    last = _second(softmax.outputs[0])
    if scores is None or last is None:
        return None
    matmul, scale, mask = scores
    second, guarded = last
    query, key = _heads(matmul.inputs[0]), _heads(matmul.inputs[1], transposed=True)
    value = _heads(second.inputs[1])
    if query is None or key is None or value is None:
        return None
    (batch, queries, _), (_, keys, _) = query.shape, key.shape
    if not (query.shape[0] == key.shape[0] == value.shape[0] and value.shape[1] == keys):
        return None
    if query.size != key.size or not query.heads == key.heads == value.heads:
        return None
    read = shape_of(softmax.inputs[0])
    if read is None or read[-1] != keys:
        return None
    if mask is not None and not _fits(shape_of(mask), (batch, query.heads, queries, keys), guarded):
        return None
    return _Attention(query, key, value, scale * query.scale * key.scale, mask, guarded, second)


def _scores(softmax: onnx_ir.Node) -> tuple[onnx_ir.Node, float, onnx_ir.Value | None] | None:
    """The first matmul, by what its result is scaled, and the mask."""
    path = chain(softmax.inputs[0])  # type: ignore[arg-type]
    scale, mask = 1.0, None
    add = producer(path.source, "Add")
    if add is not None:
        sides = [(chain(a), b) for a, b in (add.inputs, add.inputs[::-1]) if a is not None and b is not None]
        inner = [(c, b) for c, b in sides if producer(c.source, "MatMul") is not None]
        if len(inner) != 1 or any(n.op_type != "Reshape" for n in path.nodes):
            return None
        ((before, mask),) = inner
        shape = shape_of(add.outputs[0])
        if (
            shape is None
            or (len(shape) != 4 and len(shape_of(mask) or (1, 1, 1)) > 2)
            or len(add.outputs[0].uses()) != 1
        ):
            return None
        path = replace(before, nodes=(*before.nodes, *path.nodes))
    matmul = producer(path.source, "MatMul")
    if matmul is None or any(len(n.outputs[0].uses()) != 1 for n in (matmul, *path.nodes)):
        return None
    for node in path.nodes:
        if match.is_op(node, "Mul", "Div"):
            by = next(x for x in map(match.number, node.inputs) if x is not None)
            scale = scale * by if node.op_type == "Mul" else scale / by
        elif not match.is_op(node, "Reshape"):
            return None
    return matmul, scale, mask


def _second(value: onnx_ir.Value) -> tuple[onnx_ir.Node, bool] | None:
    """The second matmul behind a softmax, and whether what is no number is made 0 in between."""
    guarded = False
    where = next((u.node for u in value.uses() if match.is_op(u.node, "Where")), None)
    if where is not None and len(value.uses()) == 2:
        test = producer(where.inputs[0], "IsNaN")
        if (
            test is None
            or test.inputs[0] is not value
            or where.inputs[2] is not value
            or match.number(where.inputs[1]) != 0
        ):
            return None
        value, guarded = where.outputs[0], True
    while (reshape := only_reader(value, "Reshape")) is not None:
        value = reshape.outputs[0]
    matmul = only_reader(value, "MatMul")
    return (matmul, guarded) if matmul is not None and matmul.inputs[0] is value else None


def _heads(end: onnx_ir.Value | None, transposed: bool = False) -> _Heads | None:
    """The value nearest to the source that becomes `end` when it is split into heads; float32."""
    if end is None:
        return None
    whole = chain(end)
    values = [whole.source, *(n.outputs[0] for n in whole.nodes)]
    for position, value in enumerate(values):
        shape = shape_of(value)
        if (
            shape is not None
            and len(shape) == 3
            and isinstance(shape[2], int)
            and value.dtype == onnx_ir.DataType.FLOAT
        ):
            found = _split(Chain(value, whole.nodes[position:]), shape, transposed)
            if found is not None:
                return found
    return None


def _split(moves: Chain, shape: Dims, transposed: bool) -> _Heads | None:
    found = set()
    for sizes in probes(shape):
        start = numbered(shape, sizes)
        end = None if start is None else moves.run(start, sizes)
        if start is None or end is None or end.ndim < 3:
            return None
        end = end.swapaxes(-1, -2) if transposed else end
        batch, sequence, width = start.shape
        size = end.shape[-1]
        if width % size or end.shape[-2] != sequence:
            return None
        wanted = start.reshape(batch, sequence, width // size, size).transpose(0, 2, 1, 3)
        scale = float(end.flat[0] / wanted.flat[0])
        if not np.allclose(end.reshape(wanted.shape), scale * wanted, rtol=1e-12, atol=0):
            return None
        found.add((size, scale))
    if len(found) != 1:
        return None
    ((size, scale),) = found
    return _Heads(moves.source, shape, size, scale)


def _fits(mask: Dims | None, scores: Dims, guarded: bool) -> bool:
    """Whether a mask broadcasts to the scores, and, where rows are guarded, is the same for all heads."""
    if mask is None or len(mask) > 4:
        return False
    full = (*(1,) * (4 - len(mask)), *mask)
    return all(m in (1, s) for m, s in zip(full, scores, strict=True)) and (not guarded or full[1] == 1)


# ------------------------------------------------------------------------------------- rewriting


def _rewrite(found: _Attention, editor: Editor, guards: dict[onnx_ir.Value, onnx_ir.Value]) -> None:
    like = found.last
    query, key, value = found.query, found.key, found.value
    bias, inputs = _biases((query.value, key.value, value.value), editor)
    mask = None if found.mask is None else _full_mask(found, editor)
    shape = (*query.shape[:2], value.shape[2])
    result = editor.node(
        "MultiHeadAttention",
        [*inputs, bias, None, mask] if mask is not None else [*inputs, bias] if bias is not None else inputs,
        like,
        shape,
        MICROSOFT,
        num_heads=query.heads,
        scale=found.scale,
    )
    if value.scale != 1:
        factor = editor.constant("scale", np.asarray(value.scale, np.float32))
        result = editor.node("Mul", [result, factor], like, shape)
    if found.guarded and mask is not None:
        if mask not in guards:
            guards[mask] = _any_key(mask, like, editor)
        zero = editor.constant("zero", np.zeros((), np.float32))
        result = editor.node("Where", [guards[mask], result, zero], like, shape)
    _deliver(found, result, shape, editor)


def _biases(sides: tuple[onnx_ir.Value, ...], editor: Editor) -> tuple[onnx_ir.Value | None, list[onnx_ir.Value]]:
    """Biases added to q, k and v by nodes of their own are one input of the fused kernel."""
    parts: list[Array] = []
    inputs: list[onnx_ir.Value] = []
    for side in sides:
        add = producer(side, "Add")
        width = (shape_of(side) or (0,))[-1]
        pair = None
        if add is not None and len(side.uses()) == 1:
            options = [(a, constant(b)) for a, b in (add.inputs, add.inputs[::-1])]
            pair = next(((a, c) for a, c in options if c is not None and c.shape == (width,)), None)
        if pair is None or pair[0] is None or shape_of(pair[0]) != shape_of(side):
            parts.append(np.zeros(int(width), np.float32))
            inputs.append(side)
        else:
            parts.append(pair[1])
            inputs.append(pair[0])
    if not any(p.any() for p in parts):
        return None, inputs
    return editor.constant("attention.bias", np.concatenate(parts)), inputs


def _full_mask(found: _Attention, editor: Editor) -> onnx_ir.Value:
    """The mask as the kernel wants it: four axes, the last two in full."""
    assert found.mask is not None
    mask, shape = found.mask, shape_of(found.mask)
    assert shape is not None
    _, queries, _ = found.query.shape
    keys = found.key.shape[1]
    like = found.last
    if len(shape) < 4:
        axes = editor.constant("axes", np.arange(4 - len(shape)))
        shape = (*(1,) * (4 - len(shape)), *shape)
        mask = editor.node("Unsqueeze", [mask, axes], like, shape)
    if shape[2:] == (queries, keys):
        return mask
    sizes = [editor.constant("ones", np.ones(2, np.int64))]
    for side, size in ((found.query, queries), (found.key, keys)):
        if isinstance(size, int):
            sizes.append(editor.constant(f"size_{size}", np.asarray([size])))
        else:
            sizes.append(editor.node("Shape", [side.value], like, (1,), start=1, end=2))
            sizes[-1].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    target = editor.node("Concat", sizes, like, (4,), axis=0)
    target.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    return editor.node("Expand", [mask, target], like, (*shape[:2], queries, keys))


def _any_key(mask: onnx_ir.Value, like: onnx_ir.Node, editor: Editor) -> onnx_ir.Value:
    """Whether a query may look at any key at all: [batch, queries, 1]."""
    shape = shape_of(mask)
    assert shape is not None
    axes, last = editor.constant("axes", np.asarray([1])), editor.constant("axes", np.asarray([-1]))
    best = editor.node("ReduceMax", [mask, last], like, (*shape[:3], 1), keepdims=1)
    best = editor.node("Squeeze", [best, axes], like, (shape[0], shape[2], 1))
    # torch's exporter writes the lowest number where torch has -inf, and its own guard then never acts
    lowest = editor.constant("lowest", np.asarray(np.finfo(np.float32).min))
    seen = editor.node("Greater", [best, lowest], like, (shape[0], shape[2], 1))
    seen.type = onnx_ir.TensorType(onnx_ir.DataType.BOOL)
    return seen


def _deliver(found: _Attention, result: onnx_ir.Value, shape: Dims, editor: Editor) -> None:
    """Put [batch, queries, heads·size] where the moved result of the second matmul was read."""
    old, value = found.last.outputs[0], found.last.outputs[0]
    best: onnx_ir.Value | None = None
    while (node := only_reader(value, "Reshape", "Transpose", "Squeeze", "Unsqueeze")) is not None:
        if node.inputs[0] is not value:
            break
        value = node.outputs[0]
        if _in_order(chain(value, old), found, shape):
            best = value
            if shape_of(value) == shape:
                break
    if best is None:
        heads = editor.reshape(result, (0, 0, found.value.heads, found.value.size), found.last)
        moved = editor.node("Transpose", [heads], found.last, perm=(0, 2, 1, 3))
        if len(old.shape or ()) == 3:
            moved = _merged(moved, found, editor)
        match.replace(old, moved)
        return
    if shape_of(best) == shape:
        match.replace(best, result)
        return
    reshape = best.producer()
    assert reshape is not None
    match.replace(best, editor.node("Reshape", [result, reshape.inputs[1]], reshape))


def _in_order(moves: Chain, found: _Attention, shape: Dims) -> bool:
    """Whether moves of the second matmul's result end in [batch, queries, heads, size] in row-major order."""
    last = moves.nodes[-1]
    sizes_of = constant(last.inputs[1]) if match.is_op(last, "Reshape") else None
    if sizes_of is None or (0 in sizes_of):
        return False
    rank = len(found.last.outputs[0].shape or ())
    for sizes in probes(shape):
        start = numbered(shape, sizes)
        if start is None or rank not in (3, 4):
            return False
        batch, queries, _ = start.shape
        heads = start.reshape(batch, queries, found.value.heads, found.value.size).transpose(0, 2, 1, 3)
        end = moves.run(heads if rank == 4 else heads.reshape(-1, queries, found.value.size), sizes)
        if end is None or not np.array_equal(end.reshape(-1), start.reshape(-1)):
            return False
    return True


def _merged(value: onnx_ir.Value, found: _Attention, editor: Editor) -> onnx_ir.Value:
    """[batch, heads, queries, size] with batch and heads as one axis."""
    batch, queries, _ = found.query.shape
    heads, size = found.value.heads, found.value.size
    if isinstance(queries, int):
        return editor.reshape(value, (-1, queries, size), found.last)
    if isinstance(batch, int):
        return editor.reshape(value, (batch * heads, -1, size), found.last)
    sizes = [editor.constant("rest", np.asarray([-1])), editor.node("Shape", [value], found.last, (1,), start=2, end=3)]
    sizes.append(editor.constant(f"size_{size}", np.asarray([size])))
    sizes[1].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    target = editor.node("Concat", sizes, found.last, (3,), axis=0)
    target.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    return editor.node("Reshape", [value, target], found.last)
