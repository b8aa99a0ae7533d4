"""A scheduled network -> ONNX nodes: MatMul, Gemm, Conv 1x1, Mul, ReduceSum, Transpose and Reshape; no Einsum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as onnx

from tncompile.cost.layouts import reduced_layout
from tncompile.emit.graph import GraphWriter, Group, Groups, Laid, Symbols, Weights
from tncompile.emit.slices import in_slices
from tncompile.emit.steps import Contractions, Side, laid_out
from tncompile.ir import Array, Network, Tensor, Term
from tncompile.ir.evaluate import evaluate_term, merge


def lower(
    network: Network, operands: Mapping[str, onnx.Value], weights: Weights, symbols: Symbols
) -> tuple[list[onnx.Node], onnx.Value]:
    """The nodes that compute a network from the values of its operands, and the value they end in.

    The terms must be scheduled (see the pass `order`).
    """
    return _Lowering(network, operands, weights, symbols).run()


class _Lowering:
    def __init__(
        self, network: Network, operands: Mapping[str, onnx.Value], weights: Weights, symbols: Symbols
    ) -> None:
        self.network = network
        self.output = tuple(i.name for i in network.output.indices)
        self.out_axes: Groups = tuple(tuple(i.name for i in axis) for axis in network.output.axes)
        sizes = {name: index.size for name, index in network.indices.items()}
        for tensor in network.operands:  # repeated indices have names of their own until their diagonal is taken
            sizes |= {i.name + "'" * k: i.size for i in tensor.indices for k in range(len(tensor.indices))}
        laid = [self._distinct(laid_out(t, operands[t.name])) for t in network.operands]
        self.write = GraphWriter(network.label, sizes, network.dtype, weights, laid, symbols)
        self.contractions = Contractions(self.write, network.dtype, self.out_axes)
        self.values = operands

    def run(self) -> tuple[list[onnx.Node], onnx.Value]:
        moving, constants = self.network.moving, self.network.constants
        result = self._sum(moving, constants) if moving else self._constant(constants)
        return self.write.nodes, result.value

    # ------------------------------------------------------------------------------ terms

    def _constant(self, terms: Sequence[Term]) -> Laid:
        shape = [int(i.size) for i in self.network.output.indices]
        total = np.zeros(shape) + sum((self._term_array(t, self.output) for t in terms), np.zeros(()))
        shaped = total.reshape([int(self.write.size(g)) for g in self.out_axes]).astype(self.network.dtype)
        return Laid(self.write.weights.add(self.network.output.name, shaped), self.out_axes)

    def _term_array(self, term: Term, order: Group) -> Array:
        """A term of cores with one axis for each index of `order`, of size 1 where it lacks the index."""
        indices = [self.network.indices[name] for name in order]
        return evaluate_term(term, indices, {}, lambda index: int(index.size))

    def _reduced_core(self, core: Tensor, layout: Group) -> Tensor:
        """A core without repeated indices and without those that only it has."""
        if tuple(i.name for i in core.indices) == layout:
            return core
        kept = tuple(self.network.indices[name] for name in layout)
        return Tensor(core.name, tuple((i,) for i in kept), merge([core], 0, kept).astype(self.network.dtype))

    def _per_channel(self, term: Term, biases: Sequence[Term]) -> Laid | None:
        """``x[b, c, ..] s[c] + t[c]``, what a BatchNorm is that nothing could take in: one node does it."""
        if len(term.tensors) != 2 or len(term.operands) != 1 or not biases:
            return None
        operand, (scale,) = laid_out(term.operands[0], self.values[term.operands[0].name]), term.cores
        indices = scale.indices
        if len(operand.axes) < 3 or len(indices) != 1 or operand.axes[1] != (indices[0].name,):
            return None
        if operand.axes != self.out_axes or any(b.indices.keys() - {indices[0].name} for b in biases):
            return None
        channels, dtype = (indices[0].name,), self.network.dtype
        shift = sum((self._term_array(b, channels) for b in biases), np.zeros(int(indices[0].size))).astype(dtype)
        parts = [(scale.name, scale.array()), (biases[0].tensors[0].name, shift)]
        parts += [(f"zeros_{shift.size}", np.zeros_like(shift)), (f"ones_{shift.size}", np.ones_like(shift))]
        values = [self.write.weights.add(name, array) for name, array in parts]
        return Laid(self.write.op("BatchNormalization", [operand.value, *values], epsilon=0.0), operand.axes)

    def _sum(self, moving: Sequence[Term], constants: Sequence[Term]) -> Laid:
        whole = self._per_channel(moving[0], constants) if len(moving) == 1 else None
        if whole is not None:
            return whole
        moving = sorted(moving, key=lambda term: not (term.steps and term.steps[-1].form != "multiply"))
        first = self._term(moving[0], constants)  # one whose last node can take the bias in, if any
        if len(moving) == 1 and {*first.order} == {*self.output}:
            return self.write.arrange(first, self.out_axes)
        rest = [self._term(t, ()) for t in moving[1:]]
        total = self._spread(first)
        for term in rest:
            total = Laid(self.write.op("Add", [total.value, self._spread(term).value]), self._union(total, term))
        missing = [n for n in self.output if n not in total.order]
        if missing:
            shape = [int(self.write.sizes[n]) if n in missing else 1 for n in self.output]
            target = self.write.constant(f"expand_{'x'.join(map(str, shape))}", shape)
            total = Laid(self.write.op("Expand", [total.value, target]), tuple((n,) for n in self.output))
        return self.write.arrange(total, self.out_axes)

    def _union(self, total: Laid, term: Laid) -> Groups:
        if total.axes == self.out_axes and {*term.order} == {*self.output}:
            return self.out_axes
        return tuple((n,) if n in total.order or n in term.order else () for n in self.output)

    def _spread(self, laid: Laid) -> Laid:
        """Ready to be added: in the output's own axes, or with an axis (maybe of size 1) for each index."""
        everywhere = all({*i} == {*self.output} for i in self._term_indices())
        if everywhere:
            return self.write.arrange(laid, self.out_axes)
        return self.write.arrange(laid, tuple((n,) if n in laid.order else () for n in self.output))

    def _term_indices(self) -> list[set[str]]:
        output = {*self.output}
        return [output & {*t.indices} for t in self.network.moving]

    def _term(self, term: Term, biases: Sequence[Term]) -> Laid:
        sides: list[Side] = []
        for position, tensor in enumerate(term.tensors):
            layout = reduced_layout(term, position, self.output)
            if tensor.is_core:
                sides.append(self._reduced_core(tensor, layout))
            else:
                sides.append(self._take(laid_out(tensor, self.values[tensor.name]), layout))
        if not term.slices:
            return self._steps(term, sides, biases)
        result = in_slices(term.slices, sides, self.write, self.output, lambda parts: self._steps(term, parts, ()))
        return self._add_bias(result, biases) if biases else result

    def _steps(self, term: Term, sides: list[Side], biases: Sequence[Term]) -> Laid:
        if term.steps is None:
            raise ValueError(f"{self.network.label}: a term has no schedule")
        pending = biases
        for number, step in enumerate(term.steps):
            left, right = sides[step.left], sides[step.right]
            assert isinstance(left, Laid)
            last = number == len(term.steps) - 1
            result = self.contractions.step(left, right, step, term.windows)
            if last and pending:
                fused = self._fuse_bias(result, pending)
                if fused is not None:
                    result, pending = fused, ()
            sides.append(result)
        final = sides[-1]  # of a term without steps, its only tensor
        assert isinstance(final, Laid)
        return self._add_bias(final, pending) if pending else final

    def _take(self, laid: Laid, layout: Group) -> Laid:
        """An operand with its repeated indices reduced to their diagonal and its free indices summed."""
        laid = self._distinct(laid)
        for name in laid.order:
            if name.endswith("'"):
                laid = self._diagonal(laid, name.rstrip("'"), name)
        summed = [n for n in laid.order if n not in layout]
        if summed:
            groups: list[Group] = []
            for name in laid.order:
                previous = groups[-1] if groups else ()
                together = previous and (previous[0] in summed) == (name in summed)
                if together and not (self.write.symbolic(name) and any(map(self.write.symbolic, previous))):
                    groups[-1] = (*previous, name)
                else:
                    groups.append((name,))
            if all(len({n in summed for n in axis}) <= 1 for axis in laid.axes):
                groups = list(laid.axes)
            laid = self.contractions.reduce(self.write.regroup(laid, tuple(groups)), summed)
        return laid

    def _distinct(self, laid: Laid) -> Laid:
        """The second, third ... place of an index is called ``k'``, ``k''`` ..."""
        seen: dict[str, int] = {}

        def name_of(name: str) -> str:
            seen[name] = seen.get(name, -1) + 1
            return name + "'" * seen[name]

        return Laid(laid.value, tuple(tuple(map(name_of, axis)) for axis in laid.axes))

    def _diagonal(self, laid: Laid, name: str, twin: str) -> Laid:
        """``x[.., k, .., k']`` -> ``x[.., k]``: as one axis of k·k, of which every (k+1)-th element is taken."""
        size = self.write.sizes[name]
        if not isinstance(size, int):
            raise ValueError(f"the diagonal of a mode of run-time size {size}")
        rest = tuple(n for n in laid.order if n not in (name, twin))
        laid = self.write.arrange(laid, (*self.write.gather(rest), (name, twin)))
        args = [self.write.constant(f"slice_{k}", [v]) for k, v in (("0", 0), (str(size * size), size * size))]
        args += [self.write.constant("slice_last", [-1]), self.write.constant(f"slice_by_{size + 1}", [size + 1])]
        return Laid(self.write.op("Slice", [laid.value, *args]), (*laid.axes[:-1], (name,)))

    # ------------------------------------------------------------------------------ biases

    def _fuse_bias(self, result: Laid, biases: Sequence[Term]) -> Laid | None:
        """Into the MatMul or Conv just written, where that has an input for it."""
        node = self.write.nodes[-1]
        if node.outputs[0] is not result.value or {n for b in biases for n in b.indices} - {*result.order}:
            return None
        axis = 1 if node.op_type == "Conv" else len(result.axes) - 1
        if node.op_type not in ("Conv", "MatMul") or (node.op_type == "MatMul" and len(result.axes) != 2):
            return None
        if any(map(self.write.symbolic, result.axes[axis])):
            return None
        array = sum((self._term_array(b, result.order) for b in biases), np.zeros(()))
        inside = {n for n, size in zip(result.order, array.shape, strict=True) if size != 1}
        if not inside <= {*result.axes[axis]}:
            return None
        sizes = [int(self.write.sizes[n]) for n in result.axes[axis]]
        lead = [k for k, n in enumerate(result.order) if n not in result.axes[axis]]
        vector = np.broadcast_to(np.squeeze(array, axis=tuple(lead)), sizes).reshape(-1)
        bias = self.write.weights.add(biases[0].tensors[0].name, vector.astype(self.network.dtype))
        inputs = [*node.inputs, bias]
        for position in range(len(node.inputs)):  # nothing of what is dropped reads a weight any more
            node.replace_input_with(position, None)
        self.write.nodes.pop()
        op = "Conv" if node.op_type == "Conv" else "Gemm"
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return Laid(self.write.op(op, inputs, **attributes), result.axes)  # type: ignore[arg-type]

    def _add_bias(self, result: Laid, biases: Sequence[Term]) -> Laid:
        if any(n not in result.order for b in biases for n in b.indices):  # the bias is the wider one
            result = self.write.arrange(result, tuple((n,) if n in result.order else () for n in self.output))
            array = sum((self._term_array(b, self.output) for b in biases), np.zeros(()))
            sizes = zip(self.output, array.shape, strict=True)
            axes: Groups = tuple((n,) if n in result.order or size != 1 else () for n, size in sizes)
        else:
            along = {n for b in biases for n in b.indices}
            if {*result.order} == {*self.output} and along <= {*self.out_axes[-1]}:
                # last of all: an Add along the last axis next to a Gelu is fused with it
                result = self.write.arrange(result, self.out_axes)
            array = sum((self._term_array(b, result.order) for b in biases), np.zeros(()))
            varying = {n for n, size in zip(result.order, array.shape, strict=True) if size != 1}
            if any(varying & {*axis} and any(map(self.write.symbolic, axis)) for axis in result.axes):
                result = self.write.regroup(result, tuple((n,) for n in result.order))
            # along an axis of several indices the bias is written out in full, or not at all
            full = {n for axis in result.axes if varying & {*axis} for n in axis}
            array = np.broadcast_to(array, [int(self.write.sizes[n]) if n in full else 1 for n in result.order])
            array = array.reshape([int(self.write.size(axis)) if full & {*axis} else 1 for axis in result.axes])
            axes = result.axes
        while array.ndim > 1 and array.shape[0] == 1:
            array = array[0]
        bias = self.write.weights.add(biases[0].tensors[0].name, array.astype(self.network.dtype))
        return Laid(self.write.op("Add", [result.value, bias]), axes)
