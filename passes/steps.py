"""Compute what every step of a loop makes of its own slice of one tensor at once, before the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value
from tncompile.ir.edit import fresh
from tncompile.passes.base import Change, Context, Pass
from tncompile.passes.plans import Limits, candidates
from tncompile.passes.stacks import SELECT


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
        nodes = {node.value.name: node for node in program.nodes}
        groups: dict[object, list[_Use]] = {}
        for node in program.nodes:
            if isinstance(node, Network):
                for number, term in enumerate(node.terms):
                    use = _use(node, number, term, nodes)
                    if use is not None:
                        groups.setdefault(_key(node, term, use), []).append(use)
        changes: list[Change] = []
        before: dict[str, list[Node]] = {}
        terms: dict[tuple[str, int], Term] = {}
        taken = {*program.values, *program.arrays}
        for uses in groups.values():
            source = program.values[uses[0].source]
            size = (source.shape or ())[uses[0].axis]
            positions = {use.position for use in uses}
            if not isinstance(size, int) or len(positions) < 2:
                continue
            whole = _whole(uses[0], size, fresh(f"{uses[0].network.output.name}_steps", taken))
            one = _seconds(replace(uses[0].network, terms=(uses[0].term,)), context)
            once = _seconds(whole, context)
            what = f"{len(uses[0].term.cores)} cores meet {len(positions)} slices of {source.name}"
            if any(a > b * len(positions) for a, b in zip(once, one, strict=True)):
                why = f"at once predicted {once[-1] * 1e6:,.3g} µs, one by one {one[-1] * len(positions) * 1e6:,.3g}"
                changes.append(Change(uses[0].network.output.name, f"{what} one by one", why, declined=True))
                continue
            taken.add(whole.output.name)
            before.setdefault(uses[0].network.output.name, []).append(whole)
            for use in uses:
                value = Value(fresh(f"{use.network.output.name}_step", taken), whole.dtype, whole.value.shape[1:])  # type: ignore[index]
                taken.add(value.name)
                args = (Ref(whole.output.name), 0, use.position)
                select = Opaque(use.network.name, SELECT, args, (), value, use.network.source)
                before.setdefault(use.network.output.name, []).append(select)
                shown = tuple((i,) for i in _shown(use.network, use.term))
                terms[use.network.output.name, use.number] = Term((Tensor(value.name, shown),))
            why = f"predicted {once[-1] * 1e6:,.3g} µs, one by one {one[-1] * len(positions) * 1e6:,.3g}"
            changes.append(Change(whole.output.name, f"{what} at once", why))
        return replace(program, nodes=tuple(_rewritten(program.nodes, before, terms))), changes


def _seconds(network: Network, context: Context) -> list[float]:
    """Predicted seconds of a network of one term at each batch size."""
    ways = candidates(network, network.terms[0], context, Limits(2, 1))
    return [min(way.seconds[k] for way in ways) for k in range(len(context.batches))]


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
    """A term whose one operand is a position along an axis of `source`."""

    network: Network
    number: int
    term: Term
    source: str
    axis: int
    position: int


def _use(network: Network, number: int, term: Term, nodes: Mapping[str, Node]) -> _Use | None:
    if term.windows or len(term.operands) != 1 or not any(core.indices for core in term.cores):
        return None
    node = nodes.get(term.operands[0].name)
    if not isinstance(node, Opaque) or node.target != SELECT or node.kwargs or len(node.args) != 3:
        return None
    source, axis, position = node.args
    if not isinstance(source, Ref) or not isinstance(axis, int) or not isinstance(position, int):
        return None
    if axis < 0 or position < 0:  # as traced: `stacks` counts from the front
        return None
    return _Use(network, number, term, source.name, axis, position)


def _shown(network: Network, term: Term) -> list[Index]:
    """The indices of a network's output that a term has."""
    return [i for i in network.output.indices if i.name in term.indices]


def _key(network: Network, term: Term, use: _Use) -> object:
    """What a term computes from its slice, whatever its indices are called."""
    number = {i.name: k for k, i in enumerate(_shown(network, term))}
    for name in term.indices:
        number.setdefault(name, len(number))

    def axes(tensor: Tensor) -> object:
        return tuple(tuple((number[i.name], i.size) for i in axis) for axis in tensor.axes)

    tensors = tuple((id(t.data), axes(t)) for t in term.tensors)
    shown = tuple(i.size for i in _shown(network, term))
    return use.source, use.axis, network.dtype, tensors, shown


def _whole(use: _Use, size: int, name: str) -> Network:
    """The network that applies a term's cores to all slices; the slices are the first axis of its value."""
    step = Index(fresh("step", use.network.indices), size)

    def whole(tensor: Tensor) -> Tensor:
        if tensor.is_core:
            return tensor
        return Tensor(use.source, (*tensor.axes[: use.axis], (step,), *tensor.axes[use.axis :]))

    term = replace(use.term, tensors=tuple(map(whole, use.term.tensors)))
    axes = ((step,), *((i,) for i in _shown(use.network, use.term)))
    return Network(use.network.name, (term,), Tensor(name, axes), use.network.dtype, use.network.source)
