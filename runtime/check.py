"""Is the compiled model right? Fresh inputs through ONNX Runtime, against the traced model in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tncompile.cost.search import einsum_path
from tncompile.errors import CheckError, SourceRef, TNCompileError
from tncompile.frontend.importer import TracedModel, source_of
from tncompile.frontend.mapped import release_pages
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.frontend.pairs import is_complex
from tncompile.ir import Array, Value, dims
from tncompile.runtime.reference import OnnxReference
from tncompile.runtime.session import Session

FACTOR = 10.0
"""How many times the error of eager PyTorch the compiled model's error may be."""

_FLOORS = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3}
"""Relative errors below which the comparison with eager says nothing: a few roundings of the dtype."""


@dataclass(frozen=True)
class OutputCheck:
    """Errors of one output, as max |y - y64| / max |y64| over all runs; `eager` is PyTorch's own.

    `baseline` says whose that is: of a model that came in as ONNX it is the original file's.
    """

    name: str
    error: float
    eager: float
    bound: float
    baseline: str = "eager PyTorch's"

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.error:.2g}, {self.baseline} {self.eager:.2g}, allowed {self.bound:.2g}"
        )

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound (never where it is not a number)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class CheckReport:
    """The outputs' checks, the sizes they were run at, and what limits what that proves."""

    outputs: tuple[OutputCheck, ...]
    runs: tuple[str, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(o.passed for o in self.outputs)

    def __str__(self) -> str:
        return "; ".join(
            f"{o.name}: error {o.error:.2g} ({o.baseline} {o.eager:.2g}, allowed {o.bound:.2g})" for o in self.outputs
        )


def check(
    session: Session,
    traced: ImportedModel,
    batches: Sequence[int] = (1, 3),
    examples: Sequence[Mapping[str, Array]] = (),
    seed: int = 0,
) -> CheckReport:
    """Compare a session with the float64 evaluation of the model as it came in.

    Runs `examples` (arrays by input name) where given, else random inputs at each of `batches` for a model
    with a dynamic batch. Other dynamic dimensions take the example's size, then one more. A lean session is closed
    before the reference runs, so that the weights are not in memory twice.
    """
    program = traced.program
    expected = {v.name for v in program.inputs}
    if {*session.inputs} != expected or session.outputs != _public(session, traced):
        raise CheckError(
            f"the compiled model has inputs {', '.join(sorted(session.inputs))} and outputs "
            f"{', '.join(session.outputs)}; the model has {', '.join(sorted(expected))} and "
            f"{', '.join(name for name, _ in program.outputs)}"
        )
    runs: list[tuple[str, Mapping[str, Array]]] = []
    if examples:
        runs = [(f"example {k}", _fitting(example, traced)) for k, example in enumerate(examples)]
    else:
        generator = np.random.default_rng(seed)
        for number, sizes in enumerate(_size_sets(traced, batches)):
            label = ", ".join(f"{k}={v}" for k, v in sizes.items()) or f"fixed shapes, {number}"
            # every second run away from zero, where sums and means do not cancel
            runs.append((label, random_inputs(traced, sizes, generator, mean=number % 2)))
    answers: list[Mapping[str, Array] | Exception] = []
    for _, feeds in runs:
        try:
            answers.append(session.run(feeds))
        except Exception as error:  # whatever ONNX Runtime raises; the original may not run there either
            answers.append(error)
    if session.lean:
        session.close()
    errors: dict[str, list[tuple[float, float, str]]] = {}
    original = OnnxReference(traced) if isinstance(traced, OnnxModel) else _Torch(traced)
    failed: dict[str, TNCompileError] = {}
    for (label, feeds), outputs in zip(runs, answers, strict=True):
        try:
            reference, eager = original.run(feeds)
        except TNCompileError as error:
            if examples or not isinstance(original, OnnxReference):
                raise
            failed[label] = error  # a file may claim sizes that it does not take
            continue
        if isinstance(outputs, Exception):
            raise CheckError(f"ONNX Runtime fails at {label}: {str(outputs).splitlines()[0]}") from outputs
        if not errors:
            _refuse_random(original, feeds, eager)
        if examples and not any(np.any(np.isfinite(wide) & (wide != 0)) for wide in reference):
            raise CheckError(f"{label} proves nothing: the model's outputs on it are all 0 or not finite")
        for (name, result), wide, plain in zip(outputs.items(), reference, eager, strict=True):
            if result.shape != wide.shape:
                raise CheckError(f"output {name} has shape {result.shape} at {label}, the model's has {wide.shape}")
            dtype = str(plain.dtype)
            errors.setdefault(name, []).append((relative_error(result, wide), relative_error(plain, wide), dtype))
    if len(failed) == len(runs):
        raise next(iter(failed.values()))
    checks = []
    for name, found in errors.items():
        worst, eager_error = max(e for e, _, _ in found), max(e for _, e, _ in found)
        if any(math.isnan(e) for e, _, _ in found):
            worst = math.nan
        floor = original.slack * _FLOORS.get(found[0][2], 0.0)
        bound = max(floor, FACTOR * eager_error)  # this order: eager's may be no number
        checks.append(OutputCheck(name, worst, eager_error, bound, original.baseline))
    notes = [original.note] * bool(original.note) + [f"the original cannot run at {label}" for label in failed]
    return CheckReport(tuple(checks), tuple(label for label, _ in runs if label not in failed), "; ".join(notes))


def _public(session: Session, traced: ImportedModel) -> list[str]:
    """The outputs' public names; one that an input of a PyTorch model has too carries a suffix in the file."""
    inputs = set() if isinstance(traced, OnnxModel) else {*session.inputs}
    return [f"{name}_out" if name in inputs else name for name, _ in traced.program.outputs]


def relative_error(result: Array, reference: Array) -> float:
    """max |result - reference| / max |reference|; values that are not finite must be the same. NaN if not."""
    if result.size == 0:
        return 0.0
    a, b = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.all(np.isfinite(a[finite])):
        return math.nan
    scale = float(np.max(np.abs(b[finite]), initial=0.0))
    distance = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return distance if scale == 0 else distance / scale


# ------------------------------------------------------------------------------------ inputs


def _refuse_random(original: OnnxReference | _Torch, feeds: Mapping[str, Array], outputs: Sequence[Array]) -> None:
    """Refuse a model whose numbers differ from run to run. (Attention with dropout 0 may be random, and is not.)"""
    draws, source = original.draws()
    if not draws:
        return
    _, again = original.run(feeds)
    if all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(outputs, again, strict=True)):
        return
    raise CheckError(
        f"the model draws random numbers ({draws}), so its numbers cannot be checked; "
        "export it in inference mode (model.eval()), or compile with --no-check",
        source,
    )


