"""Random networks, compiled to ONNX and run, against numpy.einsum in float64.

``TNCOMPILE_NETWORKS=2000 pytest tests/test_property.py`` compiles 2,000 of them (default 200), and a fifth as many of
each further kind. Each has a seed; a failure prints it with the program, and
``TNCOMPILE_FIRST=1234 TNCOMPILE_NETWORKS=1`` runs seed 1234 again.

Sizes are bounded while a network is drawn, so that none has to be left out; the line under the summary counts them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.helpers import assert_exact, compile_program, feeds_for, reference
from tncompile.ir import Array, Dim, Index, Network, Node, Program, Tensor, Term, Value, dims, verify
from tncompile.ir import text as ir_text
from tncompile.ir.edit import substitute_tensor
from tncompile.passes import DEFAULT, Context, Join

NETWORKS = int(os.environ.get("TNCOMPILE_NETWORKS", "200"))
FIRST = int(os.environ.get("TNCOMPILE_FIRST", "0"))
CHUNK = 20
FAMILIES = ("chain", "tree", "ring", "hyperedge", "free")
SPACE = 60_000  # the product of all static sizes of a term
ROUNDINGS = {"float64": 64, "float32": 64, "float16": 24}
RUNS = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 5})


def chunks(count: int) -> pytest.MarkDecorator:
    """Parametrizes a test by ranges of seeds, so that workers can share them."""
    stop = FIRST + count
    ranges = [range(start, min(start + CHUNK, stop)) for start in range(FIRST, stop, CHUNK)]
    return pytest.mark.parametrize("chunk", ranges, ids=lambda r: f"{r.start}-{r.stop - 1}")


all_of_them = chunks(NETWORKS)
a_fifth = chunks(-(-NETWORKS // 5))


# ------------------------------------------------------------------------------------ drawing


def draw_numbers(generator: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    """Normal numbers; for float16 between 1/2 and 1 in magnitude, so that no product leaves its range."""
    numbers = generator.standard_normal(shape)
    if dtype == "float16":
        numbers = np.sign(numbers) * generator.uniform(0.5, 1.0, shape)
    return np.asarray(numbers, dtype)


@dataclass
class Draft:
    """A network while it is drawn: each tensor is a list of index names, and sizes may still shrink."""

    rng: random.Random
    numbers: np.random.Generator
    dtype: str = "float32"
    symbols: tuple[str, ...] = ()
    sizes: dict[str, Dim] = field(default_factory=dict)
    cores: int = 0

    def index(self, size: Dim | None = None) -> str:
        """A new index."""
        name = f"i{len(self.sizes)}"
        self.sizes[name] = self.rng.choice([1, 2, 2, 3, 3, 4, 5, 6]) if size is None else size
        return name

    def skeleton(self, family: str, count: int) -> list[list[str]]:
        """The bonds and own modes of `count` tensors."""
        rng = self.rng
        ends = {
            "chain": [(k, k + 1) for k in range(count - 1)],
            "tree": [(rng.randrange(k), k) for k in range(1, count)],
            "ring": [(k, (k + 1) % count) for k in range(count)],
            "hyperedge": [tuple(range(count)), *([tuple(range(0, count, 2))] if rng.random() < 0.5 else [])],
            "free": [
                tuple(rng.randrange(count) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, count + 2))
            ],
        }[family]
        tensors: list[list[str]] = [[] for _ in range(count)]
        for places in ends:
            bond = self.index()
            for place in places:
                tensors[place].append(bond)
        for tensor in tensors:
            tensor += [self.index() for _ in range(rng.choice([0, 1, 1, 1, 2]))]
            if tensor and rng.random() < 0.12:
                tensor.append(rng.choice(tensor))  # a diagonal
            rng.shuffle(tensor)
        return tensors

    def shrink(self, names: Sequence[str]) -> None:
        """Make sizes smaller until the term is small enough to compare."""
        static = [n for n in dict.fromkeys(names) if isinstance(self.sizes[n], int)]
        while math.prod(int(self.sizes[n]) for n in static) > SPACE:
            largest = max(static, key=lambda n: (self.sizes[n], n))
            self.sizes[largest] = int(self.sizes[largest]) - 1

    def place_symbols(self, operands: Sequence[list[str]]) -> None:
        """Each symbol on one operand or more, at most once on each."""
        for symbol in self.symbols:
            self.sizes.setdefault(symbol[0], symbol)
            for tensor in self.rng.sample(operands, self.rng.randint(1, len(operands))):
                if symbol[0] not in tensor:
                    tensor.insert(self.rng.choice([0, 0, self.rng.randint(0, len(tensor))]), symbol[0])

    def axes(self, names: Sequence[str]) -> tuple[tuple[Index, ...], ...]:
        """Neighbours grouped into axes, with an axis of size 1 now and then."""
        groups: list[tuple[Index, ...]] = []
        rest = list(names)
        while rest:
            width = self.rng.choice([1, 1, 1, 2, 3])
            groups.append(tuple(Index(n, self.sizes[n]) for n in rest[:width]))
            rest = rest[width:]
        if self.rng.random() < 0.1:
            groups.insert(self.rng.randint(0, len(groups)), ())
        return tuple(groups)

    def core(self, names: Sequence[str]) -> Tensor:
        """A core with random numbers."""
        self.cores += 1
        axes = self.axes(names)
        shape = Tensor("", axes).shape
        return Tensor(f"core{self.cores}", axes, draw_numbers(self.numbers, [int(s) for s in shape], self.dtype))

    def output(self, name: str, terms: Sequence[Sequence[Sequence[str]]]) -> Tensor:
        """Own modes of tensors for the most part, some bonds, in any order."""
        count: dict[str, int] = {}
        for n in (n for term in terms for tensor in term for n in tensor):
            count[n] = count.get(n, 0) + 1
        chance = {n: 0.85 if isinstance(self.sizes[n], str) else 0.7 if c == 1 else 0.2 for n, c in count.items()}
        chosen = [n for n in count if self.rng.random() < chance[n]]
        self.rng.shuffle(chosen)
        return Tensor(name, self.axes(chosen))


def single(seed: int, dtype: str = "float32", symbols: tuple[str, ...] | None = None) -> Program:
    """One network of one term: 1 to 8 tensors, of which 1 to 3 flow in."""
    rng = random.Random(seed)
    if symbols is None:
        symbols = ("batch",) if rng.random() < 0.6 else ()
    draft = Draft(rng, np.random.default_rng(seed), dtype, symbols)
    names = draft.skeleton(FAMILIES[seed % len(FAMILIES)], rng.randint(1, 8))
    flowing = sorted(rng.sample(range(len(names)), rng.randint(1, min(3, len(names)))))
    draft.place_symbols([names[k] for k in flowing])
    draft.shrink([n for tensor in names for n in tensor])
    tensors = [Tensor(f"x{k}", draft.axes(n)) if k in flowing else draft.core(n) for k, n in enumerate(names)]
    return with_witnesses(draft, [Network("net", (Term(tuple(tensors)),), draft.output("y", [names]), dtype)], ["y"])


def summed(seed: int) -> Program:
    """A sum of 2 to 4 small networks: shared operands, biases, a residual, terms that lack output indices."""
    rng = random.Random(seed)
    symbols = ("batch",) if rng.random() < 0.6 else ()
    draft = Draft(rng, np.random.default_rng(seed), "float32", symbols)
    shared: list[list[str]] = []
    terms: list[list[list[str]]] = []
    flows: list[list[bool]] = []
    for number in range(rng.randint(2, 4)):
        names = draft.skeleton(rng.choice(FAMILIES), rng.randint(1, 3))
        flow = [rng.random() < (1.0 if number == 0 and k == 0 else 0.4) for k in range(len(names))]
        if shared and rng.random() < 0.7:  # read what another term reads, and be bonded to it
            names[0], flow[0] = rng.choice(shared), True
            for tensor in names[1:]:
                tensor.append(rng.choice([n for n in names[0] if n not in symbols] or [draft.index()]))
        shared += [n for n, f in zip(names, flow, strict=True) if f and not any(n is s for s in shared)]
        terms.append(names)
        flows.append(flow)
    draft.place_symbols(shared)
    for names in terms:
        for tensor in names:  # only operands have symbolic sizes
            if not any(tensor is s for s in shared):
                tensor[:] = [n for n in tensor if isinstance(draft.sizes[n], int)]
    draft.shrink([n for names in terms for tensor in names for n in tensor])
    operands = {id(n): Tensor(f"x{k}", draft.axes(n)) for k, n in enumerate(shared)}
    built = []
    for number, (names, flow) in enumerate(zip(terms, flows, strict=True)):
        other: dict[str, str] = {}
        if number and rng.random() < 0.4:  # the same operand by other names: a mode that is kept there is summed here
            other = {n: draft.index(draft.sizes[n]) for n in dict.fromkeys(names[0]) if rng.random() < 0.6}
        mapping = {old: (Index(new, draft.sizes[new]),) for old, new in other.items()}
        renamed = [[other.get(n, n) for n in tensor] for tensor in names]
        tensors = [
            substitute_tensor(operands[id(old)], mapping) if flows_in else draft.core(new)
            for old, new, flows_in in zip(names, renamed, flow, strict=True)
        ]
        built.append(Term(tuple(tensors)))
        terms[number] = renamed
    output = draft.output("y", terms)
    if rng.random() < 0.3:  # an output index that no term has
        extra = draft.index(2)
        output = Tensor("y", (*output.axes, (Index(extra, 2),)))
    if rng.random() < 0.5:  # a residual or a plain bias over the output's own modes
        flowing = rng.random() < 0.5 or any(isinstance(i.size, str) for i in output.indices)
        plain = [i.name for i in output.indices]
        residual = Tensor("residual", output.axes) if flowing else draft.core(rng.sample(plain, len(plain)))
        built.append(Term((residual,)))
    rng.shuffle(built)
    return with_witnesses(draft, [Network("net", tuple(built), output, "float32")], ["y"])


def several(seed: int, symbols: tuple[str, ...] | None = None) -> Program:
    """A chain of 2 to 4 networks, each of which reads the one before in another grouping, some with a bias."""
    rng = random.Random(seed)
    if symbols is None:
        symbols = ("batch",) if rng.random() < 0.6 else ()
    numbers = np.random.default_rng(seed)
    nodes: list[Node] = []
    cores = 0
    drafts = []
    for number in range(rng.randint(2, 4)):
        draft = Draft(rng, numbers, "float32", symbols, cores=cores)
        drafts.append(draft)
        names = draft.skeleton(rng.choice(FAMILIES), rng.randint(1, 4))
        if number == 0:
            draft.place_symbols([names[0]])
            draft.shrink([n for tensor in names for n in tensor])
            tensors = [Tensor("x", draft.axes(names[0])), *(draft.core(n) for n in names[1:])]
        else:
            before = nodes[-1].value
            operand, own = regrouped(draft, before)
            for tensor in names[1:]:  # bonds to what flows in
                tensor += rng.sample(own, min(len(own), rng.choice([0, 1, 1, 2])))
            names[0] = [i.name for i in operand.indices]
            draft.shrink([n for n in (n for tensor in names for n in tensor) if n not in names[0]])
            fit(draft, names)
            tensors = [operand, *(draft.core(n) for n in names[1:])]
            if rng.random() < 0.2:
                tensors.append(operand)  # read twice: a square
                names.append(names[0])
        output = draft.output(f"v{number}", [names])
        terms = [Term(tuple(tensors))]
        if rng.random() < 0.5:
            static = [i.name for i in output.indices if isinstance(i.size, int)]
            terms.append(Term((draft.core(rng.sample(static, rng.randint(0, len(static)))),)))
        if rng.random() < 0.3:
            terms.append(Term((Tensor("x" if number == 0 else nodes[-1].value.name, tensors[0].axes),)))
        cores = draft.cores
        nodes.append(Network(f"net{number}", tuple(terms), output, "float32"))
        assert isinstance(nodes[-1], Network)
    shown = [n.value.name for n in nodes[:-1] if rng.random() < 0.2] + [nodes[-1].value.name]
    return with_witnesses(drafts[0], nodes, shown)


def regrouped(draft: Draft, value: Value) -> tuple[Tensor, list[str]]:
    """A value as an operand whose axes are split into modes of its own, maybe not those it was made of."""
    axes: list[tuple[Index, ...]] = []
    for dim in value.shape or ():
        integer, symbols = dims._factors(dim)
        parts: list[Dim] = [*symbols.elements()]
        while integer > 1:
            divisor = draft.rng.choice([d for d in range(2, integer + 1) if integer % d == 0])
            parts.append(divisor)
            integer //= divisor
        group = []
        for part in parts:
            name = part[0] if isinstance(part, str) else draft.index(part)
            draft.sizes[name] = part
            group.append(Index(name, part))
        axes.append(tuple(group))
    static = [i.name for axis in axes for i in axis if isinstance(i.size, int)]
    return Tensor(value.name, tuple(axes)), static


def fit(draft: Draft, names: Sequence[list[str]]) -> None:
    """Take modes away from cores, the last ones first, until the term is small enough."""

    def space() -> int:
        return math.prod(int(s) for n in {n for t in names for n in t} if isinstance(s := draft.sizes[n], int))

    for tensor in reversed(names[1:]):
        while tensor and space() > SPACE:
            tensor.pop()


def with_witnesses(draft: Draft, nodes: list[Node], shown: Sequence[str]) -> Program:
    """The program; where its inputs would show a symbol inside a product only, one more input shows it alone."""
    networks = [n for n in nodes if isinstance(n, Network)]
    made = {n.output.name for n in networks}
    inputs = {t.name: Value(t.name, draft.dtype, t.shape) for n in networks for t in n.operands if t.name not in made}
    for symbol in draft.symbols:
        alone = any(isinstance(dims.divide(d, symbol), int) for v in inputs.values() for d in v.shape or ())
        if not alone:
            inputs[f"size_{symbol}"] = Value(f"size_{symbol}", draft.dtype, (symbol,))
    return Program(tuple(inputs.values()), tuple(nodes), tuple((f"out_{name}", name) for name in shown))


# ------------------------------------------------------------------------------------ comparing


def compare(program: Program, what: str) -> None:
    """Compile a program and compare every output with the reference, at both sizes of the symbols."""
    try:
        verify(program)
        dtype = program.inputs[0].dtype
        # selections from joined networks are the exporter's to lower, and here is none
        passes = [step for step in DEFAULT if not isinstance(step, Join)]
        compiled = compile_program(program, Context(batches=(1, 7), sizes={"seq": 5}), passes)
        for symbols in RUNS:
            numbers = np.random.default_rng(1)
            feeds = {
                v.name: draw_numbers(numbers, [dims.evaluate(d, symbols) for d in v.shape or ()], dtype)
                for v in program.inputs
            }
            found = compiled.run(feeds)
            expected = reference(program, feeds, symbols)
            magnitude = reference(program, feeds, symbols, absolute=True)
            assert list(found) == [public for public, _ in program.outputs]
            for public, name in program.outputs:
                where = f"{public} at {symbols}"
                roundings = ROUNDINGS[dtype] * len(program.nodes)
                assert_exact(found[public], expected[name], magnitude[name], dtype, roundings=roundings, what=where)
    except Exception as error:
        text = ir_text.dump(program)
        raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{text}") from error


def compare_all(
    chunk: range, draw: Callable[[int], Program], kind: str, record_property: Callable[[str, object], None]
) -> None:
    """Compare all of a chunk, and count them; what would be too large to compare may not be drawn at all."""
    for seed in chunk:
        program = draw(seed)
        assert all(space_of(t) <= 8 * SPACE for n in program.networks for t in n.terms), f"seed {seed} is too large"
        compare(program, f"{kind}, seed {seed}")
    record_property(f"networks {kind} compared, 0 skipped for size", len(chunk))


def space_of(term: Term) -> int:
    """The product of all static sizes of a term."""
    return math.prod(i.size for i in term.indices.values() if isinstance(i.size, int))


@all_of_them
def test_one_network(chunk: range, record_property: Callable[[str, object], None]) -> None:
    compare_all(chunk, single, "of one term", record_property)


@a_fifth
def test_sums_of_networks(chunk: range, record_property: Callable[[str, object], None]) -> None:
    compare_all(chunk, summed, "sums", record_property)


@a_fifth
def test_chains_of_networks(chunk: range, record_property: Callable[[str, object], None]) -> None:
    compare_all(chunk, several, "programs of several", record_property)


def twice(seed: int) -> Program:
    """A network and the same once more, with other numbers and with the names of its indices handed round.

    What is found out about the first may be used for the second, by places and not by names.
    """
    program = single(seed)
    (first,) = program.networks
    names = list(first.indices)
    mapping = {
        old: (Index(new, first.indices[old].size),) for old, new in zip(names, names[1:] + names[:1], strict=True)
    }
    generator = np.random.default_rng(seed + 1)

    def other(tensor: Tensor) -> Tensor:
        tensor = substitute_tensor(tensor, mapping)
        if tensor.data is None:
            return tensor
        return Tensor(f"{tensor.name}b", tensor.axes, draw_numbers(generator, tensor.data.shape, first.dtype))

    terms = tuple(Term(tuple(map(other, t.tensors)), t.order) for t in first.terms)
    second = Network("again", terms, Tensor("z", substitute_tensor(first.output, mapping).axes), first.dtype)
    return Program(program.inputs, (first, second), (*program.outputs, ("out_z", "z")))


@a_fifth
def test_equal_networks_by_other_names(chunk: range, record_property: Callable[[str, object], None]) -> None:
    compare_all(chunk, twice, "pairs", record_property)


@a_fifth
def test_two_dynamic_dimensions(chunk: range, record_property: Callable[[str, object], None]) -> None:
    def draw(seed: int) -> Program:
        return (single if seed % 2 else several)(seed, symbols=("batch", "seq"))

    compare_all(chunk, draw, "of two dynamic dimensions", record_property)


@a_fifth
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes(chunk: range, dtype: str, record_property: Callable[[str, object], None]) -> None:
    compare_all(chunk, lambda seed: single(seed, dtype), dtype, record_property)


# ------------------------------------------------------------------------------------ the test itself


def test_the_draws_cover_what_they_should() -> None:
    """Each kind of network that is promised is among the first 200."""
    programs = [single(seed) for seed in range(200)]
    terms = [p.networks[0].terms[0] for p in programs]
    assert {len(t.tensors) for t in terms} == set(range(1, 9))
    assert {len(t.operands) for t in terms} == {1, 2, 3}
    assert sum(any(v.shape and any(isinstance(d, str) for d in v.shape) for v in p.inputs) for p in programs) > 60
    assert sum(any(len({*x.indices}) < len(x.indices) for x in t.tensors) for t in terms) > 20  # diagonals
    assert sum(any(i.size == 1 for i in t.indices.values()) for t in terms) > 60
    assert sum(any(len(axis) > 1 for x in t.tensors for axis in x.axes) for t in terms) > 100
    assert sum(any(sum(i in x.indices for x in t.tensors) > 2 for i in t.indices.values()) for t in terms) > 40
    assert sum(len({len(x.indices) for x in t.tensors}) > 1 for t in terms) > 100
    chains = [several(seed) for seed in range(40)]
    assert sum(len(p.outputs) > 1 for p in chains) > 5
    assert sum(len({x.name for x in n.operands}) < len(n.operands) for p in chains for n in p.networks) > 3
    sums = [summed(seed).networks[0] for seed in range(40)]
    assert sum(any(t.is_constant for t in n.terms) for n in sums) > 3
    assert sum(any({i.name for i in n.output.indices} - {*t.indices} for t in n.terms) for n in sums) > 10


def test_the_reference_sees_a_wrong_number() -> None:
    """The comparison is worth something: one element off by a thousandth fails it."""
    program = single(5)
    feeds = feeds_for(program, RUNS[1])
    expected = reference(program, feeds, RUNS[1])["y"]
    magnitude = reference(program, feeds, RUNS[1], absolute=True)["y"]
    found: Array = expected.astype(np.float32)
    assert_exact(found, expected, magnitude, "float32", roundings=1)
    found.reshape(-1)[0] += np.float32(1e-3) * magnitude.reshape(-1)[0]
    with pytest.raises(AssertionError, match=r"1 of \d+ numbers are wrong"):
        assert_exact(found, expected, magnitude, "float32", roundings=64)
