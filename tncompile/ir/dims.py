"""Sizes of modes: integers, named symbols, and products of them.

A symbolic size is a string: a name (``"batch"``), or a canonical product with its integer factor first
and its symbols in alphabetical order (``"13*batch"``). Any other expression is kept as one opaque factor
in parentheses (``"(seq + 1)"``).
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

Dim = int | str

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _factors(dim: Dim) -> tuple[int, Counter[str]]:
    """Integer factor and the multiset of symbolic factors of a size."""
    if isinstance(dim, int):
        return dim, Counter()
    integer, symbols, depth, start = 1, Counter[str](), 0, 0
    for position, char in enumerate(dim + "*"):
        depth += (char == "(") - (char == ")")
        if char == "*" and depth == 0:
            factor = dim[start:position].strip()
            start = position + 1
            if factor.isdecimal():
                integer *= int(factor)
            else:
                symbols[factor] += 1
    return integer, symbols


def _join(integer: int, symbols: Counter[str]) -> Dim:
    names = sorted(symbols.elements())
    if not names or integer == 0:
        return integer
    return "*".join(([str(integer)] if integer != 1 else []) + names)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of sizes, in canonical form; 1 for none."""
    integer, symbols = 1, Counter[str]()
    for dim in dims:
        i, s = _factors(dim)
        integer *= i
        symbols += s
    return _join(integer, symbols)


def divide(dim: Dim, by: Dim) -> Dim | None:
    """``dim / by`` where that is exact whatever the symbols are, else None."""
    (i, s), (j, t) = _factors(dim), _factors(by)
    if j == 0 or i % j or t - s:
        return None
    return _join(i // j, s - t)


def shows(dim: Dim, symbol: str) -> int:
    """How many times the size of `symbol` a size is: 8 for ``"8*batch"``; 0 where it is no such multiple."""
    times = divide(dim, symbol)
    return times if isinstance(times, int) else 0


def symbols(dim: Dim) -> set[str]:
    """The names that a size depends on."""
    if isinstance(dim, int):
        return set()
    return {node.id for node in ast.walk(ast.parse(dim, mode="eval")) if isinstance(node, ast.Name)}


def is_static(dim: Dim) -> bool:
    """Whether a size is a number."""
    return isinstance(dim, int)


def evaluate(dim: Dim, values: Mapping[str, int]) -> int:
    """The size for given values of its symbols; KeyError for a symbol without one."""
    if isinstance(dim, int):
        return dim

    def visit(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -visit(node.operand)
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise KeyError(ast.unparse(node))

    return visit(ast.parse(dim, mode="eval").body)
