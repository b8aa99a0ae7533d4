"""What a replacement will cost: predicted seconds of what the compiler makes of it, and bytes in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tncompile.frontend.factors import Factors
from tncompile.ir import Axis, Index, Network, Node, Opaque, Program, Ref, Tensor, Term, Value, dims
from tncompile.ir.core import networks_of
from tncompile.ir.edit import CannotEdit, inline, refine, substitute, unique_cores
from tncompile.passes import Blocks, Clean, Context, Fold, Join, MergeCores, Order, Pass
from tncompile.passes.choice import choose
from tncompile.passes.gathers import Gathers
from tncompile.passes.images import images
from tncompile.passes.order import attended
from tncompile.passes.plans import Limits, candidates, held, key_of, ways_of
from tncompile.passes.positions import gather_of
from tncompile.passes.tables import Tables
from tncompile.tensorizer.sites import Replacement, Site

_LIMITS = Limits(Order.max_trials, Order.keep)


@dataclass(frozen=True)
class _Plan:
    """Seconds at each batch size, and what a file holds for it: numbers, by the positions of the cores in the term."""

    seconds: tuple[float, ...]
    held: tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Cost:
    """Seconds at each batch size, and bytes in the file, of the networks that use a site's weights.

    The bytes are those of all cores of these networks; of what is folded those that it is folded from, where they are
    fewer (``--store``). A convolution written out for a small image may take more than its kernel.
    """

    seconds: tuple[float, ...]
    bytes: int


class Predictor:
    """Predicts for the sites of one composed program (see `sites.composed`); what is alike is planned once.

    One site is replaced at a time: where a network holds the weights of several layers, the others are as they were.
    """

    def __init__(self, program: Program, context: Context) -> None:
        self.program = program
        self.context = replace(context, attended=context.attended | attended(program), images=images(program))
        shown = any(dims.shows(size, "batch") for value in program.inputs for size in value.shape or ())
        self.branch = context.profile.branch if shown and not context.compact else float("inf")
        self._plans: dict[object, _Plan] = {}
        self._sites: dict[object, Cost] = {}

    def seconds(self, site: Site, replacement: Replacement | None = None) -> tuple[float, ...]:
        """Seconds of the networks that use a site's weights, at each batch size of the context; 0 for rows of a dense
        table, which are gathered, and for what a node holds: that is the same however it is stored."""
        return self.cost(site, replacement).seconds

    def cost(self, site: Site, replacement: Replacement | None = None) -> Cost:
        """What a site costs with a replacement, or as it is."""
        if site.held:
            numbers = site.size if replacement is None else replacement.parameters
            return Cost((0.0,) * len(self.context.batches), numbers * site.parts[0].array.itemsize)
        key = (self._key(site), None if replacement is None else _form(replacement))
        if key not in self._sites:
            program = self._program(site, replacement)
            cost = self._total(program)
            gathered = {part.name: part.array.nbytes for part in site.parts if self._reads_rows(site, program)}
            self._sites[key] = replace(cost, bytes=cost.bytes + sum(gathered.values()))
        return self._sites[key]

    def planned(self, site: Site, replacement: Replacement | None, batch: int) -> tuple[Network, ...]:
        """The networks that `seconds` prices, scheduled for one batch size; none for a site that is gathered from."""
        if self._gathers(site) or site.held:
            return ()
        program = self._program(site, replacement)
        context = replace(self.context, batches=(batch,))
        for step in (*self._passes(program), Order()):
            program, _ = step.run(program, context)
        return tuple(n for n in program.networks if n.operands and n.cores)

    # ------------------------------------------------------------------------------ the program around a site

    def _networks(self, site: Site) -> list[Network]:
        """The networks that use a site, each once, in order of execution."""
        found = {use.network.output.name: use.network for part in site.parts for use in part.uses}
        return [n for n in self.program.networks if n.output.name in found]

    def _reads_rows(self, site: Site, program: Program) -> bool:
        """Whether rows of the dense table are still gathered."""
        return bool(self._gathers(site)) and not any(isinstance(node, Opaque) for node in program.nodes)

    def _gathers(self, site: Site) -> list[Opaque]:
        names = {part.name for part in site.parts}
        found = []
        for node in self.program.nodes:
            gather = gather_of(node, self.program.values)
            if isinstance(node, Opaque) and gather is not None and gather.source in names:
                found.append(node)
        return found

    def _key(self, site: Site) -> object:
        """What decides the cost of a site but for its format."""
        names = {part.name for part in site.parts}
        networks = self._networks(site)
        operands = {name: k for k, name in enumerate(dict.fromkeys(t.name for n in networks for t in n.operands))}
        terms = []
        for network in networks:
            for term in network.terms:
                mine = tuple(k for k, t in enumerate(term.tensors) if t.name in names)
                reads = tuple(operands[t.name] for t in term.operands)
                terms.append((key_of(network, term, self.context), mine, reads))
        values = self.program.values
        rows = tuple((node.target, values[ref].shape) for node in self._gathers(site) for ref in node.inputs[1:])
        parts = tuple((part.array.shape, part.ins, str(part.array.dtype)) for part in site.parts)
        return parts, tuple(terms), rows

    def _program(self, site: Site, replacement: Replacement | None) -> Program:
        """The networks and gathers of a site as a program of their own, the weights replaced."""
        producers = {}
        for factors in replacement.factors() if replacement is not None else ():
            rebuilt = _rebuilt(factors, str(site.parts[0].array.dtype))
            if rebuilt is not None:
                producers[factors.weight] = rebuilt
        nodes = [_with_cores(network, producers) for network in self._networks(site)]
        gathered: dict[str, Node] = {}
        for node in self._gathers(site):
            source, *rest = node.args
            if isinstance(source, Ref) and source.name in producers:
                producer = producers[source.name]
                gathered[producer.output.name] = producer
                gathered[node.output.name] = replace(node, args=(Ref(producer.output.name), *rest))
        everything = (*gathered.values(), *nodes)
        made = {node.value.name for node in everything}
        read = dict.fromkeys(name for node in everything for name in _inputs(node) if name not in made)
        inputs = tuple(Value(name, *self._signature(name)) for name in read)
        shown = [node.value.name for node in everything if not (isinstance(node, Network) and not node.operands)]
        return unique_cores(Program(inputs, everything, tuple((name, name) for name in shown)))

    def _signature(self, name: str) -> tuple[str, tuple[dims.Dim, ...] | None]:
        value = self.program.values[name]
        return value.dtype, value.shape

    # ------------------------------------------------------------------------------ its price

    def _total(self, program: Program) -> Cost:
        for step in self._passes(program):
            program, _ = step.run(program, self.context)
        seconds, held = np.zeros(len(self.context.batches)), dict[object, int]()
        for network in (network for node in program.nodes for network in networks_of(node)):
            itemsize = np.dtype(network.dtype).itemsize
            for term in network.terms:
                if term.is_constant:
                    continue
                plan = self._term(network, term)
                seconds += plan.seconds
                names = [t.name for t in term.tensors]
                for positions, count in plan.held:  # windows that are written out follow after the tensors
                    made_of = tuple(names[p] if p < len(names) else (network.output.name, p) for p in positions)
                    held[made_of] = itemsize * count
        rows = sum(_stored(program, name) for name in program.weights)
        return Cost(tuple(map(float, seconds)), sum(held.values()) + rows)

    def _passes(self, program: Program) -> Sequence[Pass]:
        """Those of the pipeline that decide the plan of so few networks."""
        rows = any(isinstance(node, Opaque) for node in program.nodes)
        several = sum(bool(network.operands) for network in program.networks) > 1
        first: list[Pass] = [Clean(), *([Gathers(), Fold()] if rows else []), *([Join(), Clean()] if several else [])]
        return [*first, MergeCores(), *([Tables()] if rows else []), Blocks(), Clean()]

    def _term(self, network: Network, term: Term) -> _Plan:
        """The plan that `order` would choose."""
        key = key_of(network, term, self.context)
        if key not in self._plans:
            ways = ways_of(network, term, self.context, lambda n, t: candidates(n, t, self.context, _LIMITS))
            batches = self.context.batches
            choice = choose([*ways], batches, self.branch, Order.margin)
            extra = self.branch if choice.limits else 0.0
            seconds = tuple(choice.plan_for(b).times[k] + extra for k, b in enumerate(batches))
            kept = {p: n for way in choice.plans for p, n in held(network, ways[way], way.tree)}
            self._plans[key] = _Plan(seconds, tuple(kept.items()))
        return self._plans[key]


def _inputs(node: Node) -> Iterator[str]:
    if isinstance(node, Opaque):
        yield from node.inputs
    else:
        yield from (t.name for t in node.operands)


def _form(replacement: Replacement) -> object:
    factorized = replacement.factorized
    return type(factorized), factorized.axes, factorized.labels, tuple(core.shape for core in factorized.cores)


def _rebuilt(factors: Factors, dtype: str) -> Network | None:
    """The weight as a network of cores, its modes split where an axis of the weight ends within one.

    None where they do not nest: the compiler then computes the weight, which is as it was.
    """
    sizes = {n: s for core in factors.cores for n, s in zip(core.labels, core.array.shape, strict=True)}
    indices = {name: Index(name, size) for name, size in sizes.items()}
    cores = [
        Tensor(c.name, tuple((indices[n],) if sizes[n] != 1 else () for n in c.labels), c.array.astype(dtype))
        for c in factors.cores
    ]
    value = f"{factors.weight}:rebuilt"
    modes = tuple(indices[name] for name in factors.modes if sizes[name] != 1)
    axes = [Index(f"{value}{k}", size) for k, size in enumerate(factors.sizes)]
    try:
        split, regrouped = refine(modes, tuple(a for a in axes if a.size != 1), {*indices})
    except CannotEdit:
        return None
    network = Network("", (Term(tuple(cores)),), Tensor(value, tuple((m,) for m in modes)), dtype)
    left = list(substitute(network, split).output.indices)
    groups: list[Axis] = []
    for axis in axes:
        count = 0 if axis.size == 1 else len(regrouped.get(axis.name, (axis,)))
        groups.append(tuple(left[:count]))
        left = left[count:]
    return replace(substitute(network, split), output=Tensor(value, tuple(groups[k] for k in factors.order)))


def _with_cores(network: Network, producers: Mapping[str, Network]) -> Network:
    """A network with weights rebuilt in it; as it was where their modes do not nest with its own."""
    for name, producer in producers.items():
        if not any(t.name == name for t in network.cores):
            continue
        read = replace(network, terms=tuple(_opened(term, name, producer.output.name) for term in network.terms))
        try:
            network = inline(read, producer)
        except CannotEdit:
            continue
    return network


def _opened(term: Term, weight: str, value: str) -> Term:
    """A term that reads a value in the place of a weight."""
    tensors = (Tensor(value, t.axes) if t.is_core and t.name == weight else t for t in term.tensors)
    return replace(term, tensors=tuple(tensors))


def _stored(program: Program, weight: str) -> int:
    """Bytes of a weight in the file, which holds one that is made of smaller cores as those."""
    array, made = program.weights[weight], program.made.get(weight)
    return array.nbytes if made is None or made.recipe is None else made.recipe.elements * array.itemsize
