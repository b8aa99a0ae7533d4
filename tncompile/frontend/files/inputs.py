"""What a model takes, as a user writes it: ``--input "ids:int64[batch,seq]<8000"``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tncompile.errors import TNCompileError

GRAMMAR = (
    "write NAME:DTYPE[SIZES], like x:float32[batch,3,224,224], where a word is a dynamic size, "
    "ids:int64[batch,seq]<8000 for whole numbers below 8000, or NAME=VALUE for a number that never changes"
)

_DTYPES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}
_DTYPES |= {d: d for d in ("float16", "float32", "float64", "bfloat16", "uint8", "int8", "int16", "int32", "int64")}
_DTYPES["bool"] = "bool"

_TENSOR = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][\w.]*)\s*:)?\s*(?P<dtype>[A-Za-z]\w*)?\s*\[(?P<dims>[^\[\]]*)\]\s*(?:<\s*(?P<limit>\d+))?\s*"
)
_VALUE = re.compile(r"\s*(?P<name>[A-Za-z_][\w.]*)\s*=\s*(?P<value>[^\[\]]+?)\s*")
_SIZE = re.compile(r"(?P<number>\d+)|(?P<name>[A-Za-z_]\w*)(?:\s*=\s*(?P<example>\d+))?")
_WORDS: Mapping[str, Any] = {"None": None, "none": None, "True": True, "true": True, "False": False, "false": False}


@dataclass(frozen=True)
class InputSpec:
    """One input.

    `name` is ``""`` where the place among the others says which it is. `dims` are numbers, or names of dynamic
    sizes; `examples` has the sizes to trace those with, where given. Whole numbers are drawn below `limit`. Where
    `fixed`, the input is no tensor but `value`, always.
    """

    name: str = ""
    dtype: str = "float32"
    dims: tuple[int | str, ...] = ()
    examples: tuple[tuple[str, int], ...] = ()
    limit: int | None = None
    fixed: bool = False
    value: Any = None

    def __str__(self) -> str:
        if self.fixed:
            return f"{self.name}={self.value}"
        sizes = dict(self.examples)
        dims = ",".join(f"{d}={sizes[d]}" if isinstance(d, str) and d in sizes else str(d) for d in self.dims)
        limit = "" if self.limit is None else f"<{self.limit}"
        return f"{self.name}{':' if self.name else ''}{self.dtype}[{dims}]{limit}"


def parse_input(text: str) -> InputSpec:
    """The input that `text` describes. TNCompileError, with the grammar, for anything else."""
    found = _VALUE.fullmatch(text)
    if found is not None:
        return InputSpec(found["name"], fixed=True, value=_value(found["value"]))
    found = _TENSOR.fullmatch(text)
    if found is None:
        raise TNCompileError(f"input {text!r} cannot be read; {GRAMMAR}")
    name, dtype = found["name"] or "", found["dtype"] or "float32"
    if not name and dtype not in _DTYPES:  # x[batch,3]
        name, dtype = dtype, "float32"
    if dtype not in _DTYPES:
        raise TNCompileError(
            f"input {text!r}: no dtype {dtype!r}; choose from {', '.join(sorted({*_DTYPES.values()}))}"
        )
    dims: list[int | str] = []
    examples: dict[str, int] = {}
    for part in (p.strip() for p in found["dims"].split(",")) if found["dims"].strip() else ():
        size = _SIZE.fullmatch(part)
        if size is None or size["number"] == "0" or size["example"] == "0":
            raise TNCompileError(f"input {text!r}: {part!r} is not a size; {GRAMMAR}")
        dims.append(int(size["number"]) if size["number"] else size["name"])
        if size["example"]:
            examples[size["name"]] = int(size["example"])
    limit = None if found["limit"] is None else int(found["limit"])
    if limit is not None and (limit < 1 or "int" not in _DTYPES[dtype]):
        raise TNCompileError(f"input {text!r}: <{limit} goes with whole numbers and is at least 1")
    return InputSpec(name, _DTYPES[dtype], tuple(dims), tuple(examples.items()), limit)


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("\"'")


def example_sizes(specs: Sequence[InputSpec]) -> dict[str, int]:
    """The size to trace each named dimension with: as given, else small and different from one another."""
    names = dict.fromkeys(d for spec in specs for d in spec.dims if isinstance(d, str))
    sizes: dict[str, int] = {}
    for spec in specs:
        for name, size in spec.examples:
            if sizes.setdefault(name, size) != size:
                raise TNCompileError(f"the dynamic size {name} is given as {sizes[name]} and as {size}; choose one")
    usual = iter([3, 8, *range(10, 10 + 2 * len(names), 2)])
    return {name: sizes[name] if name in sizes else next(usual) for name in names}
