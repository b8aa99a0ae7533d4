"""The tensor-network IR: what a traced model is between the frontend and ONNX."""

from tncompile.errors import SourceRef
from tncompile.ir.core import (
    Array,
    Axis,
    Index,
    Network,
    Node,
    Program,
    Recipe,
    Slice,
    Step,
    Switch,
    Tensor,
    Term,
    Window,
    networks_of,
)
from tncompile.ir.dims import Dim
from tncompile.ir.evaluate import evaluate
from tncompile.ir.opaque import Arg, Constant, Opaque, Ref, Value, references
from tncompile.ir.tree import Tree
from tncompile.ir.verify import Stage, verify

__all__ = [
    "Arg",
    "Array",
    "Axis",
    "Constant",
    "Dim",
    "Index",
    "Network",
    "Node",
    "Opaque",
    "Program",
    "Recipe",
    "Ref",
    "Slice",
    "SourceRef",
    "Stage",
    "Step",
    "Switch",
    "Tensor",
    "Term",
    "Tree",
    "Value",
    "Window",
    "evaluate",
    "networks_of",
    "references",
    "verify",
]
