"""What a plan wants of weights, as what the networks of a compiled file, which may hold several of them, are to be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tncompile.ir import Opaque, Program, networks_of
from tncompile.ir.core import sources_of
from tncompile.runtime.quantize import BITS, Reader, readers
from tncompile.runtime.quantized_sites import STORED_LEAST
from tncompile.tensorizer.search import Option


@dataclass(frozen=True)
class Rounding:
    """Bits by key, for `quantize`; the bits that each weight of the plan is in then; and why that is not as wanted."""

    choice: Mapping[str, str]
    written: Mapping[str, str]
    notes: tuple[str, ...]


MOST = 2 / 3
"""Of the numbers in a network's weights so many must be in the bits that it gets; the others stay float32."""


def rounding(options: Iterable[Option], program: Program, data: bytes, allowed: Collection[str] = BITS) -> Rounding:
    """The bits for each network of a compiled program's file: the most exact ones that a plan wants of its weights, but
    of those too small to be rounded.

    Where ONNX Runtime cannot compute most of it so, or that is not among those `allowed`, the next more exact ones that
    can be; ``fp32`` always can. A weight that several networks read is in the most exact bits of any of them.
    """
    options = tuple(options)
    wanted = {part.name: option.bits for option in options for part in option.site.parts}
    largest = {part.name: _largest(option) for option in options for part in option.site.parts}
    nodes = readers(data)
    choice: dict[str, str] = {}
    written: dict[str, str] = {}
    causes: dict[str, str] = {}
    for key, weights in _held(options, program, nodes).items():
        first = min(weights, key=lambda name: BITS.index(wanted[name]))
        others = [name for name in weights if largest[name] >= STORED_LEAST["int8-weights"]]
        if others:
            most = min(others, key=lambda name: BITS.index(wanted[name]))
            if wanted[most] in STORED_LEAST:  # which leave the small ones as they are
                first, weights = most, tuple(others)
        ways = BITS[: BITS.index(wanted[first]) + 1]
        bits = [b for b in ways if b == "fp32" or (b in allowed and _covers(nodes[key], b))][-1]
        choice[key] = bits
        for name in weights:
            if name not in written or BITS.index(bits) < BITS.index(written[name]):
                written[name] = bits
                other = wanted[name] != wanted[first]
                causes[name] = f"{first} is in the same network" if other else f"that is not to be had for {key}"
    absent = "no network of the file reads it as a weight of its own"
    notes = [
        f"{name} is kept in {written.get(name, 'fp32')}, not {bits}: {causes.get(name, absent)}"
        for name, bits in wanted.items()
        if written.get(name, "fp32") != bits
    ]
    return Rounding(choice, {name: written.get(name, "fp32") for name in wanted}, tuple(notes))


def _largest(option: Option) -> int:
    """Numbers in the largest array that an option keeps for its weights."""
    if option.replacement is None:
        return max(part.array.size for part in option.site.parts)
    return max(core.size for core in option.replacement.factorized.cores)


def _covers(nodes: Sequence[Reader], bits: str) -> bool:
    return sum(n.numbers for n in nodes if bits in n.bits) >= MOST * sum(n.numbers for n in nodes)


def _held(
    options: Sequence[Option], program: Program, nodes: Mapping[str, Sequence[Reader]]
) -> dict[str, tuple[str, ...]]:
    """The weights of a plan in each network, and in each other node that reads any, by key.

    Networks know what their cores were made from. Of other nodes only the file knows: torch's exporter names them anew.
    """
    members = _members(options)
    networks = {
        node.value.name: sources_of(core for network in networks_of(node) for core in network.cores)
        for node in program.nodes
        if not isinstance(node, Opaque)
    }
    found = {}
    for key, reading in nodes.items():
        names = (name for node in reading for name in node.initializers)
        sources = (*networks.get(key, ()), *(source for name in names for source in program.sources(name)))
        weights = dict.fromkeys(w for s in sources for w in members.get(s, members.get(s.removesuffix(".weight"), [])))
        if weights:
            found[key] = tuple(weights)
    return found


def _members(options: Iterable[Option]) -> dict[str, list[str]]:
    """The weights that each weight and each core of a plan is, or is a part of."""
    found: dict[str, list[str]] = {}
    for option in options:
        if option.replacement is None:
            found |= {part.name: [part.name] for part in option.site.parts}
            continue
        for factors in option.replacement.factors():
            for name in (factors.weight, *(core.name for core in factors.cores)):
                found.setdefault(name, []).append(factors.weight)
    return found
