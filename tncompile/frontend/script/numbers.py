"""What TorchScript computes on numbers, lists and strings, in Python: sizes may be symbolic there."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch


def _integer(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else int(value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, (str, bool)) else torch.sym_float(value)  # type: ignore[no-untyped-call]


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


def _slice(items: Any, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return items[start:end:step]


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return a / b
    return a // b if rounding_mode == "floor" else math.trunc(a / b)


#: by the operator's name without its namespace; used where no argument is a tensor
ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "sub", "neg", "pow")},
    "add": operator.add,
    "add_": operator.iadd,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "div": _divide,
    "remainder": operator.mod,
    "__and__": lambda a, b: a and b if isinstance(a, bool) else a & b,
    "__or__": lambda a, b: a or b if isinstance(a, bool) else a | b,
    "__xor__": operator.xor,
    "__not__": operator.not_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__contains__": lambda items, item: item in items,
    "__getitem__": lambda items, key: items[key],
    "__range_length": lambda start, stop, step: len(range(start, stop, step)),
    "__derive_index": lambda index, start, step: start + index * step,
    "_set_item": _set_item,
    "append": _append,
    "extend": lambda items, more: items.extend(more),
    "insert": lambda items, index, item: items.insert(index, item),
    "pop": lambda items, *key: items.pop(*key),
    "reverse": lambda items: items.reverse(),
    "copy": lambda items: items.copy(),
    "list": lambda items: [*items],
    "slice": _slice,
    "len": len,
    "keys": lambda items: [*items],
    "values": lambda items: [*items.values()],
    "items": lambda items: [*items.items()],
    "get": lambda items, key, default=None: items.get(key, default),
    "format": lambda text, *parts: text.format(*parts),
    "percentFormat": lambda text, *parts: text % parts,
    "str": str,
    "Int": _integer,
    "IntImplicit": _integer,
    "ScalarImplicit": lambda value: value,
    "FloatImplicit": _number,
    "Float": _number,
    "Bool": bool,
    "floor": lambda x: x if isinstance(x, (int, torch.SymInt)) else math.floor(x),
    "ceil": lambda x: x if isinstance(x, (int, torch.SymInt)) else math.ceil(x),
    "sqrt": lambda x: math.sqrt(x),
    "log": lambda x, *base: math.log(x, *base),
    "exp": lambda x: math.exp(x),
    "abs": abs,
    "max": max,
    "min": min,
    "sum": sum,
    "any": any,
    "all": all,
}

#: those that take lists and dicts with anything in them, tensors too
OF_CONTAINERS = {"__getitem__", "_set_item", "append", "extend", "insert", "pop", "reverse", "copy", "list", "slice"}
OF_CONTAINERS |= {"len", "keys", "values", "items", "get", "add", "add_", "mul", "__is__", "__isnot__"}
#: those that change the list or dict that they are given
CHANGE_CONTAINERS = {"_set_item", "append", "extend", "insert", "pop", "add_"}
