"""The invariants of a program, checked before and after every pass."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Literal

import numpy as np

from tncompile.errors import VerificationError
from tncompile.ir import dims
from tncompile.ir.core import Array, Network, Node, Program, Step, Switch, Tensor, Term, networks_of
from tncompile.ir.opaque import Opaque, Value
from tncompile.ir.tree import flatten

Stage = Literal["traced", "scheduled"]


def verify(program: Program, stage: Stage = "traced") -> None:
    """Raise VerificationError at the first broken invariant.

    Any stage: values are defined once and before use, with the shapes and dtypes their readers expect; an
    index has one size in a network; cores have the shape and dtype of their axes; one name is one array;
    orders name every tensor of their term once; slices are of indices that a term shares; a window joins an index that
    one operand alone has, one that one other tensor alone has, and one of the output. Stage ``scheduled``: every
    term that has operands also has the steps that compute it.
    """
    defined: dict[str, Value] = {}
    for value in program.inputs:
        _define(value, defined, None)
    arrays: dict[str, Array] = dict(program.weights)
    for node in program.nodes:
        for name in node.inputs:
            if name not in defined and not (isinstance(node, Opaque) and name in program.weights):
                raise _error(node, f"reads {name!r}, which nothing before it defines")
        if isinstance(node, Switch):
            _verify_switch(node, program)
        for network in networks_of(node):
            _verify_network(network, defined, arrays, stage)
        _define(node.value, defined, node)
    if len({public for public, _ in program.outputs}) < len(program.outputs):
        raise VerificationError("two outputs have the same name")
    both = sorted(arrays.keys() & defined.keys())
    if both:
        raise VerificationError(f"{both[0]!r} names both a weight and a value")
    for public, name in program.outputs:
        if name not in defined:
            raise VerificationError(f"output {public!r} shows {name!r}, which nothing defines")


def _error(node: Node | None, message: str) -> VerificationError:
    if node is None:
        return VerificationError(message)
    from tncompile.ir import text

    return VerificationError(f"{node.name or node.value.name}: {message}\n{text.dump_node(node)}", node.source)


def _define(value: Value, defined: dict[str, Value], node: Node | None) -> None:
    if value.name in defined:
        raise _error(node, f"value {value.name!r} is defined twice")
    defined[value.name] = value


def _verify_network(network: Network, defined: dict[str, Value], arrays: dict[str, Array], stage: Stage) -> None:
    sizes: dict[str, object] = {}
    for tensor in (network.output, *network.tensors):
        for index in tensor.indices:
            if sizes.setdefault(index.name, index.size) != index.size:
                raise _error(network, f"index {index.name} has sizes {sizes[index.name]} and {index.size}")
    names = [i.name for i in network.output.indices]
    if len({*names}) < len(names):
        raise _error(network, "an output index stands twice")
    if not network.terms:
        raise _error(network, "no terms")
    present = {i.name for t in network.tensors for i in t.indices}
    present |= {w.out for term in network.terms for w in term.windows}
    for index in network.output.indices:
        if index.name not in present and not isinstance(index.size, int):
            raise _error(network, f"output index {index.name} of symbolic size is on no tensor")
    for tensor in network.tensors:
        _verify_tensor(network, tensor, defined, arrays)
    for term in network.terms:
        if not term.tensors or sorted(flatten(term.order)) != list(range(len(term.tensors))):
            raise _error(network, f"order {term.order} does not name each of {len(term.tensors)} tensors once")
        _verify_slices(network, term)
        reason = wrong_windows(term, network.output)
        if reason:
            raise _error(network, reason)
        if stage == "scheduled" and not term.is_constant:
            _verify_steps(network, term)


def _verify_switch(switch: Switch, program: Program) -> None:
    if len(switch.cases) != len(switch.limits) + 1 or not switch.limits:
        raise _error(switch, f"{len(switch.cases)} cases for {len(switch.limits)} limits")
    if any(a >= b for a, b in itertools.pairwise((0, *switch.limits))):
        raise _error(switch, "the limits do not increase")
    if any((case.value, case.name) != (switch.value, switch.name) for case in switch.cases):
        raise _error(switch, "the cases do not compute the same value")
    if not any(dims.shows(size, switch.symbol) for value in program.inputs for size in value.shape or ()):
        raise _error(switch, f"no input shows the size {switch.symbol}")


def _verify_tensor(network: Network, tensor: Tensor, defined: dict[str, Value], arrays: dict[str, Array]) -> None:
    if tensor.data is None:
        value = defined[tensor.name]
        if value.shape != tensor.shape:
            raise _error(network, f"{tensor.name} has shape {value.shape}, its axes say {tensor.shape}")
        if value.dtype != network.dtype:
            raise _error(network, f"{tensor.name} is {value.dtype}, the network {network.dtype}")
        return
    if tensor.data.shape != tensor.shape:
        raise _error(network, f"core {tensor.name} has shape {tensor.data.shape}, its axes say {tensor.shape}")
    if tensor.data.dtype != np.dtype(network.dtype):
        raise _error(network, f"core {tensor.name} is {tensor.data.dtype}, the network {network.dtype}")
    if arrays.setdefault(tensor.name, tensor.data) is not tensor.data:
        raise _error(network, f"the name {tensor.name} stands for two arrays")


def _verify_slices(network: Network, term: Term) -> None:
    output = {i.name for i in network.output.indices}
    for number, part in enumerate(term.slices):
        holders = sum(part.index in {i.name for i in t.indices} for t in term.tensors)
        if not holders or (holders < 2 and part.index not in output):
            raise _error(network, f"slices of {part.index}, which nothing shares with the output or another tensor")
        if any(part.index in w.names for w in term.windows):
            raise _error(network, f"slices of {part.index}, which a window joins to others")
        if part.index in {s.index for s in term.slices[:number]}:
            raise _error(network, f"{part.index} is sliced twice")
        size = term.indices[part.index].size
        if part.count < 2 or (isinstance(size, int) and part.count > size):
            raise _error(network, f"{part.count} slices of {part.index}, whose size is {size}")


def wrong_windows(term: Term, output: Tensor) -> str:
    """What is wrong with the windows of a term; nothing where they can be computed as a convolution."""
    holders = Counter(i.name for t in term.tensors for i in t.indices)
    operands = [{i.name for i in t.indices} for t in term.operands]
    shown = {i.name: i.size for i in output.indices}
    for w in term.windows:
        if not any(w.axis in names for names in operands) or holders[w.axis] != 1 or w.axis in shown:
            return f"a window over {w.axis}, which is not an index of one operand alone"
        if holders[w.kernel] != 1 or any({w.axis, w.kernel} <= names for names in operands) or w.kernel in shown:
            return f"a window with {w.kernel}, which is not an index of one kernel alone"
        if w.out not in shown or holders[w.out]:
            return f"a window leaves {w.out}, which is not an index of the output alone"
        axis, kernel, out = term.indices[w.axis].size, term.indices[w.kernel].size, shown[w.out]
        if isinstance(axis, int) and isinstance(kernel, int) and isinstance(out, int) and w.length(axis, kernel) != out:
            return f"a window over {w.axis} leaves {w.length(axis, kernel)}, but {w.out} has size {out}"
    if len({name for w in term.windows for name in w.names}) < 3 * len(term.windows):
        return "two windows have an index in common"
    kernels = {w.kernel for w in term.windows}
    if kernels and sum(kernels.isdisjoint(names) for names in operands) > 1:
        return "a window over one of several operands"
    return ""


def _verify_steps(network: Network, term: Term) -> None:
    if term.steps is None:
        raise _error(network, "a term has no schedule")
    if term.windows and len(term.operands) > 1:
        raise _error(network, "a kernel that is computed at run time")
    live = set(range(len(term.tensors)))
    layouts = {p: {i.name for i in t.indices} for p, t in enumerate(term.tensors)}
    for number, step in enumerate(term.steps, start=len(term.tensors)):
        for side in (step.left, step.right):
            if side not in live:
                raise _error(network, f"step {number} reads {side}, which is not there (any more)")
            live.remove(side)
        live.add(number)
        _verify_step_order(network, term, layouts, step, number)
    if len(live) != 1:
        raise _error(network, f"the schedule leaves {len(live)} tensors, not one")


def _verify_step_order(network: Network, term: Term, layouts: dict[int, set[str]], step: Step, number: int) -> None:
    """A step's result has the indices of its two sides that something else still needs, each once; a window whose two
    sides meet leaves its third index."""
    both = layouts.pop(step.left) | layouts.pop(step.right)
    needed = {i.name for i in network.output.indices}.union(term.slid, *layouts.values())
    for w in term.windows:
        if {w.axis, w.kernel} <= both:
            both = (both - {w.axis, w.kernel}) | {w.out}
    if len({*step.order}) < len(step.order) or {*step.order} != both & needed:
        wanted = " ".join(sorted(both & needed))
        raise _error(network, f"step {number} leaves [{' '.join(step.order)}]; its sides give {wanted}")
    layouts[number] = {*step.order}
