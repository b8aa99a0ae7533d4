"""Fold every layer back to dense, whether that pays or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.cost.search import MAX_CORE_ELEMENTS
from tncompile.ir import Network, Node, Program, Term
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import dense_tree, merge_constants
from tncompile.passes.positions import Writer
from tncompile.passes.rows import Rows, readers_of, rows_of

_LARGE = "the product would be too large"


@dataclass(frozen=True)
class Dense(Pass):
    """Contract all cores of each term into one: the dense layers that a tensorized model stands for.

    ```
    y[b, (o1 o2)] = x[b, (i1 i2)] A[i1, o1, r] B[r, i2, o2]
    ->
    y[b, (o1 o2)] = x[b, (i1 i2)] A*B[i1, o1, i2, o2]
    ```

    1. The product is no larger than `order` would consider, and fits the network's dtype.
    2. Where a term reads rows of tables, and nothing else is known at run time, these and its cores become one table.

    Not in the default pipeline, where `order` has the dense layer among its candidates, and `tables` the one table:
    this is what they are to be compared with, as ``clean,gathers,fold,clean,dense,clean,order``.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        known = {node.value.name: node for node in program.nodes}
        writer, readers = Writer(program), readers_of(program)
        nodes: list[Node] = []
        for node in program.nodes:
            if isinstance(node, Network):
                terms = []
                for term in node.terms:
                    rows = rows_of(node, term, program, known, readers)
                    if rows is None or rows.whole is None:
                        terms.append(_merged(node, term, context, changes))
                        continue
                    added, term = _one_table(rows, writer, changes)
                    nodes += added
                    terms.append(term)
                node = replace(node, terms=tuple(terms))
            nodes.append(node)
        return writer.program(program, nodes), changes


def _one_table(rows: Rows, writer: Writer, changes: list[Change]) -> tuple[Sequence[Node], Term]:
    assert rows.whole is not None
    name, what = rows.network.output.name, f"{len(rows.tensors)} tables and cores are one table"
    if rows.elements(rows.whole) > MAX_CORE_ELEMENTS:
        changes.append(Change(name, what, _LARGE, declined=True))
        return (), rows.term
    result = rows.applied(rows.whole, writer)
    if result is None:
        changes.append(Change(name, what, f"the product does not fit into {rows.network.dtype}", declined=True))
        return (), rows.term
    changes.append(Change(name, what))
    return result


def _merged(network: Network, term: Term, context: Context, changes: list[Change]) -> Term:
    if len(term.cores) < 2:
        return term
    what = f"{len(term.cores)} cores are one"
    tree = dense_tree(network, term, context, context.batches[-1])
    if tree is None:
        changes.append(Change(network.output.name, what, _LARGE, declined=True))
        return term
    merged = merge_constants(network, term, tree)
    if not all(np.isfinite(c.data).all() for c in merged.cores if c.data is not None):
        why = f"the product does not fit into {network.dtype}"
        changes.append(Change(network.output.name, what, why, declined=True))
        return term
    changes.append(Change(network.output.name, what))
    return merged