def _fitting(example: Mapping[str, Array], traced: ImportedModel) -> dict[str, Array]:
    """An example in the inputs' dtypes. CheckError where it does not fit the model."""
    inputs = {v.name: v for v in traced.program.inputs}
    if {*example} != {*inputs}:
        raise CheckError(f"the example has {', '.join(example) or 'no arrays'}; the inputs are {', '.join(inputs)}")
    fitting = {}
    for name, value in inputs.items():
        array, shape = np.asarray(example[name]), value.shape or ()
        fixed = [(a, d) for a, d in zip(array.shape, shape, strict=False) if isinstance(d, int)]
        if array.ndim != len(shape) or any(a != d for a, d in fixed):
            wanted = " ".join(map(str, shape))
            raise CheckError(f"the example's {name} has shape {array.shape}; the input's is [{wanted}]")
        if array.dtype.kind != np.dtype(value.dtype).kind:
            raise CheckError(f"the example's {name} is {array.dtype}; the input is {value.dtype}")
        fitting[name] = array.astype(value.dtype)
    return fitting


def _size_sets(traced: ImportedModel, batches: Sequence[int]) -> list[dict[str, int]]:
    symbols = {s for v in traced.program.inputs for d in v.shape or () for s in dims.symbols(d)}
    if not symbols:
        return [{}, {}]
    ranges = _ranges(traced)
    sets = []
    for number, batch in enumerate(batches):
        sizes = {}
        for symbol in sorted(symbols):
            low, high = ranges.get(symbol, (1, 1 << 30))
            wanted = batch if symbol == "batch" else traced.sizes.get(symbol, 2) + number
            # torch's lower bound of 2 says only that 1 was not traced; 1 is fine where sizes do not branch
            sizes[symbol] = min(max(wanted, 1 if low == 2 and symbol == "batch" else low), high)
        sets.append(sizes)
    return sets


def _ranges(traced: ImportedModel) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    if isinstance(traced, OnnxModel):
        return found
    for symbol, bounds in traced.exported.range_constraints.items():
        low, high = (
            int(b) if getattr(b, "is_finite", True) and abs(b) < 1 << 30 else 1 << 30
            for b in (bounds.lower, bounds.upper)
        )
        found[traced.symbols.get(str(symbol), str(symbol))] = (low, high)
    return found


def random_inputs(
    traced: ImportedModel, sizes: Mapping[str, int], generator: np.random.Generator, mean: float = 0.0
) -> dict[str, Array]:
    """Normal numbers for floating inputs; for others, values drawn from those of the example input."""
    examples = example_inputs(traced)
    inputs = {}
    for value in traced.program.inputs:
        shape = [dims.evaluate(d, sizes) for d in value.shape or ()]
        if np.dtype(value.dtype).kind == "f":
            inputs[value.name] = np.asarray(generator.standard_normal(shape) + mean, value.dtype)
        else:
            inputs[value.name] = _random(value, shape, examples.get(value.name), generator)
    return inputs


def _random(value: Value, shape: Sequence[int], example: Array | None, generator: np.random.Generator) -> Array:
    dtype = np.dtype(value.dtype)
    if example is not None and example.size:
        return np.asarray(generator.choice(example.reshape(-1), shape), dtype)
    if dtype.kind == "b":
        return np.asarray(generator.integers(0, 2, shape), dtype)
    return np.zeros(shape, dtype) if dtype.kind == "u" else np.asarray(generator.integers(0, 2, shape), dtype)


