"""What ONNX Runtime makes of a model when it loads it: operators before and after, and what was fused."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tncompile.errors import LoadError
from tncompile.runtime.session import Session

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


@dataclass(frozen=True)
class OptimizedModel:
    """Operator counts of a model as written (`before`) and as ONNX Runtime runs it (`after`), by ``domain:name``."""

    before: Mapping[str, int]
    after: Mapping[str, int]

    @property
    def fused(self) -> dict[str, int]:
        """The operators that are not ONNX's own, as they are run."""
        return {name: count for name, count in self.after.items() if ":" in name}

    def __str__(self) -> str:
        names = sorted({*self.before, *self.after})
        width = max(map(len, names), default=0)
        lines = [f"{'operator':<{width}}  written  run"]
        lines += [f"{n:<{width}}  {self.before.get(n, 0) or '':>7}  {self.after.get(n, 0) or '':>3}" for n in names]
        lines.append(f"{'all':<{width}}  {sum(self.before.values()):>7}  {sum(self.after.values()):>3}")
        return "\n".join(lines) + "\n"


def optimized(path: str | os.PathLike[str]) -> OptimizedModel:
    """Load a file in ONNX Runtime with all its optimizations, on this machine's CPU, and count operators.

    LoadError where ONNX or ONNX Runtime cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "optimized.onnx"
        Session(os.fspath(path), optimized_path=result)
        return OptimizedModel(_operators(Path(path)), _operators(result))


def _operators(path: Path) -> dict[str, int]:
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base
        raise LoadError(f"{path}: not a readable ONNX file ({error})") from error
    domains = {"": "", "ai.onnx": ""}
    nodes = _nodes(model.graph)
    names = (f"{d}:{n.op_type}" if (d := domains.get(n.domain, n.domain)) else n.op_type for n in nodes)
    return dict(sorted(Counter(names).items()))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of the branches of an If too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
