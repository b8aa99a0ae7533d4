"""Remove what computes nothing: identities, size-1 indices, neutral cores, dead and duplicate nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tncompile.ir import Index, Network, Node, Opaque, Program, Ref, Switch, Tensor, Term
from tncompile.ir.edit import drop_tensors, map_networks, substitute
from tncompile.ir.opaque import Arg
from tncompile.passes.base import Change, Context, Pass


@dataclass(frozen=True)
class Clean(Pass):
    """Remove what computes nothing.

    ```
    network v: v[batch, (i j)] = x[batch, (i j)]        (gone; its readers read x)
    network y: y[batch, o] = v[batch, i] W[i, o, one=1] ones[]
    ->
    network y: y[batch, o] = x[batch, i] W[i, o]
    ```

    1. A network of one operand and no cores whose output has the same axes is an identity: its readers read
       the operand. (Not where it is an output of the program: the name is kept.)
    2. Indices of size 1 are dropped; a core that is 1 everywhere is dropped where another tensor has its indices, an
       identity matrix where all it does is to give an index that is summed another name.
    3. Nodes whose value nothing reads are dead; of two nodes that compute the same from the same, one stays.
    """

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        nodes: list[Node] = []
        same: dict[str, str] = {}  # value -> the value to read instead
        seen: dict[Any, str] = {}
        shown = {name for _, name in program.outputs}
        for node in program.nodes:
            node = rename_inputs(node, same)
            if isinstance(node, Network):
                node = _simplify(node, changes)
                source = identity_of(node)
                if source is not None and node.output.name not in shown:
                    same[node.output.name] = source
                    changes.append(Change(node.value.name, f"{node.output.name} is {source} itself", "identity"))
                    continue
            key = _key(node)
            if key in seen and node.value.name not in shown:
                same[node.value.name] = seen[key]
                changes.append(
                    Change(node.value.name, f"{node.value.name} is computed already as {seen[key]}", "duplicate")
                )
                continue
            seen.setdefault(key, node.value.name)
            nodes.append(node)
        return drop_dead(replace(program, nodes=tuple(nodes)), changes), changes


def rename_inputs(node: Node, names: Mapping[str, str]) -> Node:
    """Make a node read other values."""
    if not names or not any(n in names for n in node.inputs):
        return node
    if isinstance(node, Opaque):
        kwargs = tuple((k, _rename_arg(v, names)) for k, v in node.kwargs)
        return replace(node, args=tuple(_rename_arg(a, names) for a in node.args), kwargs=kwargs)

    def rename(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_core else replace(tensor, name=names.get(tensor.name, tensor.name))

    def visit(network: Network) -> Network:
        terms = tuple(replace(t, tensors=tuple(map(rename, t.tensors))) for t in network.terms)
        return replace(network, terms=terms)

    return map_networks(node, visit)


def _rename_arg(arg: Arg, names: Mapping[str, str]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(names.get(arg.name, arg.name))
    return tuple(_rename_arg(a, names) for a in arg) if isinstance(arg, tuple) else arg


def identity_of(network: Network) -> str | None:
    """The operand that a network merely repeats, axis for axis."""
    if len(network.terms) != 1 or len(network.terms[0].tensors) != 1 or network.terms[0].windows:
        return None
    tensor = network.terms[0].tensors[0]
    return tensor.name if not tensor.is_core and tensor.axes == network.output.axes else None


def _simplify(network: Network, changes: list[Change]) -> Network:
    slid = {name for term in network.terms for w in term.windows for name in w.names}
    small = [name for name, i in network.indices.items() if i.size == 1 and name not in slid]
    ones: dict[str, tuple[Index, ...]] = dict.fromkeys(small, ())
    if ones:
        network = substitute(network, ones)
        changes.append(Change(network.output.name, f"dropped {', '.join(ones)}", "indices of size 1"))
    terms = tuple(_drop_identities(network, _drop_neutral(network, t, changes), changes) for t in network.terms)
    return network if terms == network.terms else replace(network, terms=terms)


def _drop_neutral(network: Network, term: Term, changes: list[Change]) -> Term:
    """Drop cores that are 1 everywhere and whose indices other tensors of the term carry."""
    for position in reversed(range(len(term.tensors))):
        core = term.tensors[position]
        if core.data is None or len(term.tensors) == 1 or not bool(np.all(core.data == 1)):
            continue
        others = {i.name for p, t in enumerate(term.tensors) if p != position for i in t.indices}
        if all(i.name in others for i in core.indices):
            term = drop_tensors(term, {position})
            changes.append(Change(network.output.name, f"dropped {core.name}", "it is 1 everywhere"))
    return term


def _drop_identities(network: Network, term: Term, changes: list[Change]) -> Term:
    """``x[b, i] I[i, j] W[j, o]`` -> ``x[b, i] W[i, o]``."""
    kept = {i.name for i in network.output.indices}.union(*(w.names for w in term.windows))
    for position in reversed(range(len(term.tensors))):
        core = term.tensors[position]
        if not _is_identity(core):
            continue
        held = [{i.name for i in t.indices} for p, t in enumerate(term.tensors) if p != position]
        for old, new in (core.indices, core.indices[::-1]):
            read = any(old.name in names for names in held)
            together = any({old.name, new.name} <= names for names in held)
            if read and not together and old.name not in kept and new.name not in term.slid:
                term = drop_tensors(term, {position})
                term = substitute(replace(network, terms=(term,)), {old.name: (new,)}).terms[0]
                changes.append(Change(network.output.name, f"dropped {core.name}", "it is the identity"))
                break
    return term


def _is_identity(core: Tensor) -> bool:
    if core.data is None or core.data.ndim != 2 or len({*core.indices}) != 2 or len(core.indices) != 2:
        return False
    rows, columns = core.data.shape
    first = core.data[0]
    return rows == columns and first[0] == 1 and not first[1:].any() and bool((core.data == np.eye(rows)).all())


_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "uniform", "exponential")
_DRAWS = ("poisson", "geometric", "binomial", "cauchy")


def _key(node: Node) -> Any:
    """What a node computes, whatever its value and its indices are called."""
    if isinstance(node, Opaque):
        if any(word in node.target.lower() for word in (*_RANDOM, *_DRAWS)):
            return id(node)
        return (node.target, _hashable(node.args), _hashable(node.kwargs))
    if isinstance(node, Switch):
        return (node.symbol, node.limits, *map(_key, node.cases))
    number = {name: k for k, name in enumerate(node.indices)}
    terms = tuple(
        (tuple((t.name, id(t.data), t.form(number)) for t in term.tensors), tuple(w.form(number) for w in term.windows))
        for term in node.terms
    )
    return (terms, node.output.form(number), node.dtype)


def _hashable(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(_hashable(a) for a in arg)
    return (type(arg).__name__, repr(arg))  # 1, 1.0 and True are different arguments, and so are 0.0 and -0.0


def drop_dead(program: Program, changes: list[Change]) -> Program:
    """A program without the nodes whose value nothing reads; the networks among them are noted."""
    live = {name for _, name in program.outputs}
    kept: list[Node] = []
    opaque: list[str] = []
    for node in reversed(program.nodes):
        if node.value.name in live:
            live.update(node.inputs)
            kept.append(node)
        elif isinstance(node, Opaque):
            opaque += [node.value.name] * (node.output.dtype != "scalar")  # a size costs nothing
        else:
            changes.append(Change(node.value.name, f"dropped {node.value.name}", "nothing reads it"))
    if opaque:  # of an unrolled loop there may be hundreds
        values = opaque[::-1]
        what = f"dropped {', '.join(values[:3])}" + (f" and {len(values) - 3} more" if len(values) > 3 else "")
        why = "nothing reads it" if len(values) == 1 else "nothing reads them"
        changes.append(Change(values[0], what, why, details={"values": values}))
    weights = {name: array for name, array in program.weights.items() if name in live}
    return replace(program, nodes=tuple(reversed(kept)), weights=weights)
