"""Measured times of one small ONNX model computed in several ways: what a search chooses by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tncompile import __version__
from tncompile.cost.devices import machine
from tncompile.ir import Array
from tncompile.runtime.quantize import STORED, quantizable, quantize
from tncompile.runtime.quantized_graph import read, subgraphs
from tncompile.runtime.quantized_round import check_bits
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race
from tncompile.runtime.tuner import TimeStore

if TYPE_CHECKING:
    from onnx import GraphProto

_SMALL = 16
"""Numbers of a constant that counts by its content: a shape, not a weight."""


def seconds(
    model: bytes,
    ways: Sequence[str],
    feeds: Mapping[str, Array],
    *,
    budget_s: float = 1.0,
    threads: int = 0,
    stored: bool = True,
) -> dict[str, float]:
    """Seconds a call of a model with all that can be in each of some ways of `BITS`, taking turns; inf where none can.

    Ways that differ from ``fp32`` in the file alone take its time. `feeds` are inputs by name, and calibration data for
    ``int8-static``. What was timed once is remembered for this user, unless not `stored`: by what is computed (names
    and weights do not count), the shapes of the inputs, the number of threads, machine and versions. TNCompileError for
    unknown bits, LoadError where the model cannot be read.
    """
    for way in ways:
        check_bits(way)
    known = quantizable(model)
    possible = [way for way in ways if way == "fp32" or any(way in can for can in known.values())]
    timed = [*dict.fromkeys("fp32" if way in STORED else way for way in possible)]
    what = f"{machine('cpu')}; tncompile {__version__}; threads {threads}; {_canonical(model, feeds)}"
    keys = {way: hashlib.sha256(f"{what}; {way}".encode()).hexdigest()[:32] for way in timed}
    store = TimeStore() if stored else None
    times = store.get([*keys.values()]) if store else None
    if times is not None:
        found = dict(zip(timed, times, strict=True))
    else:
        choices = {way: {key: way for key, can in known.items() if way in can} for way in timed}
        models = {way: quantize(model, choice, [feeds]) for way, choice in choices.items()}
        found = _race(models, feeds, budget_s, threads)
        if store:
            store.put({keys[way]: time for way, time in found.items()})
    return {way: found.get("fp32" if way in STORED else way, math.inf) if way in possible else math.inf for way in ways}


def _race(models: Mapping[str, bytes], feeds: Mapping[str, Array], budget_s: float, threads: int) -> dict[str, float]:
    """Seconds a call of models, run in turns, without those that cannot run."""
    entrants = {}
    for way, model in models.items():
        try:
            call = Session(model, threads=threads).bound(feeds)
            call()
        except Exception:  # ONNX Runtime's own have no common base; what cannot run is no candidate
            continue
        entrants[way] = call
    done = race(entrants, rounds=60, budget_s=budget_s)
    return {way: done.median(way) / 1e3 for way in entrants}


def _canonical(model: bytes, feeds: Mapping[str, Array]) -> object:
    """What a model computes, whatever its values are called and its weights are."""
    graph = read(model).graph
    inputs = [(str(feeds[i.name].dtype), feeds[i.name].shape) for i in graph.input]
    return inputs, _of_graph(graph, {})


def _of_graph(graph: GraphProto, numbers: dict[str, int]) -> object:
    import onnx

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    constants = []
    for tensor in graph.initializer:
        content = onnx.numpy_helper.to_array(tensor).tolist() if math.prod(tensor.dims) <= _SMALL else None
        constants.append((number(tensor.name), tensor.data_type, [*tensor.dims], content))
    nodes = []
    for node in graph.node:
        attributes = [
            (a.name, onnx.helper.get_attribute_value(a)) for a in node.attribute if not (a.HasField("g") or a.graphs)
        ]
        values = [[number(name) for name in part] for part in (node.input, node.output)]
        nodes.append(
            (node.op_type, values, sorted(map(repr, attributes)), [_of_graph(g, numbers) for g in subgraphs(node)])
        )
    return [number(i.name) for i in graph.input], constants, nodes, [number(o.name) for o in graph.output]
