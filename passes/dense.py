"""Fold every layer back to dense, whether that pays or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tncompile.ir import Network, Program, Term
from tncompile.ir.edit import map_terms
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import dense_tree, merge_constants


@dataclass(frozen=True)
class Dense(Pass):
    """Contract all cores of each term into one: the dense layers that a tensorized model stands for.

    ```
    y[b, (o1 o2)] = x[b, (i1 i2)] A[i1, o1, r] B[r, i2, o2]
    ->
    y[b, (o1 o2)] = x[b, (i1 i2)] A*B[i1, o1, i2, o2]
    ```

    1. The product is no larger than `order` would consider, and fits the network's dtype.

    Not in the default pipeline, where `order` has the dense layer among its candidates: this is what it is to be
    compared with, as ``clean,fold,clean,dense,order``.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        return map_terms(program, lambda network, term: _merged(network, term, context, changes)), changes


def _merged(network: Network, term: Term, context: Context, changes: list[Change]) -> Term:
    if len(term.cores) < 2:
        return term
    what = f"{len(term.cores)} cores are one"
    tree = dense_tree(network, term, context, context.batches[-1])
    if tree is None:
        changes.append(Change(network.output.name, what, "the product would be too large", declined=True))
        return term
    merged = merge_constants(network, term, tree)
    if not all(np.isfinite(c.data).all() for c in merged.cores if c.data is not None):
        why = f"the product does not fit into {network.dtype}"
        changes.append(Change(network.output.name, what, why, declined=True))
        return term
    changes.append(Change(network.output.name, what))
    return merged
