"""Contraction orders: trees over the positions of a term's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

Tree = int | tuple[Any, ...]
"""A contraction order: a tensor's position, or a tuple of trees contracted from left to right."""


def flatten(tree: Tree) -> tuple[int, ...]:
    """The positions in a contraction order, from left to right."""
    found: list[int] = []
    todo = [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, int):
            found.append(item)
        else:
            todo += reversed(item)
    return tuple(found)


def fold_tree(tree: Tree, leaf: Callable[[int], T], join: Callable[[T, T], T]) -> T:
    """What `join` makes of the branches of an order, pair by pair from left to right, and `leaf` of its positions.

    Without recursion: the order of a chain is as deep as the chain is long.
    """
    todo: list[Tree | None] = [tree]
    done: list[T] = []
    while todo:
        item = todo.pop()
        if item is None:
            right, left = done.pop(), done.pop()
            done.append(join(left, right))
        elif isinstance(item, int):
            done.append(leaf(item))
        else:
            first, *others = item
            todo += [part for branch in reversed(others) for part in (None, branch)]
            todo.append(first)
    (result,) = done
    return result


def map_tree(tree: Tree, leaf: Callable[[int], Tree]) -> Tree:
    """Replace every leaf of an order; every branch of the result is a pair."""

    def join(a: Tree, b: Tree) -> Tree:
        return a, b

    return fold_tree(tree, leaf, join)


def left_to_right(positions: Iterable[Any]) -> Tree:
    """The order ``(((0, 1), 2), 3)`` of positions, or of whole trees."""
    tree: Tree | None = None
    for position in positions:
        tree = position if tree is None else (tree, position)
    return () if tree is None else tree
