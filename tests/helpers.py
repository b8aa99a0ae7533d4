"""What the tests of passes, of emitted files and of whole models share."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import torch

from tncompile.emit.program import to_onnx
from tncompile.frontend.importer import TracedModel
from tncompile.ir import Array, Index, Network, Opaque, Program, Ref, Switch, dims, verify
from tncompile.ir import evaluate as evaluate_network
from tncompile.ir import text as ir_text
from tncompile.ir.opaque import Arg, Value
from tncompile.passes import DEFAULT, Change, Context, Layout, Order, Pass, PassReport, Pipeline

SYMBOLS: Mapping[str, int] = {"batch": 3, "seq": 5}
"""Sizes that programs are evaluated at where a test does not say otherwise: primes, so that none divides another."""

ROUNDING = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""The largest relative error of one rounding."""


# ------------------------------------------------------------------------------------ programs


def program_of(text: str, **fill: float | Array) -> Program:
    """A program from its text; cores and weights are random, but for those whose numbers `fill` gives."""
    generator = np.random.default_rng(7)
    arrays: dict[str, Array] = {}
    for name, array in ir_text.parse(text).arrays.items():
        if name in fill:
            arrays[name] = np.broadcast_to(np.asarray(fill[name], array.dtype), array.shape).copy()
        elif array.dtype.kind in "iu":
            arrays[name] = generator.integers(0, 3, array.shape).astype(array.dtype)
        else:
            arrays[name] = generator.standard_normal(array.shape).astype(array.dtype)
    return ir_text.parse(text, arrays)


def feeds_for(program: Program, symbols: Mapping[str, int] = SYMBOLS, seed: int = 0) -> dict[str, Array]:
    """Random inputs for given sizes of the symbols; ids below 12."""
    generator = np.random.default_rng(seed)

    def random(value: Value) -> Array:
        shape = [dims.evaluate(d, symbols) for d in value.shape or ()]
        ids = np.dtype(value.dtype).kind in "iu"
        return np.asarray(generator.integers(0, 12, shape) if ids else generator.standard_normal(shape), value.dtype)

    return {value.name: random(value) for value in program.inputs}


def evaluate_program(
    program: Program, feeds: Mapping[str, Array], symbols: Mapping[str, int] = SYMBOLS
) -> dict[str, Array]:
    """All outputs in float64: networks by `tncompile.ir.evaluate`, opaque nodes by torch.

    Of a switch, the case that serves these sizes.
    """
    values: ChainMap[str, Array] = ChainMap({}, dict(feeds), dict(program.weights))
    for node in program.nodes:
        if isinstance(node, Opaque):
            values[node.output.name] = _run_opaque(node, values)
        else:
            values[node.output.name] = evaluate_network(_serving(node, symbols), values, symbols)
    return {public: np.asarray(values[name], np.float64) for public, name in program.outputs}


def _serving(node: Network | Switch, symbols: Mapping[str, int]) -> Network:
    return node.case(symbols[node.symbol]) if isinstance(node, Switch) else node


def each_case(program: Program) -> list[Program]:
    """The programs without switches that a program stands for: the first cases of all, the second, and so on."""
    most = max((len(n.cases) for n in program.nodes if isinstance(n, Switch)), default=1)
    return [
        replace(
            program,
            nodes=tuple(n.cases[min(k, len(n.cases) - 1)] if isinstance(n, Switch) else n for n in program.nodes),
        )
        for k in range(most)
    ]


def _run_opaque(node: Opaque, values: Mapping[str, Array]) -> Array:
    namespace, packet, overload = node.target.split(".")
    operation = getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    def value(arg: Arg) -> Any:
        if isinstance(arg, tuple):
            return [value(item) for item in arg]
        if not isinstance(arg, Ref):
            return arg
        array = np.asarray(values[arg.name])
        return torch.from_numpy(array if array.dtype.kind in "iu" else np.float64(array))

    return np.asarray(operation(*map(value, node.args), **dict(node.kwargs)))


# ------------------------------------------------------------------------------------ passes


