"""A sum of terms of equal structure as one term with an index that numbers them: block-term and CP forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tncompile.ir import Index, Network, Tensor, Term
from tncompile.ir.core import sources_of
from tncompile.ir.edit import fresh

BLOCK_INDEX = "block"


def one_term(network: Network, terms: Sequence[Term]) -> Term | None:
    """``x A1 B1 + x A2 B2`` -> ``x A[block] B[block]`` with the cores stacked; None where the terms are not alike.

    They are where one operand is read in the same order and the cores, in order, have the same modes.
    """
    first = terms[0]
    forms = [_form(network, term) for term in terms]
    if len(terms) < 2 or forms[0] is None or any(form != forms[0] for form in forms):
        return None
    block = Index(fresh(BLOCK_INDEX, network.indices), len(terms))
    tensors: list[Tensor] = []
    for place, tensor in enumerate(first.tensors):
        if not tensor.is_core:
            tensors.append(tensor)
            continue
        cores = [term.tensors[place] for term in terms]
        data = np.stack([core.array() for core in cores])
        axes = ((block,), *((i,) for i in tensor.indices))
        tensors.append(Tensor(f"{tensor.name}.stacked", axes, data, origins=sources_of(cores)))
    return replace(first, tensors=tuple(tensors), steps=None)


def _form(network: Network, term: Term) -> object:
    """What has to be the same for terms to be stacked: which index stands where, whatever those inside are called."""
    if len(term.operands) != 1 or not term.cores or term.slices:
        return None
    number: dict[str, object] = {i.name: i.name for i in network.output.indices}
    for name in term.indices:
        number.setdefault(name, len(number))
    tensors = tuple(("" if t.is_core else t.name, t.form(number)) for t in term.tensors)
    return tensors, tuple(w.form(number) for w in term.windows), term.order
