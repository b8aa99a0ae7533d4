"""Names for the symbolic sizes of an ONNX model's inputs: those of the file as far as they are names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir

from tncompile.ir import Dim, dims
from tncompile.ir.edit import fresh

_UNNAMED = ("", "?", "None", "unk", "unknown")


@dataclass
class Symbols:
    """The sizes of a model's inputs. `names` maps what the file calls a size to what the program does.

    The first symbolic first mode is ``batch``. What the file writes as arithmetic of its other names is that; what
    it gives no name has one of its own.
    """

    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[Dim, ...] | None] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Iterable[onnx_ir.Value]) -> Symbols:
        """The symbols of the inputs in order."""
        found, inputs = Symbols(), list(inputs)
        for value in inputs:
            for axis, size in enumerate(_sizes(value)):
                if isinstance(size, str) and size.isidentifier() and size not in _UNNAMED:
                    found._name(size, axis)
        for value in inputs:
            sizes = _sizes(value)
            shape = tuple(found._dim(size, value.name or "", axis) for axis, size in enumerate(sizes))
            found.shapes[value.name or ""] = None if value.shape is None else shape
        return found

    @property
    def all(self) -> list[str]:
        """Every symbol of the inputs, each once."""
        shapes = (shape for shape in self.shapes.values() if shape is not None)
        return list(dict.fromkeys(s for shape in shapes for size in shape for s in sorted(dims.symbols(size))))

    def _name(self, key: str, axis: int) -> str:
        if key not in self.names:
            taken = {*self.names.values()}
            batch = axis == 0 and "batch" not in taken
            plain = re.sub(r"\W+", "_", key).strip("_") or "size"
            plain = plain if plain.isidentifier() else f"size_{plain}"
            self.names[key] = "batch" if batch else fresh(plain, {*taken, "batch"})
        return self.names[key]

    def _dim(self, size: Dim, value: str, axis: int) -> Dim:
        if isinstance(size, int) or size in self.names:
            return size if isinstance(size, int) else self.names[size]
        if size in _UNNAMED:
            return self._name(f"{value}_{axis}", axis)
        return self._expression(size) or self._name(size, axis)

    def _expression(self, text: str) -> Dim | None:
        """Arithmetic of sizes that have names, else None."""
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        allowed = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Name, ast.Load, ast.Constant)
        for node in ast.walk(tree):
            if not isinstance(node, allowed) or (isinstance(node, ast.Constant) and type(node.value) is not int):
                return None
            if isinstance(node, ast.Name):
                if node.id not in self.names:
                    return None
                node.id = self.names[node.id]
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
            return dims.product([_factor(tree.left), _factor(tree.right)])
        return _factor(tree)


def _factor(node: ast.expr) -> Dim:
    if isinstance(node, ast.Constant):
        return int(str(node.value))
    return node.id if isinstance(node, ast.Name) else f"({ast.unparse(node)})"


def _sizes(value: onnx_ir.Value) -> list[Dim]:
    shape = value.shape or ()
    return [size if isinstance(size, int) else (size.value or "") for size in shape]