def apply_pass(
    step: Pass,
    program: Program,
    *,
    tolerance: float,
    context: Context | None = None,
    symbols: Mapping[str, int] = SYMBOLS,
) -> tuple[Program, tuple[Change, ...]]:
    """Run one pass and check what every pass owes.

    The result verifies, has the same inputs and outputs, and computes the same numbers in float64, to within
    `tolerance` of the largest one and whichever case of its switches runs; the program that went in is as it was.
    """
    verify(program)
    text = ir_text.dump(program)
    arrays = {name: array.copy() for name, array in program.arrays.items()}
    after, changes = step.run(program, context or Context())
    verify(after, "scheduled" if isinstance(step, Order | Layout) else "traced")
    assert ir_text.dump(program) == text, f"{step.name()} changed the program it was given"
    for name, array in program.arrays.items():
        np.testing.assert_array_equal(array, arrays[name], f"{step.name()} wrote to {name}")
    assert after.inputs == program.inputs
    assert [name for name, _ in after.outputs] == [name for name, _ in program.outputs]
    for (_, old), (_, new) in zip(program.outputs, after.outputs, strict=True):
        was, now = program.values[old], after.values[new]
        assert (was.dtype, was.shape) == (now.dtype, now.shape)
    for seed in (0, 1):
        feeds = feeds_for(program, symbols, seed)
        expected = evaluate_program(program, feeds, symbols)
        for number, case in enumerate(each_case(after)):
            found = evaluate_program(case, feeds, symbols)
            ready = isinstance(step, Order | Layout) and not _opaque(case)
            scheduled = reference(case, feeds, symbols) if ready else {}
            for name, value in after.outputs:
                what = f"{step.name()}, case {number}: output {name}"
                assert_close(found[name], expected[name], tolerance=tolerance, what=what)
                if scheduled:
                    assert_close(scheduled[value], expected[name], tolerance=tolerance, what=f"{what} by its schedule")
    return after, tuple(changes)


def _opaque(program: Program) -> list[Opaque]:
    return [node for node in program.nodes if isinstance(node, Opaque)]


def assert_close(found: Array, expected: Array, *, tolerance: float, what: str = "result") -> None:
    """Same shape, and every difference within `tolerance` of the largest number expected."""
    assert found.shape == expected.shape, f"{what} has shape {found.shape}, not {expected.shape}"
    found, expected = np.float64(found), np.float64(expected)
    assert np.isfinite(found).all(), f"{what} is not finite"
    scale = np.abs(expected).max(initial=0.0)
    error = np.abs(found - expected).max(initial=0.0)
    assert error <= tolerance * scale, f"{what} is off by {error:.3g} of {scale:.3g}, allowed {tolerance:.3g} of it"


def reasons(changes: Sequence[Change], declined: bool = False) -> list[str]:
    """The changes (or the refusals) of a pass, one line each."""
    return [f"{c.network}: {c.what} ({c.why})" for c in changes if c.declined == declined]


# ------------------------------------------------------------------------------------ compilation


