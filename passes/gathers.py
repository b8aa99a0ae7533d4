"""Gather rows of the cores of a table, never of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term
from tncompile.ir.core import NETWORK_DTYPES, Axis
from tncompile.ir.edit import CannotEdit, fresh, inline
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.positions import EMBEDDING, Gather, Position, Writer, gather_of, read


@dataclass(frozen=True)
class Gathers(Pass):
    """Let a gather of rows commute with the network that computes what it gathers from.

    ```
    network t: t[(i1 i2), (e1 e2)] = A[i1, e1, r] B[r, i2, e2]
    opaque y: float32[batch, e] = aten.embedding.default(%t, %ids)
    ->
    opaque p = aten.floor_divide.default(%ids, n2)          opaque q = aten.remainder.Scalar(%ids, n2)
    opaque a: float32[batch, e1*r] = aten.embedding.default(%A, %p)     (and b from B, its modes i2 first, at q)
    network y: y[batch, (e1 e2)] = a[batch, (e1 r)] b[batch, (r e2)]
    ```

    1. The table depends on weights alone; the ids are integers of one shape. Rows of one weight of two axes are an
       embedding already, however they are written.
    2. The table has more than `full` times as many numbers as its cores: else it is computed, as one gather from it is
       faster.
    3. No gathered mode stands twice in a core or in the table.

    What each core's rows are merged with is left to `tables`.
    """

    full: float = 1.0
    max_tensors: int = 256

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        known = {node.value.name: node for node in program.nodes}
        writer = Writer(program)

        def rewritten(node: Node) -> Sequence[Node]:
            gather = gather_of(node, program.values)
            if gather is None or not isinstance(node, Opaque):
                return (node,)
            if _is_lookup(gather, program):
                args = (Ref(gather.source), Ref(gather.ids[0].name))
                return (replace(node, target=EMBEDDING, args=args, kwargs=()),)
            table = self._table(gather, node, known, program)
            if table is None:
                return (node,)
            try:
                return self._rows(node, gather, table, known, writer, changes)
            except CannotEdit as reason:
                what = f"{gather.source} is gathered from as a whole"
                changes.append(Change(node.output.name, what, str(reason), declined=True))
                return (node,)

        return writer.program(program, [new for node in program.nodes for new in rewritten(node)]), changes

    def _table(self, gather: Gather, node: Node, nodes: Mapping[str, Node], program: Program) -> Network | None:
        """The network of cores that a gather reads from, as one."""
        weight = program.weights.get(gather.source)
        if weight is not None:
            if str(weight.dtype) not in NETWORK_DTYPES:
                return None
            axes = tuple((Index(f"d{k}", size),) if size != 1 else () for k, size in enumerate(weight.shape))
            core = Tensor(gather.source, axes, weight, origins=program.sources(gather.source))
            return Network("", (Term((core,)),), Tensor(gather.source, axes), str(weight.dtype), node.source)
        table = nodes.get(gather.source)
        while isinstance(table, Network) and table.operands:
            producer = nodes.get(table.inputs[0])
            try:
                table = inline(table, producer) if isinstance(producer, Network) else None
            except CannotEdit:
                return None
            if table is not None and any(len(t.tensors) > self.max_tensors for t in table.terms):
                return None
        return table if isinstance(table, Network) else None

    def _rows(
        self,
        node: Opaque,
        gather: Gather,
        table: Network,
        nodes: Mapping[str, Node],
        writer: Writer,
        changes: list[Change],
    ) -> list[Node]:
        """The nodes that take the place of a gather. CannotEdit where the table is better computed."""
        size = math.prod(int(i.size) for i in table.output.indices)
        elements = sum(a.size for a in {id(c.data): c.data for c in table.cores if c.data is not None}.values())
        if len(table.cores) > 1 and size <= self.full * elements:
            raise CannotEdit(f"{size:,} numbers, of cores that have {elements:,}, and one gather is enough")
        modes = _positions(gather, table, nodes)
        taken = {*table.indices}
        places: list[Axis] = []
        for dim in gather.ids[0].shape or ():
            name = fresh(dim if isinstance(dim, str) and dim.isidentifier() else f"n{len(places)}", taken)
            taken.add(name)
            places.append(() if dim == 1 else (Index(name, dim),))
        added: list[Node] = []

        def gathered(core: Tensor) -> Tensor:
            mine = [name for name in modes if name in {i.name for i in core.indices}]
            if not mine:
                return core
            names = [i.name for i in core.indices]
            if len({*names}) < len(names):
                raise CannotEdit("it is gathered from along a diagonal")
            weight, rows = writer.table(core, mine)
            new, ids = writer.position([modes[name] for name in mine], node)
            opaque, value = writer.rows(weight, ids, f"{node.output.name}_rows", node.name, node.source)
            added.extend([*new, opaque])
            return Tensor(value.name, (*places, rows.axes[1]))

        terms = tuple(replace(t, tensors=tuple(map(gathered, t.tensors)), steps=None) for t in table.terms)
        axes = [axis for k, axis in enumerate(table.output.axes) if k not in gather.axes]
        axes[gather.at : gather.at] = places
        if not any(t.operands for t in terms):
            raise CannotEdit("all its rows are the same")
        count = len({t.name for term in terms for t in term.operands})
        what = f"rows of {count} core{'s' * (count != 1)} are gathered, not rows of {gather.source}"
        why = f"{elements:,} numbers instead of {size:,}" if len(table.cores) > 1 else "the gathered mode goes first"
        changes.append(Change(node.output.name, what, why))
        name, source = table.name or node.name, node.source
        return [*added, Network(name, terms, Tensor(node.output.name, tuple(axes)), table.dtype, source)]


def _is_lookup(gather: Gather, program: Program) -> bool:
    """Whether rows of a weight are gathered, which is an embedding however it is written."""
    weight = program.weights.get(gather.source)
    return weight is not None and weight.ndim == 2 and gather.axes == (0,) and str(weight.dtype) in NETWORK_DTYPES


def _positions(gather: Gather, table: Network, nodes: Mapping[str, Node]) -> dict[str, tuple[Position, int]]:
    """Where in each gathered mode a row is, and the mode's size: by index name, outer modes first."""
    found: dict[str, tuple[Position, int]] = {}
    for axis, ids in zip(gather.axes, gather.ids, strict=True):
        group = table.output.axes[axis]
        whole, stride = read(ids.name, nodes), 1
        if whole.modulus not in (None, math.prod(int(i.size) for i in group)):
            whole = Position(ids.name)
        modes: dict[str, tuple[Position, int]] = {}
        for number, index in reversed([*enumerate(group)]):
            size = int(index.size)
            # the outermost mode of all takes no remainder: ids below 0 count from the end there
            inner = number or found or whole.modulus is not None
            modes[index.name] = (Position(whole.ids, whole.stride * stride, size if inner else None), size)
            stride *= size
        if {*modes} & {*found} or len(modes) < len(group):
            raise CannotEdit("it is gathered from along a diagonal")
        found |= dict(reversed(modes.items()))
    others = [i.name for k, axis in enumerate(table.output.axes) if k not in gather.axes for i in axis]
    if {*others} & {*found}:
        raise CannotEdit("it is gathered from along a diagonal")
    if not found:
        raise CannotEdit("it is gathered from along an axis of size 1")
    return found
