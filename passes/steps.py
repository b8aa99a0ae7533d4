"""Compute what every step of a loop makes of its own slice of one tensor at once, before the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Index, Network, Node, Program, Tensor, Term, Value
from tncompile.ir.edit import fresh
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.equals import selection, selections
from tncompile.passes.explain import instead
from tncompile.passes.plans import Limits, fastest
from tncompile.passes.stacks import Part

_FEW = Limits(max_trials=2, trees=1)


@dataclass(frozen=True)
class Steps(Pass):
    """Apply the same cores to all slices of a tensor at once.

    ```
    opaque x_0 = aten.select.int(%x, 0, 0)      opaque x_1 = aten.select.int(%x, 0, 1)
    network a: a[b, g] = x_0[b, i] W[i, g] + h_0[b, j] V[j, g]
    network b: b[b, g] = x_1[b, i] W[i, g] + h_1[b, j] V[j, g]           (h_1 depends on a)
    ->
    network a_steps: a_steps[step, b, g] = x[step, b, i] W[i, g]
    opaque a_step = aten.select.int(%a_steps, 0, 0)
    network a: a[b, g] = a_step[b, g] + h_0[b, j] V[j, g]                (and b alike)
    ```

    1. A term has cores and one operand, which is a selection along an axis of one value; terms of other networks apply
       the same cores to the same modes of other selections along it.
    2. That is predicted faster at every batch size, all positions along the axis counted, read or not.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        parts = selections(program)
        groups: dict[object, list[_Use]] = {}
        for node in program.nodes:
            if isinstance(node, Network):
                for number, term in enumerate(node.terms):
                    if _is_applied(term) and (part := parts.get(term.operands[0].name)) is not None:
                        use = _Use(node, number, term, part)
                        groups.setdefault(_key(use), []).append(use)
        changes: list[Change] = []
        before: dict[str, list[Node]] = {}
        terms: dict[tuple[str, int], Term] = {}
        taken = {*program.values, *program.arrays}
        for uses in groups.values():
            first = uses[0]
            positions = {use.part.position for use in uses}
            if len(positions) < 2:
                continue
            whole = _whole(first, fresh(f"{first.network.output.name}_steps", taken))
            one = fastest(replace(first.network, terms=(first.term,)), first.term, context, _FEW)
            each = [seconds * len(positions) for seconds in one]
            once = fastest(whole, whole.terms[0], context, _FEW)
            what = f"{len(first.term.cores)} cores meet {len(positions)} slices of {first.part.value.name}"
            why = f"predicted {instead(once, each, context)}"
            if any(a > b for a, b in zip(once, each, strict=True)):
                changes.append(Change(first.network.output.name, f"{what} at once", why, declined=True))
                continue
            taken.add(whole.output.name)
            before.setdefault(first.network.output.name, []).append(whole)
            for use in uses:
                name = fresh(f"{use.network.output.name}_step", taken)
                taken.add(name)
                value = Value(name, whole.dtype, whole.output.shape[1:])
                select = selection(value, whole.value, 0, use.part.position, use.network)
                before.setdefault(use.network.output.name, []).append(select)
                shown = tuple((i,) for i in _shown(use.network, use.term))
                terms[use.network.output.name, use.number] = Term((Tensor(value.name, shown),))
            changes.append(Change(whole.output.name, f"{what} at once", why))
        return replace(program, nodes=tuple(_rewritten(program.nodes, before, terms))), changes


def _rewritten(
    nodes: Sequence[Node], before: Mapping[str, Sequence[Node]], terms: Mapping[tuple[str, int], Term]
) -> list[Node]:
    """The nodes with others before some, and with other terms."""
    result: list[Node] = []
    for node in nodes:
        name = node.value.name
        result += before.get(name, ())
        if isinstance(node, Network):
            changed = tuple(terms.get((name, k), term) for k, term in enumerate(node.terms))
            node = node if changed == node.terms else replace(node, terms=changed)
        result.append(node)
    return result


@dataclass(frozen=True)
class _Use:
    """A term of a network, by its number, whose one operand is `part` of another value."""

    network: Network
    number: int
    term: Term
    part: Part


def _is_applied(term: Term) -> bool:
    """Whether a term applies cores to one operand."""
    return not term.windows and len(term.operands) == 1 and any(core.indices for core in term.cores)


def _shown(network: Network, term: Term) -> list[Index]:
    """The indices of a network's output that a term has."""
    return [i for i in network.output.indices if i.name in term.indices]


def _key(use: _Use) -> object:
    """What a term computes from its slice, whatever its indices are called."""
    shown = _shown(use.network, use.term)
    number = {i.name: k for k, i in enumerate(shown)}
    for name in use.term.indices:
        number.setdefault(name, len(number))

    tensors = tuple((id(t.data), t.form(number)) for t in use.term.tensors)
    return use.part.value.name, use.part.axis, use.network.dtype, tensors, tuple(i.size for i in shown)


def _whole(use: _Use, name: str) -> Network:
    """The network that applies a term's cores to all slices; the slices are the first axis of its value."""
    value, axis = use.part.value, use.part.axis
    step = Index(fresh("step", use.network.indices), (value.shape or ())[axis])

    def whole(tensor: Tensor) -> Tensor:
        if tensor.is_core:
            return tensor
        return Tensor(value.name, (*tensor.axes[:axis], (step,), *tensor.axes[axis:]))

    term = replace(use.term, tensors=tuple(map(whole, use.term.tensors)))
    axes = ((step,), *((i,) for i in _shown(use.network, use.term)))
    return Network(use.network.name, (term,), Tensor(name, axes), use.network.dtype, use.network.source)
