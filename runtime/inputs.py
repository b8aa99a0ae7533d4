"""Inputs to check a model with: random ones, at several sizes, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tncompile.errors import CheckError
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Array, Value, dims


def fitting(example: Mapping[str, Array], traced: ImportedModel) -> dict[str, Array]:
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


MOST = 1 << 30
"""Bytes that all values of an ONNX file may take in float64 at once: onnx's evaluator lets go of none."""


def sizes_to_check(traced: ImportedModel, batches: Sequence[int]) -> list[dict[str, int]]:
    """Sizes of all symbols for each run: the batch as given, others as in the example, then one more each time."""
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


def affordable(traced: ImportedModel, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes with the batch no larger than the reference of an ONNX file can be computed at."""
    if not isinstance(traced, OnnxModel) or "batch" not in sizes:
        return dict(sizes)
    each = _bytes(traced, {**sizes, "batch": 1})
    return {**sizes, "batch": max(1, min(sizes["batch"], MOST // each))}


def _bytes(traced: OnnxModel, sizes: Mapping[str, int]) -> int:
    """What the values of a file take in float64, those of known sizes."""
    shapes = [node.value.shape or () for node in traced.program.nodes]
    known = [shape for shape in shapes if all(dims.symbols(size) <= sizes.keys() for size in shape)]
    return max(1, sum(8 * math.prod(dims.evaluate(size, sizes) for size in shape) for shape in known))


def other_sizes(traced: ImportedModel, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to check at instead, where the model itself does not run at these; the likeliest first.

    torch.export leaves two symbols where a model works on two sizes alone that happen to be equal, and where it reads
    one tensor at the places of another: symbols of one size in the example have one size, the batch's if it is among
    them. A file's sizes are often multiples of a number that it does not tell: twice the example's, then the example's.
    """
    if isinstance(traced, OnnxModel):
        wanted = [{s: n if s == "batch" else k * traced.sizes.get(s, n) for s, n in sizes.items()} for k in (2, 1)]
    else:
        first: dict[int, str] = {}
        for symbol in sorted(sizes, key=lambda s: s != "batch"):
            first.setdefault(traced.sizes.get(symbol, 2), symbol)
        wanted = [{symbol: sizes[first[traced.sizes.get(symbol, 2)]] for symbol in sizes}]
    return [other for k, other in enumerate(wanted) if other != sizes and other not in wanted[:k]]


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
    bounds = _rows_read(traced)
    for value in traced.program.inputs:
        shape = [dims.evaluate(d, sizes) for d in value.shape or ()]
        if np.dtype(value.dtype).kind == "f":
            inputs[value.name] = np.asarray(generator.standard_normal(shape) + mean, value.dtype)
        else:
            inputs[value.name] = _random(value, shape, examples.get(value.name), generator, bounds.get(value.name, 2))
    return inputs


def _rows_read(traced: ImportedModel) -> dict[str, int]:
    """For each input of an ONNX model that rows are gathered at, how many rows there are to read."""
    found: dict[str, int] = {}
    if not isinstance(traced, OnnxModel):
        return found
    for node in traced.model.graph:
        if node.op_type != "Gather" or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        ids = node.inputs[1]
        while ids is not None and (made := ids.producer()) is not None and made.op_type == "Cast":
            ids = made.inputs[0]
        axis = node.attributes.get_int("axis", 0)
        rows = node.inputs[0].shape[axis] if axis < len(node.inputs[0].shape) else None
        if ids is not None and ids.name and isinstance(rows, int):
            found[ids.name] = min(rows, found.get(ids.name, rows))
    return found


def _random(
    value: Value, shape: Sequence[int], example: Array | None, generator: np.random.Generator, bound: int
) -> Array:
    """Numbers of the example, else below a bound, the first and the last of them among them."""
    dtype = np.dtype(value.dtype)
    if example is not None and example.size:
        return np.asarray(generator.choice(example.reshape(-1), shape), dtype)
    if dtype.kind == "b":
        return np.asarray(generator.integers(0, 2, shape), dtype)
    if dtype.kind == "u" and bound == 2:
        return np.zeros(shape, dtype)
    drawn = np.asarray(generator.integers(0, bound, shape), dtype)
    if drawn.size > 1:
        drawn.flat[0], drawn.flat[-1] = 0, bound - 1
    return drawn


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
