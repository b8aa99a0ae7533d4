"""Make one network of layers with nothing nonlinear between them, and fold scales, biases and weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tncompile.cost.search import optimal
from tncompile.errors import SourceRef
from tncompile.ir import Array, Index, Network, Node, Opaque, Program, Recipe, Tensor, Term
from tncompile.ir.core import sources_of
from tncompile.ir.edit import CannotEdit, inline, merged_axes, merged_name, refine, substitute, unique_cores
from tncompile.ir.evaluate import einsum, evaluate, evaluate_term, merge
from tncompile.ir.tree import left_to_right
from tncompile.passes.base import Change, Context, Pass

MOST_CONSTANT_TERMS = 16
"""A sum of more products of cores is computed, and not put into what reads it term by term."""
SHARED = "others read it too, and would compute it again"


@dataclass(frozen=True)
class Fold(Pass):
    """Put networks into the networks that read them.

    ```
    network h: h[b, (i j)] = x[b, i0 j0] A[i0, r, i] B[r, j0, j] + bias1[i, j]
    network y: y[b, o] = h[b, k] C[k, o] + bias2[o]
    ->
    network y: y[b, o] = x[b, i0 j0] A[i0, r, i] B[r, j0, j] C[(i j), o] + bias[o]
    ```

    A network P is put into its reader Q where

    1. P has cores only, or is a view (one operand, no cores: free to repeat), or Q alone reads it, once, or all that it
       becomes in Q can be added into cores of other terms (an adapter whose factor others share) or, where Q alone
       reads P, into one term (several uses of one layer);
    2. at most one term of P has operands, or Q only adds and rearranges it: else Q's cores would be applied
       to each term on its own;
    3. P has no constant terms, or all else in Q's term are cores: else biases would become run-time work;
    4. the modes of P's output and Q's operand nest, and no term grows over `max_tensors` tensors.

    Then, in every network: terms of cores alone become one bias; terms that apply one core each to the same
    operand become one (an adapter folds into its layer); a network of cores alone is computed.

    With `apart` only views and networks of cores alone are put into others: every layer stays one network, which reads
    what that layer reads in the model. Without `add` no cores are added up: each weight stays a core of its own.
    """

    max_tensors: int = 256
    apart: bool = False
    add: bool = True

    def run(self, program: Program, context: Context) -> tuple[Program, Sequence[Change]]:
        changes: list[Change] = []
        program = self._compose(program, changes)
        nodes: list[Node] = []
        weights, origins, made = dict(program.weights), dict(program.origins), dict(program.made)
        shown = {name for _, name in program.outputs}
        for node in program.nodes:
            if isinstance(node, Network):
                node = _combine_terms(node, changes, self.add)
                if not node.operands and node.output.name not in shown:
                    core = _contracted(node)
                    assert core.data is not None
                    weights[node.output.name] = core.data
                    origins[node.output.name] = sources_of(node.cores)
                    if core.recipe is not None:
                        made[node.output.name] = core
                    what = f"computed {node.output.name} from {len(node.cores)} cores at compile time"
                    changes.append(Change(node.output.name, what, "it depends on weights alone"))
                    continue
            nodes.append(node)
        used = {n for node in nodes if isinstance(node, Opaque) for n in node.inputs}
        weights = {k: v for k, v in weights.items() if k in used}
        made = {name: core for name, core in made.items() if name in weights}
        folded = replace(program, nodes=tuple(nodes), weights=weights, origins=origins, made=made)
        return unique_cores(folded), changes

    # ------------------------------------------------------------------------------ composition

    def _compose(self, program: Program, changes: list[Change]) -> Program:
        """One walk in order of execution; a reader takes in what it reads, which has taken in its own before."""
        nodes: dict[str, Node] = {}
        uses = Counter(program.uses)
        notes: dict[str, _Notes] = {}
        shown = {name for _, name in program.outputs}
        for node in program.nodes:
            if isinstance(node, Network):
                notes[node.output.name] = _Notes()
                node = self._absorb(node, nodes, uses, shown, notes)
            nodes[node.value.name] = node
        for node in nodes.values():
            if isinstance(node, Network):
                changes.extend(notes[node.output.name].changes(node.output.name, nodes))
        return replace(program, nodes=tuple(nodes.values()))

    def _absorb(
        self, reader: Network, nodes: dict[str, Node], uses: Counter[str], shown: set[str], notes: dict[str, _Notes]
    ) -> Network:
        declined: dict[str, str] = {}
        note = notes[reader.output.name]
        while True:
            source = next((n for n in reader.inputs if n not in declined and isinstance(nodes.get(n), Network)), None)
            if source is None:
                note.declined.update(declined)
                return reader
            producer = nodes[source]
            assert isinstance(producer, Network)
            reads = sum(t.name == source for t in reader.operands)
            others = uses[source] > reads or source in shown
            try:
                self._check(producer, reader)
                merged = self._inlined(reader, producer)
                if producer.operands and (others or reads > 1) and not is_view(producer):
                    merged = self._added(merged, reader, producer, others)
            except CannotEdit as reason:
                declined[source] = str(reason)
                continue
            declined = {name: reason for name, reason in declined.items() if reason != SHARED}  # that may fit now
            uses.update(t.name for t in merged.operands)
            uses.subtract(t.name for t in reader.operands)
            if not others:
                del nodes[source]
                uses.subtract(t.name for t in producer.operands)
            note.take(notes[source])
            if all((_weighs(producer), _weighs(reader), producer.operands, producer.name != reader.name)):
                note.composed.append(f"{producer.label} and {reader.label} composed")
            layer, source_ref = _layer(producer, reader)
            reader = replace(merged, name=layer, source=source_ref)

    def _inlined(self, reader: Network, producer: Network) -> Network:
        """`inline`; of a producer of cores alone its value, where the cores do not fit or are too many."""
        try:
            if not producer.operands:
                reads = sum(t.name == producer.output.name for t in reader.operands)
                if reads * len(producer.terms) > MOST_CONSTANT_TERMS:
                    raise CannotEdit("too many terms")
            merged = inline(reader, producer)
            if max(len(t.tensors) for t in merged.terms) > self.max_tensors:
                raise CannotEdit(f"a term would have over {self.max_tensors} tensors")
            return merged
        except CannotEdit:
            if producer.operands:
                raise
            return inline(reader, _computed(producer))

    def _added(self, merged: Network, reader: Network, producer: Network, others: bool) -> Network:
        """`merged`, into which a producer was put that the reader reads more than once or that `others` read too, with
        like terms added up. CannotEdit where one more term would be left than without the producer, or two if the
        producer is needed no more."""
        value = producer.output.name
        reads = [sum(t.name == value for t in term.operands) for term in reader.terms]
        if not self.add or max(reads) > 1:
            raise CannotEdit(SHARED)
        put_in = [bool(n) for n in reads for _ in range(len(producer.terms) if n else 1)]
        moving = [(new, t) for new, t in zip(put_in, merged.terms, strict=True) if not t.is_constant]
        old = merge_like_terms(merged, [t for new, t in moving if not new], [], shapes_only=True)
        all_ = merge_like_terms(merged, [*old, *(t for new, t in moving if new)], [], shapes_only=True)
        if len(all_) > len(old) + (not others):
            raise CannotEdit(SHARED)
        terms = merge_like_terms(merged, [t for _, t in moving], [])
        return replace(merged, terms=(*terms, *merged.constants))

    def _check(self, producer: Network, reader: Network) -> None:
        """Raise CannotEdit, with the reason, where composition is not always right."""
        value = producer.output.name
        if producer.dtype != reader.dtype:
            raise CannotEdit("another dtype")
        if not producer.operands:
            return
        if self.apart and not is_view(producer):
            raise CannotEdit("layers are kept apart")
        moving = [t for t in producer.terms if t.operands]
        for term in reader.terms:
            reads = sum(t.name == value for t in term.operands)
            if not reads:
                continue
            others = [t for t in term.tensors if t.name != value or t.is_core]
            if len(moving) > 1 and (others or reads > 1):
                raise CannotEdit("it is a sum of run-time terms, and what follows would be applied to each")
            if len(producer.terms) > 1 and (reads > 1 or any(not t.is_core for t in others)):
                raise CannotEdit("it has a bias and meets another operand: the bias would become run-time work")


def _computed(network: Network) -> Network:
    """A network of cores alone as one core, with one index for each axis."""
    name, value = network.output.name, np.asarray(evaluate(network).astype(network.dtype))
    axes = tuple(() if n == 1 else (Index(f"d{k}", n),) for k, n in enumerate(value.shape))
    core = Tensor(name, axes, value, origins=sources_of(network.cores))
    return replace(network, terms=(Term((core,)),), output=Tensor(name, axes))


def _contracted(network: Network) -> Tensor:
    """The value of a network of cores alone, in its axes; how it was contracted where the cores are smaller."""
    data = np.asarray(evaluate(network).astype(network.dtype))
    (term, *others), kept = network.terms, network.output.indices
    plain = not others and not term.windows and {i.name for i in kept} <= {*term.indices} and len({*kept}) == len(kept)
    recipe = Recipe.where_smaller(term, kept) if plain else None
    return Tensor(network.output.name, network.output.axes, data, recipe, sources_of(network.cores))


@dataclass
class _Notes:
    """What went into one network: for the report, if the network survives."""

    operations: int = 1
    composed: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)

    def take(self, other: _Notes) -> None:
        self.operations += other.operations
        self.composed = [*other.composed, *self.composed]
        self.declined |= other.declined

    def changes(self, network: str, nodes: Mapping[str, Node]) -> Iterator[Change]:
        if self.operations > 1:
            yield Change(network, f"{self.operations} operations are one network", "nothing nonlinear between them")
        for what in self.composed:
            yield Change(network, what, "nothing nonlinear between them")
        for name, why in self.declined.items():
            producer = nodes.get(name)
            if isinstance(producer, Network) and producer.cores and producer.operands:
                yield Change(network, f"{name} ({producer.label}) stays a network of its own", why, declined=True)


def is_view(network: Network) -> bool:
    """Whether a network only rearranges one operand, so that repeating it costs nothing."""
    if len(network.terms) != 1 or len(network.terms[0].tensors) != 1 or network.terms[0].tensors[0].is_core:
        return False
    inside = [i.name for i in network.terms[0].tensors[0].indices]
    return sorted(inside) == sorted(i.name for i in network.output.indices)


def _layer(producer: Network, reader: Network) -> tuple[str, SourceRef]:
    """The layer that a composed network stands for: the one with the cores, both where both have some."""
    if not producer.name or not _weighs(producer):
        return (reader.name, reader.source) if reader.name else (producer.name, producer.source)
    if not reader.name or not _weighs(reader):
        return producer.name, producer.source
    names = list(dict.fromkeys([*producer.name.split("+"), *reader.name.split("+")]))
    inner = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
    return "+".join(inner), producer.source


def _weighs(network: Network) -> bool:
    return any(len(t.indices) > 1 for t in network.cores)


# ---------------------------------------------------------------------------------- terms


def _combine_terms(network: Network, changes: list[Change], add: bool) -> Network:
    constants = [*network.constants]
    moving = merge_like_terms(network, network.moving, changes) if add else [*network.moving]
    if moving and len(constants) + sum(len(t.tensors) > 1 for t in constants) > 1:
        constants = [_bias(network, constants)]
        what = f"{len(network.constants)} biases and scales are one bias"
        changes.append(Change(network.output.name, what, "a sum of cores"))
    if moving:
        zero = [t.tensors[0].name for t in constants if not np.any(t.tensors[0].data)]
        constants = [t for t in constants if np.any(t.tensors[0].data)]
        changes += [Change(network.output.name, f"dropped {name}", "it is 0 everywhere") for name in zero]
    terms = (*moving, *constants)
    return network if terms == network.terms else replace(network, terms=terms)


def _bias(network: Network, constants: Sequence[Term]) -> Term:
    """The sum of terms of cores as one core over the indices that any of them has."""
    present = {name for t in constants for name in t.indices}
    keep = tuple(i for i in network.output.indices if i.name in present)
    total: Array = np.zeros([1] * len(keep))
    for term in constants:
        total = total + _aligned(term, keep)
    total = np.broadcast_to(total, [int(i.size) for i in keep])
    name = next(
        (c.name for t in constants for c in t.cores if c.name.endswith(("bias", "bias.folded"))),
        f"{network.output.name}.bias",
    )
    name = name if len(constants) == 1 or name.endswith(".folded") else f"{name}.folded"
    made = sources_of(core for term in constants for core in term.cores)
    core = Tensor(name, tuple((i,) for i in keep), np.array(total, network.dtype, order="C"), origins=made)
    return Term((core,))


def _aligned(term: Term, keep: Sequence[Index]) -> Array:
    """A term of cores with one axis for each index of `keep`, of size 1 where it lacks the index."""
    sizes = {name: int(i.size) for name, i in term.indices.items()}
    inputs = [tuple(dict.fromkeys(i.name for i in core.indices)) for core in term.tensors]
    order = optimal(inputs, tuple(i.name for i in keep if i.name in sizes), sizes)
    return evaluate_term(replace(term, order=order), keep, {}, lambda index: int(index.size))


def merge_like_terms(
    network: Network, terms: Sequence[Term], changes: list[Change], shapes_only: bool = False
) -> list[Term]:
    """``x W + x A B`` -> ``x (W + A B)`` where the sum is no larger than the largest of the cores.

    With `shapes_only` nothing is computed: the new cores are all zeros and take no memory.
    """
    result: list[Term] = []
    for term in terms:
        for k, other in enumerate(result):
            merged = _merge_like(network, other, term, shapes_only)
            if merged is not None:
                result[k] = merged
                what = f"{merged_name([c.name for c in term.cores])} added into {other.cores[0].name}"
                changes.append(Change(network.output.name, what, "same operand, same modes"))
                break
        else:
            result.append(term)
    return result


def _merge_like(network: Network, a: Term, b: Term, shapes_only: bool) -> Term | None:
    """One term for two that apply cores to the same modes of one operand; None where that would cost more."""
    if len(a.operands) != 1 or len(b.operands) != 1 or a.operands[0].name != b.operands[0].name:
        return None
    output = {i.name for i in network.output.indices}
    try:
        a, b = _split_alike(network, a, b)
    except CannotEdit:
        return None
    x, y = a.operands[0], b.operands[0]
    if any(len({*t.indices}) < len(t.indices) for t in (x, y)):
        return None
    if any((i != j) and {i.name, j.name} & output for i, j in zip(x.indices, y.indices, strict=True)):
        return None  # the operand is read in another order: x + x transposed
    if not (a.cores and b.cores):
        return None
    renamed = {theirs.name: ours.name for theirs, ours in zip(y.indices, x.indices, strict=True)}
    slid = {(w.axis, w.out, w.stride, w.dilation, w.padding): w.kernel for w in a.windows}
    for w in b.windows:
        kernel = slid.pop((renamed[w.axis], w.out, w.stride, w.dilation, w.padding), None)
        if kernel is None or a.indices[kernel].size != b.indices[w.kernel].size:
            return None
        renamed[w.kernel] = kernel
    if slid:
        return None
    ours, theirs = _core_indices(network, a), _core_indices(network, b)
    first = {i.name: i for i in ours}
    second = {i.name: i for i in (replace(i, name=renamed.get(i.name, i.name)) for i in theirs)}
    kept = second | first if len(second) > len(first) else first | second
    largest = max(c.data.size for t in (a, b) for c in t.cores if c.data is not None)
    shape = [int(i.size) for i in kept.values()]
    if math.prod(shape) > largest:
        return None
    if shapes_only:
        data = np.broadcast_to(np.zeros((), network.dtype), shape)
    else:
        total = _product(a, ours, (*first,), kept) + _product(b, theirs, (*second,), kept)
        with np.errstate(over="ignore"):
            data = np.broadcast_to(total, shape).astype(network.dtype)
        if np.isfinite(total).all() and not np.isfinite(data).all():
            return None  # the sum does not fit into float16
    name = f"{merged_name([c.name for c in a.cores])}+{merged_name([c.name for c in b.cores])}"
    core = Tensor(name, tuple((i,) for i in kept.values()), data, origins=sources_of((*a.cores, *b.cores)))
    return Term((x, core), windows=a.windows)


def _product(term: Term, own: Sequence[Index], names: Sequence[str], kept: Mapping[str, Index]) -> Array:
    """The product of a term's cores, whose `own` indices are called `names` elsewhere, with one axis for each index
    that is `kept`, of size 1 where it lacks the index."""
    product = merge(term.cores, left_to_right(range(len(term.cores))), own)
    product = einsum([(product, tuple(names))], [name for name in kept if name in names])
    return product.reshape([int(i.size) if name in names else 1 for name, i in kept.items()])


def _split_alike(network: Network, a: Term, b: Term) -> tuple[Term, Term]:
    """Two terms in which one operand has the same modes, summed indices split where the other has them finer.

    CannotEdit where that does not go."""
    taken = {*network.indices}
    for axis in range(len(a.operands[0].axes)):
        splits = refine(a.operands[0].axes[axis], b.operands[0].axes[axis], taken)
        if any(i.name in split for split in splits for i in network.output.indices):
            raise CannotEdit("modes of the result differ")
        a, b = (substitute(replace(network, terms=(t,)), s).terms[0] for t, s in zip((a, b), splits, strict=True))
        taken |= {*a.indices, *b.indices}
    return a, b


def _core_indices(network: Network, term: Term) -> tuple[Index, ...]:
    """The indices that the product of a term's cores has."""
    return merged_axes(term, [p for p, t in enumerate(term.tensors) if t.is_core], network.output.indices)
