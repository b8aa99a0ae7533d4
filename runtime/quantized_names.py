"""Names for what a quantizer adds to a model; equal initializers are stored once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tncompile.runtime.quantized_graph import graphs_of

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


@dataclass
class Names:
    """Names that a model has; `initializers` are the new ones by name, `contents` their names by content."""

    values: set[str]
    nodes: set[str]
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    contents: dict[bytes, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelProto) -> Names:
        """Those of a model, its inner graphs included."""
        values, nodes = set[str](), set[str]()
        for graph in graphs_of(model.graph):
            values |= {v.name for v in (*graph.input, *graph.initializer)}
            values |= {name for node in graph.node for name in node.output}
            nodes |= {node.name for node in graph.node}
        return cls(values, nodes)

    def value(self, wanted: str) -> str:
        """A name for a new value."""
        return _unique(wanted, self.values)

    def node(self, wanted: str) -> str:
        """A name for a new node."""
        return _unique(wanted, self.nodes)

    def initializer(self, tensor: TensorProto) -> str:
        """The name of an initializer of this content: one that is new as well, or a new one."""
        from onnx import TensorProto

        bare = TensorProto()
        bare.CopyFrom(tensor)
        bare.name = ""
        content = bare.SerializeToString(deterministic=True)
        if content not in self.contents:
            bare.name = self.contents[content] = self.value(tensor.name)
            self.initializers[bare.name] = bare
        return self.contents[content]


def _unique(wanted: str, taken: set[str]) -> str:
    number, name = 1, wanted
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    taken.add(name)
    return name
