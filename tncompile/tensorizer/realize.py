"""A plan made real: the model with cores in the place of weights, its compiled file, and that file in fewer bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tncompile.compiler import CompiledModel, compile_exported
from tncompile.frontend.factors import substitute
from tncompile.frontend.model import LoadedModel
from tncompile.ir import Array
from tncompile.runtime.quantize import BITS, quantize
from tncompile.tensorizer.rounding import rounding
from tncompile.tensorizer.search import Plan
from tncompile.tensorizer.sites import Replacement


@dataclass(frozen=True)
class Realized:
    """The model with its replacements, and the ONNX file that it compiles to.

    `written` has for each weight of the plan the bits that the file has it in.
    """

    student: LoadedModel = field(repr=False)
    compiled: CompiledModel = field(repr=False)
    data: bytes = field(repr=False)
    notes: tuple[str, ...] = ()
    written: Mapping[str, str] = field(default_factory=dict)


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

    `compiling` are options of `compile_exported`; the result is checked against `student`. Where weights cannot be in
    the bits that the plan wants, they are in more exact ones among those `allowed`, which the notes tell.
    """
    fewer = any(option.bits != "fp32" for option in plan.options)
    # layers that are to be computed in fewer bits are written out; what nodes hold, and a compact file, keeps its cores
    held = any(one.site.held for one in replacements(plan))
    folded = {"store": "folded"} if fewer and not held and not compiling.get("compact") else {}
    compiled = compile_exported(student, **{**compiling, **folded})
    if not fewer:
        written = {part.name: "fp32" for option in plan.options for part in option.site.parts}
        return Realized(student, compiled, compiled.onnx, written=written)
    data = compiled.onnx
    usable = [b for b in allowed if b != "int8-static" or calibration]
    found = rounding(plan.options, compiled.program, data, usable)
    return Realized(student, compiled, quantize(data, found.choice, calibration), found.notes, found.written)
