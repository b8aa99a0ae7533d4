"""From a traced module to a program: what becomes a network, what stays opaque, and the numbers of both."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tncompile
from tests.helpers import assert_close
from tncompile.errors import TNCompileError, UnsupportedError
from tncompile.frontend import multilinear
from tncompile.frontend.importer import TracedModel, import_exported
from tncompile.frontend.trace import trace, whole_einsums
from tncompile.frontend.translators import operator_name
from tncompile.ir import Arg, Array, Constant, Network, Opaque, Program, Ref, verify
from tncompile.ir import evaluate as evaluate_network
from tncompile.ir import text as ir_text

TOLERANCE = 1e-13
"""Of float64 against float64: no more than the order of additions differs."""

Forward = Callable[..., Any]


class Function(nn.Module):
    """A module that computes a function of a few parameters and its inputs, all in float64."""

    def __init__(self, function: Forward, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in shapes]
        )

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*self.weights, *inputs)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def import_module(module: nn.Module, *inputs: torch.Tensor, dynamic: Any = "batch") -> TracedModel:
    traced = import_exported(trace(module, inputs, dynamic_shapes=dynamic))
    verify(traced.program)
    return traced


# ------------------------------------------------------------------------ evaluating a program


def evaluate(program: Program, inputs: list[torch.Tensor]) -> list[Array]:
    """Networks by `tncompile.ir.evaluate`, opaque nodes by torch; what the outputs are."""
    values: dict[str, Any] = {v.name: x.numpy() for v, x in zip(program.inputs, inputs, strict=True)}
    sizes: dict[str, int] = {}
    for value in program.inputs:
        for dim, length in zip(value.shape or (), values[value.name].shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                sizes[dim] = length
    values |= program.weights
    for node in program.nodes:
        if isinstance(node, Network):
            values[node.output.name] = evaluate_network(node, values, sizes)
        else:
            values[node.output.name] = run_opaque(node, values)
    return [np.asarray(values[name]) for _, name in program.outputs]


def run_opaque(node: Opaque, values: Mapping[str, Any]) -> Any:
    def plain(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            value = values[arg.name]
            return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        if isinstance(arg, Constant):
            return torch.device("cpu") if "device" in arg.spelling else getattr(torch, arg.spelling[6:])
        return [plain(a) for a in arg] if isinstance(arg, tuple) else arg

    head, _, rest = node.target.partition(".")
    if head == "operator":
        function: Any = getattr(operator, rest)
    else:
        packet, overload = rest.rsplit(".", 1)
        function = getattr(getattr(getattr(torch.ops, head), packet), overload)
    result = function(*map(plain, node.args), **{k: plain(v) for k, v in node.kwargs})
    return result.numpy() if isinstance(result, torch.Tensor) else result


def assert_same_as_torch(module: nn.Module, traced: TracedModel, *inputs: torch.Tensor) -> None:
    """The program computes what the module does, on these inputs."""
    with torch.no_grad():
        expected = module(*inputs)
    leaves = torch.utils._pytree.tree_leaves(expected)
    found = evaluate(traced.program, list(inputs))
    assert len(found) == len(leaves)
    for number, (a, b) in enumerate(zip(found, leaves, strict=True)):
        assert_close(a, b.detach().numpy(), tolerance=TOLERANCE, what=f"output {number}")


def targets(program: Program) -> set[str]:
    """The operations of opaque nodes that compute tensors."""
    opaque = [n for n in program.nodes if isinstance(n, Opaque) and n.output.dtype != "scalar"]
    return {".".join(n.target.split(".")[:2]) for n in opaque}


# ------------------------------------------------------------------------ multilinear operations

X = rand(4, 6)
"""Batch 4, which the trace makes dynamic, and 6 features."""

Case = tuple[Forward, list[tuple[int, ...]], list[torch.Tensor]]

MULTILINEAR: dict[str, Case] = {
    "linear": (lambda w, x: F.linear(x, w), [(3, 6)], [X]),
    "linear with bias": (lambda w, b, x: F.linear(x, w, b), [(3, 6), (3,)], [X]),
    "linear on three modes": (lambda w, b, x: F.linear(x, w, b), [(3, 6), (3,)], [rand(4, 5, 6)]),
    "linear of a vector weight": (lambda w, x: F.linear(x, w), [(6,)], [X]),
    "mm": (lambda w, x: torch.mm(x, w), [(6, 3)], [X]),
    "mm of inputs": (torch.mm, [], [X, rand(6, 3)]),
    "bmm": (torch.bmm, [], [rand(4, 2, 6), rand(4, 6, 3)]),
    "matmul broadcast": (lambda w, x: x @ w, [(5, 6, 3)], [rand(4, 1, 2, 6)]),
    "matmul, matrix and vector": (lambda w, x: x @ w, [(6,)], [X]),
    "matmul, vector and matrix": (lambda w, x: w @ x.mT, [(6,)], [X]),
    "dot": (lambda w, x: torch.dot(w, x.sum(0)), [(6,)], [X]),
    "vdot": (lambda w, x: torch.vdot(w, x.sum(0)), [(6,)], [X]),
    "mv": (lambda w, x: torch.mv(x, w), [(6,)], [X]),
    "kron": (lambda w, v, x: x @ torch.kron(w, v), [(2, 3), (3, 2)], [X]),
    "kron of other ranks, with axes of one": (lambda w, v, x: torch.kron(w, v) * x.sum(), [(3,), (4, 1, 2)], [X]),
    "kron with a batch": (lambda w, x: torch.kron(x, w), [(2, 3)], [X]),
    "outer": (lambda w, x: torch.outer(x.sum(1), w), [(3,)], [X]),
    "inner": (lambda w, x: torch.inner(x, w), [(3, 6)], [X]),
    "inner of three modes": (lambda w, x: torch.inner(x, w), [(2, 3, 6)], [X]),
    "addmm": (lambda b, w, x: torch.addmm(b, x, w, beta=0.5, alpha=-2), [(3,), (6, 3)], [X]),
    "baddbmm": (lambda b, w, x: torch.baddbmm(b, x, w, beta=2, alpha=0.25), [(2, 1, 3), (2, 6, 3)], [rand(2, 5, 6)]),
    "addmv": (lambda b, w, x: torch.addmv(b, x, w, beta=3, alpha=2), [(1,), (6,)], [X]),
    "addbmm": (lambda b, w, x: torch.addbmm(b, x, w, beta=3), [(5, 3), (2, 6, 3)], [rand(2, 5, 6)]),
    "bilinear": (lambda w, b, x, y: F.bilinear(x, y, w, b), [(3, 6, 2), (3,)], [X, rand(4, 2)]),
    "bilinear on three modes": (lambda w, x, y: F.bilinear(x, y, w), [(3, 6, 2)], [rand(4, 5, 6), rand(4, 5, 2)]),
    "tensordot": (lambda w, x: torch.tensordot(x, w, ([2, 1], [0, -1])), [(2, 7, 3)], [rand(4, 3, 2)]),
    "tensordot of one mode": (lambda w, x: torch.tensordot(x, w, 1), [(6, 2, 3)], [X]),
    "tensordot of no mode": (lambda w, x: torch.tensordot(x, w, 0), [(2, 3)], [X]),
    "einsum": (lambda w, x: torch.einsum("bi,oi->bo", x, w), [(3, 6)], [X]),
    "einsum of four": (
        lambda u, v, w, x: torch.einsum("bijk,irs,jst,ktr->b", x, u, v, w),
        [(2, 3, 4), (3, 4, 2), (4, 2, 3)],
        [rand(5, 2, 3, 4)],
    ),
    "einsum without an arrow": (lambda w, x: torch.einsum("zb,aZz", w, x), [(3, 6)], [rand(4, 5, 3)]),
    "einsum with dots": (lambda w, x: torch.einsum("...i,oi->...o", x, w), [(3, 6)], [rand(4, 5, 6)]),
    "einsum with broadcast dots": (lambda w, x: torch.einsum("a...i,...ji", x, w), [(5, 3, 6)], [rand(4, 1, 6)]),
    "einsum hyperedge": (lambda u, v, x: torch.einsum("bij,ir,jr->br", x, u, v), [(3, 2), (4, 2)], [rand(5, 3, 4)]),
    "einsum diagonal": (lambda w, x: torch.einsum("bii,i->bi", x, w), [(3,)], [rand(4, 3, 3)]),
    "einsum trace": (lambda w, x: torch.einsum("bii,o->bo", x, w), [(2,)], [rand(4, 3, 3)]),
    "multi_dot": (lambda u, v, x: torch.linalg.multi_dot([x, u, v]), [(6, 2), (2, 5)], [X]),
    "multi_dot of vectors": (lambda u, v, x: torch.linalg.multi_dot([u, x, v]), [(4,), (6,)], [X]),
    "mul": (lambda w, x: x * w, [(6,)], [X]),
    "mul broadcast": (lambda w, x: x[:, None] * w, [(5, 1)], [X]),
    "mul by a number": (lambda x: 3 * x, [], [X]),
    "div": (lambda w, x: x / w, [(6,)], [X]),
    "div by a number": (lambda x: x / 8, [], [X]),
    "neg": (operator.neg, [], [X]),
    "addcmul": (lambda b, w, x: torch.addcmul(b, x, w, value=-2), [(6,), (1, 6)], [X]),
    "add": (lambda w, x: torch.add(x, w, alpha=-3), [(6,)], [X]),
    "add of inputs": (operator.add, [], [X, rand(1, 6)]),
    "add a number": (lambda x: x + 2, [], [X]),
    "sub": (lambda w, x: torch.sub(w, x, alpha=4), [(6,)], [X]),
    "rsub": (lambda x: 1 - x, [], [X]),
    "rsub of tensors": (lambda w, x: torch.rsub(x, w, alpha=3), [(6,)], [X]),
    "sum": (lambda x: x.sum(), [], [X]),
    "sum of modes": (lambda x: x.sum((-1, 1)), [], [rand(4, 5, 3)]),
    "sum, kept": (lambda x: x.sum(1, keepdim=True), [], [rand(4, 5, 3)]),
    "mean": (lambda x: x.mean(1), [], [X]),
    "view": (lambda x: x.view(-1, 2, 3), [], [X]),
    "reshape": (lambda x: x.reshape(x.shape[0], 3, 2), [], [X]),
    "flatten": (lambda x: x.flatten(1), [], [rand(4, 2, 3)]),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), [], [X]),
    "colon and None": (lambda x: x[:, None] * 2, [], [X]),
    "view that regroups": (lambda x: x.view(-1, 6, 2), [], [rand(4, 3, 4)]),
    "squeeze": (lambda x: x.squeeze(1), [], [rand(4, 1, 6)]),
    "unsqueeze": (lambda x: x.unsqueeze(-1), [], [X]),
    "clone": (lambda x: x.clone(), [], [X]),
    "contiguous": (lambda x: x.mT.contiguous(), [], [X]),
    "permute": (lambda x: x.permute(2, 0, -2), [], [rand(4, 5, 3)]),
    "transpose": (lambda x: x.transpose(-1, 1), [], [rand(4, 5, 2, 3)]),
    "t": (lambda x: x.t(), [], [X]),
    "mT": (lambda x: x.mT, [], [rand(4, 5, 3)]),
    "adjoint": (lambda x: x.adjoint(), [], [rand(4, 5, 3)]),
    "movedim": (lambda x: x.movedim((0, -1), (2, 0)), [], [rand(4, 5, 3, 2)]),
    "expand": (lambda x: x[:, None].expand(-1, 5, -1), [], [X]),
    "expand to more modes": (lambda w, x: w.expand(5, 2, 6) * x.sum(), [(2, 1)], [X]),
    "broadcast_to": (lambda x: torch.broadcast_to(x.sum(0), (2, 6)), [], [X]),
    "slice of a whole mode": (lambda x: torch.ops.aten.slice(x, 1, 0, 99), [], [X]),
    "diagonal": (lambda x: x.diagonal(dim1=1, dim2=-1), [], [rand(4, 3, 2, 3)]),
    "conv1d": (lambda w, b, x: F.conv1d(x, w, b), [(3, 6, 1), (3,)], [rand(4, 6, 5)]),
    "conv2d": (lambda w, b, x: F.conv2d(x, w, b), [(3, 6, 1, 1), (3,)], [rand(4, 6, 5, 2)]),
    "conv2d, same": (lambda w, x: F.conv2d(x, w, padding="same"), [(3, 6, 1, 1)], [rand(4, 6, 5, 2)]),
    "conv2d of no batch": (lambda w, x: F.conv2d(x[None], w)[0].sum(), [(3, 4, 1, 1)], [rand(4, 5, 2)]),
    "dropout in inference": (lambda x: F.dropout(x, 0.5, training=False), [], [X]),
    "scale of 1/sqrt(d)": (lambda w, x: (x @ w) * 6**-0.5, [(6, 6)], [X]),
}


@functools.cache
def imported(name: str) -> tuple[Function, TracedModel]:
    function, shapes, inputs = MULTILINEAR[name]
    module = Function(function, *shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fixes the batch")  # addbmm sums over it
        return module, import_module(module, *inputs)


def operations(name: str) -> set[str]:
    """The operations of a case that are to be networks. A batch of fixed size is traced ten times as fast."""
    function, shapes, inputs = MULTILINEAR[name]
    with whole_einsums():
        graph = torch.export.export(Function(function, *shapes), tuple(inputs)).graph
    return {operator_name(n) for n in graph.nodes if n.op == "call_function"} & {*multilinear.TRANSLATORS}


@pytest.mark.parametrize("name", MULTILINEAR)
def test_a_multilinear_operation_is_a_network(name: str) -> None:
    module, traced = imported(name)
    inputs = MULTILINEAR[name][2]
    assert targets(traced.program) == set()
    assert traced.program.networks
    assert_same_as_torch(module, traced, *inputs)
    assert ir_text.dump(ir_text.parse(str(traced.program), traced.program.arrays)) == str(traced.program)


@pytest.mark.parametrize("name", ["linear with bias", "einsum hyperedge", "view", "conv2d", "mean", "bilinear"])
def test_a_network_holds_at_other_batch_sizes(name: str) -> None:
    module, traced = imported(name)
    assert {v.shape[0] for v in traced.program.inputs if v.shape} == {"batch"}
    for batch in (2, 7):
        assert_same_as_torch(module, traced, *(rand(batch, *x.shape[1:], seed=9) for x in MULTILINEAR[name][2]))


def test_every_translator_has_a_case() -> None:
    """By the operations in the traced graphs of the cases above."""
    used = {multilinear.TRANSLATORS[name].__name__ for case in MULTILINEAR for name in operations(case)}
    # these are not in graphs of every version of torch
    used |= {"_batch_norm", "_convolution", "_dropout", "_movedim", "_to"}
    assert used == {f.__name__ for f in multilinear.TRANSLATORS.values()}


def test_translators_are_named_after_operations_that_torch_has() -> None:
    missing = [n for n in multilinear.TRANSLATORS if not hasattr(torch.ops.aten, n.removeprefix("aten."))]
    # attributes that are operations only where the dtype or the layout asks for it
    assert {*missing} <= {"aten.linalg_multi_dot"}, missing


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_batch_norm_in_inference_is_a_scale_and_a_shift(kind: str, affine: bool) -> None:
    module: Any = getattr(nn, kind)(3, affine=affine, eps=0.1).double()
    with torch.no_grad():
        for number, tensor in enumerate(module.state_dict().values()):
            if tensor.is_floating_point():
                tensor.copy_(rand(3, seed=number).abs() + 0.5)
    module.eval()
    x = rand(4, 3, *[5, 2, 3][: int(kind[-2])])
    traced = import_module(module, x)
    network = next(n for n in traced.program.networks if n.output.name == traced.program.outputs[0][1])
    assert sorted(len(t.tensors) for t in network.terms) == [1, 2]
    assert {t.data.shape for t in network.cores if t.data is not None} == {(3,)}
    assert_same_as_torch(module, traced, x)


# ------------------------------------------------------------------------ what stays opaque

OPAQUE: dict[str, tuple[Forward, list[tuple[int, ...]], list[torch.Tensor], str]] = {
    "relu": (torch.relu, [], [X], "aten.relu"),
    "softmax": (lambda x: x.softmax(-1), [], [X], "aten.softmax"),
    "division by a value": (lambda x, y: x / y, [], [X, X.abs() + 1], "aten.div"),
    "a number divided": (lambda x: 1 / x, [], [X.abs() + 1], "aten.reciprocal"),
    "floor division": (lambda x: torch.div(x, 2, rounding_mode="floor"), [], [X], "aten.div"),
    "power": (lambda x: x**2, [], [X], "aten.pow"),
    "maximum": (lambda w, x: torch.maximum(x, w), [(6,)], [X], "aten.maximum"),
    "off-diagonal": (lambda x: x.diagonal(1, 1, 2) * 2, [], [rand(4, 3, 3)], "aten.diagonal"),
    "diagonal of a rectangle": (lambda x: x.diagonal(0, 1, 2) * 2, [], [rand(4, 3, 5)], "aten.diagonal"),
    "convolution with a window": (lambda w, x: F.conv1d(x, w), [(3, 6, 2)], [rand(4, 6, 5)], "aten.conv1d"),
    "convolution with a stride": (lambda w, x: F.conv1d(x, w, stride=2), [(3, 6, 1)], [rand(4, 6, 5)], "aten.conv1d"),
    "convolution with padding": (lambda w, x: F.conv1d(x, w, padding=1), [(3, 6, 1)], [rand(4, 6, 5)], "aten.conv1d"),
    "convolution without a batch": (lambda w, x: F.conv1d(x, w), [(3, 4, 1)], [rand(4, 5)], "aten.conv1d"),
    "slice": (lambda x: x[:, 1:3] * 2, [], [X], "aten.slice"),
    "concatenation": (lambda x: torch.cat([x, 2 * x], 1), [], [X], "aten.cat"),
    "mean over the batch": (lambda x: x.mean(0), [], [X], "aten.mean"),
    "sum in another dtype": (lambda x: x.sum(1, dtype=torch.float32), [], [X], "aten.sum"),
    "cumulative sum": (lambda x: x.cumsum(1), [], [X], "aten.cumsum"),
    "layer norm": (lambda w, x: F.layer_norm(x, (6,), w), [(6,)], [X], "aten.layer_norm"),
    "a view that does not nest": (lambda x: x.view(-1, 2, 3) * 1, [], [rand(4, 3, 2)[:, :, :]], ""),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_multilinear_stays_opaque(name: str) -> None:
    function, shapes, inputs, target = OPAQUE[name]
    module = Function(function, *shapes)
    traced = import_module(module, *inputs)
    if target:
        assert target in targets(traced.program)
    assert_same_as_torch(module, traced, *inputs)


def test_an_opaque_node_keeps_its_arguments() -> None:
    traced = import_module(Function(lambda x: torch.clamp(x, -0.5, max=0.25).softmax(dim=1)), X)
    clamp, softmax = traced.program.nodes
    assert isinstance(clamp, Opaque) and isinstance(softmax, Opaque)
    assert (clamp.target, clamp.args) == ("aten.clamp.default", (Ref("inputs_0"), -0.5, 0.25))
    assert (softmax.target, softmax.args[1:]) == ("aten.softmax.int", (1,))
    assert (softmax.output.dtype, softmax.output.shape) == ("float64", ("batch", 6))


def test_views_that_do_not_nest_stay_right() -> None:
    """(4, 6) -> (6, 4) -> transpose: no common refinement of the sizes exists by divisors alone."""
    module = Function(lambda x: x.reshape(6, 4).t().reshape(3, 8) * 2)
    traced = import_module(module, X, dynamic=None)
    assert_same_as_torch(module, traced, X)


def test_mixed_dtypes_are_not_a_network() -> None:
    module = Function(lambda w, x: x.float().double() * w, (6,))
    traced = import_module(module, X)
    assert targets(traced.program) & {"aten.to", "aten._to_copy"}
    assert_same_as_torch(module, traced, X)


# ------------------------------------------------------------------------ structure


def test_an_einsum_is_kept_whole() -> None:
    """With opt_einsum installed, too: all four operands are tensors of one term, and the batch is dynamic."""
    pytest.importorskip("opt_einsum")
    assert torch.backends.opt_einsum.enabled
    equation = "nabc,aid,dbje,eck->nijk"
    module = Function(lambda *t: torch.einsum(equation, t[-1], *t[:-1]), (2, 5, 3), (3, 3, 4, 3), (3, 4, 2))
    traced = import_module(module, rand(6, 2, 3, 4))
    (network,) = traced.program.networks
    (term,) = network.terms
    assert [t.name for t in term.tensors] == ["args_0", "function_weights_0"] or len(term.tensors) == 4
    assert [len(t.indices) for t in term.tensors] == [4, 3, 4, 3]
    assert network.output.shape == ("batch", 5, 4, 2)
    assert torch.backends.opt_einsum.enabled, "tracing left opt_einsum off"


def test_the_batch_is_called_batch_and_other_modes_keep_their_names() -> None:
    module = Function(lambda w, x, y: (x @ w) + y, (6, 3))
    shapes = {"inputs": ({0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}, {1: torch.export.Dim("length")})}
    traced = import_module(module, rand(4, 5, 6), rand(1, 5, 3), dynamic=shapes)
    x, y = traced.program.inputs
    assert x.shape is not None and y.shape is not None
    length = x.shape[1]
    assert x.shape == ("batch", length, 6) and y.shape == (1, length, 3)
    assert isinstance(length, str) and length not in ("batch", "5")
    assert dict(traced.sizes) == {"batch": 4, length: 5}
    names = {i.name for n in traced.program.networks for i in n.indices.values()}
    assert {"batch", length} <= names
    assert_same_as_torch(module, traced, rand(2, 9, 6), rand(1, 9, 3))


def test_a_dynamic_mode_that_is_not_the_first_is_not_the_batch() -> None:
    module = Function(lambda w, x: x @ w, (6, 3))
    traced = import_module(module, rand(4, 5, 6), dynamic={"inputs": ({1: torch.export.Dim("length")},)})
    (x,) = traced.program.inputs
    assert x.shape is not None and x.shape[0] == 4 and isinstance(x.shape[1], str) and x.shape[1] != "batch"


def test_no_dynamic_shapes_fixes_them() -> None:
    traced = import_module(Function(lambda x: x * 2), X, dynamic=None)
    assert [v.shape for v in traced.program.inputs] == [(4, 6)]
    assert traced.sizes == {}


def test_a_batch_that_a_model_fixes_is_told() -> None:
    with pytest.warns(UserWarning, match="fixes the batch"):
        traced = import_module(Function(lambda w, x: x + w, (4, 6)), X)
    assert [v.shape for v in traced.program.inputs] == [(4, 6)]


def test_a_fixed_batch_of_one_is_one() -> None:
    with pytest.warns(UserWarning, match="fixes the batch"):
        traced = import_module(Function(lambda x: torch.cat([row[None] for row in x])), X[:1])
    assert [v.shape for v in traced.program.inputs] == [(1, 6)]


def test_a_derived_size_is_an_expression_of_the_batch() -> None:
    module = Function(lambda x: torch.relu(x.reshape(-1, 3)))
    traced = import_module(module, X)
    (relu,) = (n for n in traced.program.nodes if isinstance(n, Opaque))
    assert relu.output.shape == ("2*batch", 3)
    assert_same_as_torch(module, traced, rand(7, 6))


# ------------------------------------------------------------------------ weights


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.block = nn.Sequential(nn.Linear(5, 5, dtype=torch.float64), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.block(x) * 2  # the line that the scale points to


def test_sources_point_to_the_line_in_this_file() -> None:
    lines, start = inspect.getsourcelines(Layers)
    traced = import_module(Layers(), X)
    places = {n.source.module: n.source for n in traced.program.nodes}
    wanted = {"first": "x = self.first(x)", "block.0": "return self.block(x)", "block.1": "return self.block(x)"}
    for module, code in wanted.items():
        source = places[module]
        assert source.file == __file__
        assert source.line == start + next(k for k, line in enumerate(lines) if code in line)
        assert code in source.code
        assert f"{module}, {__file__}:{source.line}" == str(source)
    scale = traced.program.nodes[-1]
    assert scale.source.file == __file__ and "the line that" in lines[scale.source.line - start]


def test_networks_and_cores_are_named_after_their_modules() -> None:
    traced = import_module(Layers(), X)
    named = [n for n in traced.program.networks if n.name]
    assert [n.name for n in named] == ["first", "block.0"]
    assert [[t.name for t in n.cores] for n in named] == [
        ["first.weight", "first.bias"],
        ["block.0.weight", "block.0.bias"],
    ]
    opaque = [n for n in traced.program.nodes if isinstance(n, Opaque)]
    assert [(n.name, n.target) for n in opaque] == [("block.1", "aten.tanh.default")]


def test_an_opaque_computation_of_weights_is_evaluated() -> None:
    module = Function(lambda w, x: x @ torch.softmax(torch.exp(w), 0), (6, 3))
    traced = import_module(module, X)
    (network,) = traced.program.nodes
    assert isinstance(network, Network)
    (core,) = network.cores
    expected = torch.softmax(torch.exp(module.weights[0].detach()), 0).numpy()
    assert_close(np.asarray(core.data), expected, tolerance=0.0)
    assert traced.program.weights == {}


def test_a_network_of_weights_stays_cores() -> None:
    """A low-rank product is not multiplied out by the import: the search is to choose."""
    module = Function(lambda u, v, x: x @ (u @ v), (6, 2), (2, 5))
    traced = import_module(module, X)
    assert targets(traced.program) == set()
    shapes = sorted(t.data.shape for n in traced.program.networks for t in n.cores if t.data is not None)
    assert shapes == [(2, 5), (6, 2)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        self.decode = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.encode(x)) + self.decode(x)


def test_tied_parameters_stay_one_weight() -> None:
    traced = import_module(Tied(), X)
    cores = [t for n in traced.program.networks for t in n.cores if t.data is not None and t.data.shape == (3, 6)]
    assert len(cores) == 2
    assert len({t.name for t in cores}) == 1 and cores[0].data is cores[1].data
    module = Tied()
    assert_same_as_torch(module, import_module(module, X), X)


def test_equal_but_separate_parameters_stay_two() -> None:
    module = Tied()
    module.decode.weight = nn.Parameter(module.encode.weight.detach().clone())
    traced = import_module(module, X)
    names = {t.name for n in traced.program.networks for t in n.cores}
    assert names == {"encode.weight", "decode.weight"}


def test_a_weight_that_an_opaque_node_reads_is_a_weight_of_the_program() -> None:
    module = Function(lambda w, x: torch.maximum(x, w) @ w, (6, 6))
    traced = import_module(module, rand(6, 6), dynamic=None)
    assert list(traced.program.weights) == ["weights.0"]
    (core,) = (t for n in traced.program.networks for t in n.cores)
    assert core.data is traced.program.weights["weights.0"]


def test_outputs_have_the_names_of_the_model() -> None:
    cases: list[tuple[Forward, list[str]]] = [
        (lambda x: x * 2, ["output"]),
        (lambda x: (x * 2, x + 1), ["output_0", "output_1"]),
        (lambda x: {"logits": x * 2, "hidden": x}, ["logits", "hidden"]),
    ]
    for function, names in cases:
        module = Function(function)
        traced = import_module(module, X)
        assert [public for public, _ in traced.program.outputs] == names
        assert_same_as_torch(module, traced, X)


def test_a_weight_may_be_an_output() -> None:
    module = Function(lambda w, x: (x @ w, w), (6, 3))
    assert_same_as_torch(module, import_module(module, X), X)


# ------------------------------------------------------------------------ refusals


def test_a_model_that_writes_its_buffers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).train()
    with pytest.raises(UnsupportedError, match=r"writes to .*1\.running_mean.*model\.eval\(\)"):
        import_exported(trace(model, (torch.randn(4, 6),)))
    import_exported(trace(model.eval(), (torch.randn(4, 6),)))


def test_a_model_that_cannot_be_traced_is_refused_with_its_name() -> None:
    module = Function(lambda x: x if float(x.sum()) > 0 else -x)
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace Function: "):
        trace(module, (X,))


def test_the_import_leaves_the_model_and_its_inputs_alone() -> None:
    module, x = Layers(), rand(4, 6)
    state, training = {k: v.clone() for k, v in module.state_dict().items()}, module.training
    before = x.clone()
    import_module(module, x)
    assert module.training == training
    assert torch.equal(x, before) and not [a for a in vars(x) if "dynamo" in a]
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])


def test_errors_of_the_package_have_one_base() -> None:
    errors = importlib.import_module("tncompile.errors")
    tree = ast.parse(inspect.getsource(errors))
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Error")]
    assert len(classes) > 5
    assert all(issubclass(getattr(errors, name), TNCompileError) for name in classes)


class EachRow(torch.nn.Module):
    """A layer for one row, and `torch.vmap` for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.randn(6, 5)), torch.nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: torch.tanh(row @ self.first) @ self.second)(x)


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_file_of_a_model_with_vmap(by_torch: bool, tmp_path: Path) -> None:
    module, x, path = EachRow().eval(), torch.randn(3, 6), tmp_path / "model.pt2"
    if by_torch:
        torch.export.save(torch.export.export(module, (x,)), path)
    else:
        tncompile.save(module, (x,), path)
    compiled = tncompile.compile_file(path)
    torch.testing.assert_close(torch.from_numpy(compiled.run(x)), module(x).detach(), rtol=1e-5, atol=1e-6)