@dataclass(frozen=True)
class Compiled:
    """A program brought to ONNX."""

    program: Program
    reports: tuple[PassReport, ...]
    model: onnx.ModelProto
    session: ort.InferenceSession

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name."""
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, dict(feeds)), strict=True))


def compile_program(program: Program, context: Context | None = None, passes: Sequence[Pass] = DEFAULT) -> Compiled:
    """The pipeline, the emitter, onnx.checker and ONNX Runtime on a program of networks alone."""
    scheduled, reports = Pipeline(passes).run(program, context or Context(batches=(1, 7)))
    model = onnx_ir.to_proto(to_onnx(scheduled, TracedModel(None, program, {})))  # type: ignore[arg-type]
    onnx.checker.check_model(model, full_check=True)
    assert_plain(model)
    half = any(v.dtype == "float16" for v in program.inputs)
    return Compiled(scheduled, reports, model, session_of(model.SerializeToString(), layouts=not half))


def session_of(data: bytes, layouts: bool = True) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU that says nothing about the machine it is on.

    Without `layouts`, its layout optimizations are off: on some float16 models they end the process (seen with
    1.31: a Transpose, a Reshape to three axes and a MatMul by a constant).
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not layouts:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def assert_plain(model: onnx.ModelProto | bytes) -> None:
    """Only operators that stock onnxruntime has, no Einsum, no functions, no external data."""
    if isinstance(model, bytes):
        model = onnx.load_model_from_string(model)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} <= {"", "com.microsoft"}  # what every onnxruntime brings
    assert not model.functions
    for node in nodes_of(model.graph):
        assert node.domain in ("", "com.microsoft"), f"{node.op_type} of the domain {node.domain}"
        assert node.op_type != "Einsum"
    for tensor in model.graph.initializer:
        assert tensor.data_location != onnx.TensorProto.EXTERNAL


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from nodes_of(inner)


def operators(model: onnx.ModelProto | bytes) -> list[str]:
    """The operators of a model, sorted."""
    if isinstance(model, bytes):
        model = onnx.load_model_from_string(model)
    return sorted(node.op_type for node in nodes_of(model.graph))


# ------------------------------------------------------------------------------------ the reference


def reference(
    program: Program, feeds: Mapping[str, Array], symbols: Mapping[str, int], absolute: bool = False
) -> dict[str, Array]:
    """Every value of a program of networks alone, by `numpy.einsum` in float64.

    Nothing of tncompile computes here but sizes. A term is one einsum, or one for each of its steps where it is
    scheduled; of a switch, the case that serves these sizes is taken. With `absolute`, all numbers are taken by
    magnitude: what rounding errors grow with.
    """
    values: dict[str, Array] = {name: _plain(array, absolute) for name, array in feeds.items()}
    for node in program.nodes:
        assert not isinstance(node, Opaque)
        values[node.output.name] = _einsum(_serving(node, symbols), values, symbols, absolute)
    return values


def _plain(array: Array, absolute: bool) -> Array:
    return np.abs(np.float64(array)) if absolute else np.asarray(array, np.float64)


def _einsum(network: Network, values: Mapping[str, Array], symbols: Mapping[str, int], absolute: bool) -> Array:
    output = network.output.indices

    def size(index: Index) -> int:
        return dims.evaluate(index.size, symbols)

    total = np.zeros([size(i) for i in output])
    for term in network.terms:
        number: dict[str, int] = {}
        parts: list[tuple[Array, list[int]]] = []
        for tensor in term.tensors:
            array = values[tensor.name] if tensor.data is None else _plain(tensor.data, absolute)
            names = [number.setdefault(i.name, len(number)) for i in tensor.indices]
            parts.append((array.reshape([size(i) for i in tensor.indices]), names))
        for step in term.steps or ():
            order = [number[name] for name in step.order]
            parts.append((np.einsum(*parts[step.left], *parts[step.right], order), order))  # type: ignore[call-overload]
        used = parts[-1:] if term.steps else parts
        carried = [i for i in output if i.name in number]
        args = [item for part in used for item in part]
        result = np.einsum(*args, [number[i.name] for i in carried], optimize="greedy")  # type: ignore[call-overload]
        total = total + np.reshape(result, [size(i) if i.name in number else 1 for i in output])
    return total.reshape([math.prod(size(i) for i in axis) for axis in network.output.axes])


def assert_exact(
    found: Array, expected: Array, magnitude: Array, dtype: str, *, roundings: float, what: str = "result"
) -> None:
    """Every element within so many roundings of the sum of magnitudes it came from."""
    assert found.shape == expected.shape, f"{what} has shape {found.shape}, not {expected.shape}"
    assert str(found.dtype) == dtype, f"{what} is {found.dtype}, not {dtype}"
    bound = roundings * ROUNDING[dtype] * magnitude
    error = np.abs(np.float64(found) - expected)
    bad = ~(error <= bound)  # a NaN is bad
    if bad.any():
        worst = np.max(error[bad] / np.maximum(ROUNDING[dtype] * magnitude[bad], 1e-300))
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} numbers are wrong, by up to {np.max(error[bad]):.3g} "
            f"or {worst:.3g} roundings; {roundings} are allowed"
        )
