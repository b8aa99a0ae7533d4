"""A plan made real: the model with cores in the place of weights, its compiled file, and that file in fewer bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tncompile.compiler import CompiledModel, compile_exported
from tncompile.frontend.factors import substitute
from tncompile.frontend.model import LoadedModel
from tncompile.ir import Array, Opaque, Program, networks_of
from tncompile.runtime.quantize import BITS, quantizable, quantize
from tncompile.tensorizer.search import Option, Plan
from tncompile.tensorizer.sites import Replacement


@dataclass(frozen=True)
class Realized:
    """The model with its replacements, and the ONNX file that it compiles to."""

    student: LoadedModel = field(repr=False)
    compiled: CompiledModel = field(repr=False)
    data: bytes = field(repr=False)
    notes: tuple[str, ...] = ()


def replacements(plan: Plan) -> list[Replacement]:
    """The sites of a plan that become cores."""
    return [option.replacement for option in plan.options if option.replacement is not None]


def substituted(model: LoadedModel, made: Sequence[Replacement]) -> LoadedModel:
    """The model with cores in the place of weights."""
    return substitute(model, [factors for one in made for factors in one.factors()]) if made else model


def realize(
    student: LoadedModel,
    plan: Plan,
    calibration: Sequence[Mapping[str, Array]],
    compiling: Mapping[str, Any],
    allowed: Collection[str] = BITS,
) -> Realized:
    """Compile a model with its replacements, and quantize what the plan wants in fewer bits.

    `compiling` are options of `compile_exported`; the result is checked against `student`.
    """
    fewer = any(option.bits != "fp32" for option in plan.options)
    compiled = compile_exported(student, **{**compiling, **({"store": "folded"} if fewer else {})})
    if not fewer:
        return Realized(student, compiled, compiled.onnx)
    data = compiled.onnx
    choice, notes = _choice(plan.options, compiled.program, quantizable(data))
    return Realized(student, compiled, quantize(data, choice, calibration), notes)


def _choice(
    options: Sequence[Option], program: Program, possible: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Bits by the value whose nodes they are for; of several weights in one network the most exact ones."""
    wanted = {part.name: option.bits for option in options for part in option.site.parts}
    read = _weights_read(program)
    choice: dict[str, str] = {}
    notes: list[str] = []
    for key, can in possible.items():
        bits = [b for name in read.get(key, ()) for weight, b in wanted.items() if _is_of(name, weight)]
        if not bits:
            continue
        exact = min(bits, key=BITS.index)
        if exact not in can:
            nearest = [b for b in BITS[: BITS.index(exact)] if b in can]
            notes.append(f"{key} is kept in {nearest[-1]}: ONNX Runtime has no {exact} for it")
            exact = nearest[-1]
        choice[key] = exact
    return choice, tuple(notes)


def _weights_read(program: Program) -> dict[str, tuple[str, ...]]:
    """For the value of each node, the names of the weights and cores that it reads."""
    found = {}
    for node in program.nodes:
        if isinstance(node, Opaque):
            found[node.output.name] = tuple(n for n in node.inputs if n in program.weights)
        else:
            cores = (core for network in networks_of(node) for core in network.cores)
            found[node.value.name] = tuple(dict.fromkeys(core.name for core in cores))
    return found


def _is_of(core: str, weight: str) -> bool:
    """Whether a core is a weight, one of the cores that it became, or was made from one of these: ``a*b.core_0``."""
    return any(part == weight or part.startswith(f"{weight}.") for part in core.split("*"))