def example_inputs(traced: ImportedModel) -> dict[str, Array]:
    """The example inputs that the exported program carries, by name; empty where it has none."""
    if isinstance(traced, OnnxModel):
        return {}
    examples = traced.exported.example_inputs
    if examples is None:
        return {}
    flat = torch.utils._pytree.tree_leaves(examples)
    names = [s.arg.name for s in traced.exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    if len(flat) != len(names):
        return {}
    return {n: t.detach().numpy() for n, t in zip(names, flat, strict=True) if isinstance(t, torch.Tensor)}


# --------------------------------------------------------------------------------- references


def run_traced(traced: TracedModel, feeds: Mapping[str, Array], dtype: torch.dtype | None) -> list[Array]:
    """The traced graph's outputs, computed by torch; with a dtype, in that floating dtype throughout.

    The graph is the one that torch.export gave, before any of our passes: an independent reference.
    """
    exported = traced.reference
    complex_inputs = {n.name for n in exported.graph.nodes if n.op == "placeholder" and is_complex(n)}
    interpreter = _Reference(exported.graph_module, dtype)
    args: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            given = torch.from_numpy(np.array(feeds[spec.arg.name])) if spec.arg.name in feeds else None
            args.append(given if given is None or spec.arg.name not in complex_inputs else torch.view_as_complex(given))
        else:
            store = exported.state_dict if spec.target in exported.state_dict else exported.constants
            args.append(store[spec.target].detach())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outputs = interpreter.run(*args)
        except Exception as error:
            raise CheckError(
                f"the traced model itself cannot run on these inputs: {str(error).splitlines()[0]}; "
                "give some that it can with --example inputs.npz"
            ) from error
    return [_shown(output) for output in outputs if output is not None]


def _shown(output: Any) -> Array:
    if not isinstance(output, torch.Tensor):
        return np.asarray(output)
    real = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    return real.detach().numpy()


_LARGE = 1 << 24  # bytes of a node's tensors
_aten = torch.ops.aten
_MOVES = {
    *(_aten.embedding.default, _aten.index_select.default, _aten.gather.default, _aten.slice.Tensor),
    *(_aten.select.int, _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default),
    *(_aten.squeeze.dim, _aten.expand.default, _aten.detach.default, _aten.alias.default),
}
"""What moves numbers and computes none: the same in any dtype, and a large table is not widened for a few rows."""


class _Torch:
    """A traced model as the reference, in float64 and in its own dtype."""

    baseline = "eager PyTorch's"
    slack = 1.0
    note = ""

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced

    def run(self, feeds: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
        """The outputs in float64, and in the model's own dtype."""
        return run_traced(self.traced, feeds, torch.float64), run_traced(self.traced, feeds, None)

    def draws(self) -> tuple[str, SourceRef]:
        """The first operation that may draw random numbers, and where it stands; empty where there is none."""
        nodes = [n for n in self.traced.exported.graph_module.graph.nodes if n.op == "call_function"]
        seeded = [n for n in nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
        return (str(seeded[0].target), source_of(seeded[0])) if seeded else ("", SourceRef())


class _Reference(torch.fx.Interpreter):
    """Runs a graph with every floating tensor, and every floating dtype it names, widened.

    A weight is widened where it is used and for as long; what only moves its numbers comes before that.
    """

    def __init__(self, module: torch.fx.GraphModule, dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self.dtype = dtype

    def cast(self, value: Any) -> Any:
        """A floating tensor or dtype, widened; anything else as it is."""
        if self.dtype is not None and isinstance(value, torch.Tensor) and value.is_complex():
            return value.to(self.dtype.to_complex())
        if self.dtype is not None and isinstance(value, torch.dtype) and value.is_complex:
            return self.dtype.to_complex()
        if self.dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        if self.dtype is not None and isinstance(value, torch.dtype) and value.is_floating_point:
            return self.dtype
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "_assert_tensor_metadata" in str(target):
            return None
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if target in _MOVES:
            return super().call_function(target, args, kwargs)
        args, kwargs = torch.utils._pytree.tree_map(self.cast, (args, kwargs))
        if target is torch.ops.aten.einsum.default and not kwargs:
            # left to right, as torch runs it without a path, some networks need hundreds of gigabytes
            kwargs = {"path": einsum_path(args[0], [tuple(x.shape) for x in args[1]])}
        if target is torch.ops.aten.view.default:  # another path leaves other strides
            target = torch.ops.aten.reshape.default
        # constants made inside the graph (full, arange) take torch's default dtype
        result = torch.utils._pytree.tree_map(self.cast, super().call_function(target, args, kwargs))
        if sum(t.nbytes for t in tensors) > _LARGE:
            release_pages()
        return result

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map(self.cast, super().output(target, args, kwargs))
