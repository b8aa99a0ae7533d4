"""Weights that a node has to have whole: recurrent layers, tables of ONNX models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tests.helpers import assert_close, operators
from tests.tensorize.replaced import low_rank
from tncompile.compiler import compile_exported
from tncompile.frontend.importer import import_exported
from tncompile.frontend.onnx.importer import import_onnx
from tncompile.frontend.trace import trace
from tncompile.ir import Array
from tncompile.runtime.session import Session
from tncompile.tensorizer.data import collect
from tncompile.tensorizer.moments import moments
from tncompile.tensorizer.realize import substituted
from tncompile.tensorizer.run import OURS
from tncompile.tensorizer.runner import Runner
from tncompile.tensorizer.sites import composed, sites_of


class Recurrent(nn.Module):
    """All steps of a recurrent layer whose weights are near low rank, and a layer after them."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, sizes: tuple[int, int] = (24, 16), **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = kind(*sizes, batch_first=True, **options)
        for weight in self.cell.parameters():
            if weight.ndim == 2:
                u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
                weight.data = (u * (4 * s * 0.6 ** torch.arange(len(s)))) @ v
        self.head = nn.Linear(sizes[1] * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.cell(x)[0]))  # type: ignore[no-any-return]


KINDS: list[tuple[type[nn.RNNBase], dict[str, Any], str]] = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "sizes": (64, 60)}, "LSTM"),
    (nn.GRU, {"sizes": (64, 60)}, "GRU"),
]


@pytest.mark.parametrize(("kind", "options", "operator"), KINDS, ids=["lstm", "gru"])
def test_cores_of_a_cell_are_contracted_at_load(kind: type[nn.RNNBase], options: dict[str, Any], operator: str) -> None:
    module = Recurrent(kind, **options).eval()
    exported = trace(module, (torch.randn(3, 7, 64),), None, "batch")
    sites = [s for s in sites_of(composed(import_exported(exported)), 200) if "cell" in s.name]
    matrices = {f"cell.{name}": w for name, w in module.cell.named_parameters() if w.ndim == 2}
    assert {site.name for site in sites} == {*matrices}
    replaced = [low_rank(site, 3) for site in sites]
    small = compile_exported(substituted(exported, replaced), store="cores")
    dense = compile_exported(exported)
    assert operators(small.onnx).count(operator) == operators(dense.onnx).count(operator) > 0
    held = {tensor.name: tuple(tensor.dims) for tensor in onnx.load_from_string(small.onnx).graph.initializer}
    assert all(f"{name}.core_{k}" in held for name in matrices for k in range(2))
    assert not {tuple(matrices[name].shape) for name in matrices} & {*held.values()}
    for one in replaced:
        for name, array in one.dense().items():
            matrices[name].data = torch.from_numpy(array)
    x = torch.randn(5, 7, 64)
    with torch.no_grad():
        expected = module.double()(x.double()).numpy()
    assert_close(small.run(x), expected, tolerance=1e-5)


def test_moments_are_those_of_what_a_cell_reads() -> None:
    module = Recurrent(nn.GRU, (64, 60), bidirectional=True).eval()
    x = torch.randn(6, 5, 64)
    model = import_exported(trace(module, (x,), None, "batch"))
    found = moments(sites_of(composed(model), 100), Runner(model), collect(x, model))
    rows = x.reshape(-1, 64).double().numpy()
    states = module.cell(x)[0].detach().reshape(-1, 60).double().numpy()  # of both directions
    for name, seen in (("weight_ih_l0", rows), ("weight_ih_l0_reverse", rows), ("weight_hh_l0", states)):
        (matrix,) = found[f"cell.{name}"].factors
        np.testing.assert_allclose(matrix, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)


def onnx_model(rng: np.random.Generator) -> onnx.ModelProto:
    """Rows of a table into a cell of two directions."""

    def near_low_rank(*shape: int) -> Array:
        u, s, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
        return ((u * (s * 0.6 ** np.arange(s.shape[-1]))[..., None, :]) @ v).astype(np.float32)

    weights = {"table": near_low_rank(120, 48), "w": near_low_rank(2, 96, 48), "r": near_low_rank(2, 96, 32)}
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["rows"]),
        onnx.helper.make_node("GRU", ["rows", "w", "r"], ["y"], hidden_size=32, direction="bidirectional"),
        onnx.helper.make_node("Relu", ["y"], ["z"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "cell",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [5, "batch"])],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_cells_and_tables_of_onnx_models() -> None:
    proto = onnx_model(np.random.default_rng(0))
    source = import_onnx(proto.SerializeToString())
    sites = {site.name: site for site in sites_of(composed(source), 100)}
    assert {name: (s.in_sizes, s.out_sizes) for name, s in sites.items()} == {
        "table": ((120,), (48,)),
        "w": ((48,), (2, 96)),
        "r": ((32,), (2, 96)),
    }
    ids = np.random.default_rng(1).integers(0, 120, (5, 8))
    seen = moments(sites.values(), Runner(source), collect({"ids": ids}, source))
    table = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    (matrix,) = seen["w"].factors
    np.testing.assert_allclose(matrix, np.einsum("bti,btj->ij", table[ids], table[ids]) / ids.size, rtol=1e-4)
    replaced = [low_rank(site, 6) for site in sites.values()]
    small = compile_exported(substituted(source, replaced), store="cores")
    held = [tuple(tensor.dims) for tensor in onnx.load_from_string(small.onnx).graph.initializer]
    assert not {(120, 48), (2, 96, 48), (2, 96, 32)} & {*held}
    dense = {name: array for one in replaced for name, array in one.dense().items()}
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(dense[tensor.name], tensor.name))
    expected = compile_exported(import_onnx(proto.SerializeToString()), store="folded").run(ids)
    assert_close(small.run(ids), expected, tolerance=1e-5)


def test_a_recurrent_model_gets_smaller_within_the_error() -> None:
    module = Recurrent(nn.LSTM, (64, 60), bidirectional=True).eval()
    x = torch.randn(48, 6, 64)
    made = tncompile.tensorize(module, x, max_error=0.1, prefer="size", bits=("fp32",), formats=("svd",), threads=1)
    assert made.report.chosen == OURS
    kept = {w.name: w.kept for w in made.report.weights}
    assert all("r1=" in kept[f"cell.weight_{name}"] for name in ("ih_l0", "ih_l0_reverse"))
    (found,) = Session(made.onnx).run({"x": x.numpy()}).values()
    with torch.no_grad():
        expected = module.double()(x.double()).numpy()
    assert np.linalg.norm(found - expected) < 0.12 * np.linalg.norm(expected)
