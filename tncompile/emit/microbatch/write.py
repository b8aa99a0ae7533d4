"""The nodes of a region: whole up to a limit of samples, in micro-batches beyond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir

from tncompile.emit.fuse.match import Editor, replace, shape_of
from tncompile.emit.microbatch.region import Region

Value = onnx_ir.Value

_SAMPLES = "micro_batch"
_ANY = (1 << 63) - 1


def write_choice(graph: onnx_ir.Graph, region: Region, limit: int, most: int, least: int = 1) -> None:
    """Put an ``If`` in the place of the region's nodes. The sizes are those of `MicroBatches`."""
    first = region.nodes[0]
    outer = _Nodes(Editor(graph))
    batch = outer.op("Shape", [region.inputs[0]], start=0, end=1)
    whole = outer.integers([limit])
    if least > 1:  # a limit for each remainder: none is beyond it unless enough samples divide the batch
        limits = outer.integers([limit] + [_ANY] * (least - 1))
        whole = outer.op("Gather", [limits, outer.op("Mod", [batch, outer.integers([least])])])
    few = outer.op("LessOrEqual", [batch, whole])
    writer = _Region(region, outer.editor)
    branches = {"then_branch": writer.whole(), "else_branch": writer.parts(batch, most)}
    outputs = outer.node("If", [few], len(region.outputs), **branches)
    graph.insert_before(first, outer.nodes)
    for old, new in zip(region.outputs, outputs, strict=True):
        replace(old, new)
        old.name, new.name = outer.editor.name(f"{old.name}:whole"), old.name
    for node in reversed(region.nodes):
        graph.remove(node, safe=True)


class _Nodes:
    """Nodes that are not in a graph yet; their constants are in the main one."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.nodes: list[onnx_ir.Node] = []

    def node(self, op_type: str, inputs: Sequence[Value], outputs: int = 1, **attributes: Any) -> Sequence[Value]:
        node = onnx_ir.node(op_type, inputs, attributes, num_outputs=outputs)
        node.name = self.editor.name(f"micro_batches/{op_type}")
        for value in node.outputs:
            value.name = self.editor.name(f"{node.name}:out")
        self.nodes.append(node)
        return node.outputs

    def op(self, op_type: str, inputs: Sequence[Value], like: Value | None = None, **attributes: Any) -> Value:
        """A node of one output, of the type of another value."""
        (value,) = self.node(op_type, inputs, **attributes)
        value.type = like.type if like is not None else None
        return value

    def integers(self, numbers: Sequence[int]) -> Value:
        return self.editor.constant(f"sizes_{'x'.join(map(str, numbers))}", np.asarray(numbers, np.int64))

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        result = self.op("Reshape", [value, self.integers(shape)], value)
        result.shape = onnx_ir.Shape(shape)
        return result

    def graph(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> onnx_ir.Graph:
        return onnx_ir.Graph(inputs, outputs, nodes=self.nodes, name=name)


class _Region:
    """Copies of a region's nodes, whole and in a Scan."""

    def __init__(self, region: Region, editor: Editor) -> None:
        self.region = region
        self.editor = editor

    def whole(self) -> onnx_ir.Graph:
        """All samples at once."""
        write = _Nodes(self.editor)
        made = self._copy(write, {}, "whole")
        return write.graph("whole", [], [self._shaped(v, made[v], [self.region.batch]) for v in made])

    def parts(self, batch: Value, most: int) -> onnx_ir.Graph:
        """A Scan over slices of up to `most` samples, or of one."""
        write, body = _Nodes(self.editor), _Nodes(self.editor)
        sliced: list[Value] = []
        given: dict[Value, Value] = {}
        slices: list[Value] = []
        lead: list[str] = [] if most == 1 else [_SAMPLES]
        samples = None if most == 1 else self._samples(write, batch, most)
        for value in self.region.inputs:
            part = Value(name=self.editor.name(f"{value.name}:slice"), type=value.type)
            slices.append(self._shaped(value, part, lead))
            if samples is None:
                sliced.append(value)
                given[value] = body.reshape(part, [1, *self._rest(value)])
            else:
                shape = write.op("Concat", [write.integers([-1]), samples, write.integers(self._rest(value))], axis=0)
                sliced.append(write.op("Reshape", [value, shape], value))
                given[value] = part
        made = self._copy(body, given, "part")
        results = list(made.values())
        if samples is None:
            results = [body.reshape(made[v], self._rest(v)) for v in made]
        results = [self._shaped(v, result, lead) for v, result in zip(made, results, strict=True)]
        scan = body.graph("micro_batch", slices, results)
        outputs = write.node("Scan", sliced, len(results), body=scan, num_scan_inputs=len(slices))
        if samples is not None:
            outputs = [write.reshape(o, [-1, *self._rest(v)]) for v, o in zip(made, outputs, strict=True)]
        outputs = [self._shaped(v, o, [self.region.batch]) for v, o in zip(made, outputs, strict=True)]
        return write.graph("in_micro_batches", [], outputs)

    @staticmethod
    def _samples(write: _Nodes, batch: Value, most: int) -> Value:
        """The largest power of two up to `most` that divides the batch."""
        powers = write.integers([1 << k for k in range(most.bit_length())])
        rest = write.op("Mod", [batch, powers])
        dividing = write.op("Equal", [rest, write.integers([0])])
        sizes = write.op("Where", [dividing, powers, write.integers([1])])
        return write.op("ReduceMax", [sizes], keepdims=1)

    def _copy(self, write: _Nodes, given: Mapping[Value, Value], tag: str) -> dict[Value, Value]:
        """The nodes once more, reading `given` for their inputs, and their copies of the region's outputs."""
        made = dict(given)
        copies: list[onnx_ir.Node] = []
        for node in self.region.nodes:
            inputs = [None if value is None else made.get(value, value) for value in node.inputs]
            attributes = list(node.attributes.values())
            name = self.editor.name(f"{node.name}/{tag}")
            copy = onnx_ir.Node(
                "", node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name,
                metadata_props=dict(node.metadata_props),
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type = self.editor.name(f"{name}:out"), old.type
                made[old] = new
            copies.append(copy)
        write.nodes += copies
        return {value: made[value] for value in self.region.outputs}

    @staticmethod
    def _rest(value: Value) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(int(size) for size in (shape_of(value) or ())[1:])

    def _shaped(self, old: Value, new: Value, lead: Sequence[str]) -> Value:
        """`new` known as samples of `old`, with some axes in front."""
        new.type, new.shape = old.type, onnx_ir.Shape((*lead, *self._rest(old)))
        return new
