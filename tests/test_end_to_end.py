"""Whole models, from torch to ONNX Runtime, compared with eager PyTorch in float64 at several batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tncompile
from tests.helpers import assert_close, assert_plain, nodes_of, operators, session_of
from tncompile.compiler import CompiledModel
from tncompile.errors import OutputError, TNCompileError
from tncompile.ir import Array, Network, Opaque, verify

tltorch = pytest.importorskip("tltorch")

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-3}
"""Of the largest number of an output: a few roundings of the dtype, for sums of a few dozen numbers."""

BATCHES = (1, 3, 8)
EXAMPLE = 4
"""The batch of the example that models are traced with; none of those they are compared at."""


def compiled_of(module: nn.Module, *inputs: Any, **options: Any) -> CompiledModel:
    torch.manual_seed(0)
    return tncompile.compile(module.eval(), inputs, batch=options.pop("batch", (1, 8)), **options)


def compare(module: nn.Module, compiled: CompiledModel, *inputs: torch.Tensor) -> None:
    """One run of the file's bytes in ONNX Runtime, against eager PyTorch in float64."""
    session = session_of(compiled.onnx)
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    found = session.run(None, feeds)
    with torch.no_grad():
        wide = copy.deepcopy(module).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    expected = torch.utils._pytree.tree_leaves(wide)
    dtype = next((p.dtype for p in module.parameters()), inputs[0].dtype)
    for output, a, b in zip(session.get_outputs(), found, expected, strict=True):
        assert a.dtype == np.dtype(str(dtype).removeprefix("torch."))
        assert_close(a, b.detach().numpy(), tolerance=TOLERANCE[dtype], what=f"{output.name} at {inputs[0].shape}")


def check_model(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> CompiledModel:
    """Compile a model of a dynamic batch, and compare at several batch sizes; the shapes are those of one sample."""

    def inputs(batch: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return [torch.randn((batch, *shape), generator=generator).to(dtype) for shape in shapes]

    compiled = compiled_of(module, *inputs(EXAMPLE))
    assert_plain(compiled.onnx)
    verify(compiled.program, "scheduled")
    assert all(v.shape and v.shape[0] == "batch" for v in compiled.program.inputs)
    for batch in BATCHES:
        compare(module, compiled, *inputs(batch))
    assert compiled.report.check is not None and compiled.report.check.passed
    return compiled


def core_shapes(compiled: CompiledModel, stage: str = "fold") -> list[list[tuple[int, ...]]]:
    """Sizes above 1 of the cores of each network, sorted: what it consists of, whatever the order."""
    networks = compiled.stages[stage].networks
    return [sorted(tuple(n for n in t.data.shape if n > 1) for t in w.cores if t.data is not None) for w in networks]


def initializers(compiled: CompiledModel) -> dict[str, Array]:
    graph = onnx.load_model_from_string(compiled.onnx).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def randomized(module: nn.Module) -> nn.Module:
    """BatchNorm with statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(5)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in layer.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


# ------------------------------------------------------------------------ tensorly-torch


def factorized_linear(factorization: str, implementation: str) -> nn.Module:
    torch.manual_seed(1)
    return tltorch.FactorizedLinear(
        (2, 3, 4), (3, 2, 2), factorization=factorization, rank=3, implementation=implementation
    )


@pytest.mark.parametrize("factorization", ["blocktt", "tucker", "cp"])
def test_factorized_linear(factorization: str) -> None:
    """Both forms of the same weights: right, and the same network."""
    shapes = []
    for implementation in ("factorized", "reconstructed"):
        module = factorized_linear(factorization, implementation)
        compiled = check_model(module, (24,))
        assert len(compiled.program.networks) == len(compiled.program.nodes) == 1
        shapes.append(core_shapes(compiled))
    assert shapes[0] == shapes[1]
    factors = sorted(tuple(n for n in p.shape if n > 1) for k, p in module.named_parameters() if k != "weight.weights")
    assert shapes[0] == [factors], "the network does not consist of the layer's own factors"


@pytest.mark.parametrize(
    ("factorization", "implementation"), [("cp", "factorized"), ("tucker", "factorized"), ("cp", "reconstructed")]
)
def test_factorized_convolution(factorization: str, implementation: str) -> None:
    torch.manual_seed(1)
    module = tltorch.FactorizedConv(
        4, 5, 3, order=2, padding=1, bias=True, factorization=factorization, rank=0.5, implementation=implementation
    )
    module.weight.normal_(0, 0.5)
    nn.init.normal_(module.bias)  # left as it was in memory by the layer
    compiled = check_model(module, (4, 40, 36))
    assert "Conv" in operators(compiled.onnx)


@pytest.mark.parametrize("factorization", ["tucker", "cp"])
def test_tensor_regression_layer(factorization: str) -> None:
    torch.manual_seed(1)
    module = tltorch.TRL((3, 4, 2), (5,), bias=True, factorization=factorization, rank=2)
    nn.init.normal_(module.bias)
    module.weight.normal_(0, 0.5)
    compiled = check_model(module, (3, 4, 2))
    assert len(compiled.program.networks) == len(compiled.program.nodes) == 1


def test_tensor_contraction_layer() -> None:
    torch.manual_seed(1)
    compiled = check_model(tltorch.TCL((3, 4, 5), (2, 3, 2)), (3, 4, 5))
    assert len(compiled.program.networks) == len(compiled.program.nodes) == 1


# ------------------------------------------------------------------------ hand-written layers


class TTLinear(nn.Module):
    """24 -> 12 as three cores and one einsum."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        shapes = [(2, 3, rank), (rank, 3, 2, rank), (rank, 4, 2)]
        self.cores = nn.ParameterList([nn.Parameter(torch.randn(s) / 2) for s in shapes])
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("nabc,aid,dbje,eck->nijk", x.reshape(-1, 2, 3, 4), *self.cores)
        return y.reshape(-1, 12) + self.bias


class Model(nn.Module):
    """Some layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1)
    return m.out((weights @ v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "hand-written TT": (TTLinear, [(24,)]),
    "pointwise convolution and BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)),
        [(3, 4, 5)],
    ),
    "attention": (
        lambda: Model(attention, q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6), out=nn.Linear(6, 6)),
        [(5, 6)],
    ),
    "bilinear": (lambda: Model(lambda m, x, y: m.bilinear(x, y), bilinear=nn.Bilinear(5, 4, 3)), [(5,), (4,)]),
    "diagonal": (lambda: Model(lambda m, x: m.scale(x.diagonal(dim1=1, dim2=2)), scale=Scale(4)), [(4, 4)]),
    "expand": (lambda: Model(lambda m, x: m.fc(x).unsqueeze(1).expand(-1, 4, -1), fc=nn.Linear(3, 2)), [(3,)]),
    "mean and sum": (
        lambda: Model(lambda m, x: m.fc(x).mean(1) - x.sum((1, 2), keepdim=True).squeeze(-1), fc=nn.Linear(4, 2)),
        [(3, 4)],
    ),
    "outer product of inputs": (
        lambda: Model(lambda m, x, y: torch.relu(m.fc(torch.einsum("bi,bj->bij", x, y))), fc=nn.Linear(4, 2)),
        [(3,), (4,)],
    ),
    "low-rank adapter": (
        lambda: Model(
            lambda m, x: m.fc(x) + 0.5 * m.up(m.down(x)),
            fc=nn.Linear(7, 5),
            down=nn.Linear(7, 2, bias=False),
            up=nn.Linear(2, 5, bias=False),
        ),
        [(7,)],
    ),
    "values that are read twice": (
        lambda: Model(lambda m, x: m.a(x) * torch.sigmoid(m.a(x)) + x, a=nn.Linear(4, 4)),
        [(4,)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    make, shapes = MODELS[name]
    torch.manual_seed(2)
    check_model(randomized(make()), *shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(TTLinear(), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    compiled = check_model(model, (24,), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert {str(a.dtype) for a in initializers(compiled).values()} <= {name, "int64"}


# ------------------------------------------------------------------------ weights used twice


def test_tied_weights_are_stored_once() -> None:
    """An embedding and the projection that shares its weight; integer inputs."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 7)
            self.mix = nn.Linear(7, 7)
            self.head = nn.Linear(7, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.mix(self.embed(tokens))))

    model = Tied()
    generator = torch.Generator().manual_seed(0)
    compiled = compiled_of(model, torch.randint(0, 11, (EXAMPLE, 5), generator=generator))
    assert_plain(compiled.onnx)
    for batch in BATCHES:
        compare(model, compiled, torch.randint(0, 11, (batch, 5), generator=generator))
    large = [name for name, a in initializers(compiled).items() if a.size == 77]
    assert len(large) == 1, large


def test_a_module_used_twice_is_stored_once() -> None:
    model = Model(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(7, 7))
    compiled = check_model(model, (7,))
    assert [a.shape for a in initializers(compiled).values() if a.size == 49] == [(7, 7)]
    assert [n.name for n in compiled.program.networks] == ["fc", "fc"]
    names = [n.name for n in onnx.load_model_from_string(compiled.onnx).graph.node]
    assert len(names) == len({*names}), "node names are not unique"


# ------------------------------------------------------------------------ what ends in one network


def test_two_adjacent_tensorized_layers_are_one_network() -> None:
    torch.manual_seed(1)
    second = tltorch.FactorizedLinear((3, 2, 2), (2, 2, 2), factorization="blocktt", rank=2)
    compiled = check_model(nn.Sequential(factorized_linear("blocktt", "factorized"), second), (24,))
    (network,) = compiled.program.nodes
    assert isinstance(network, Network) and network.name == "0+1"
    first, last = (len(list(m.weight.factors)) for m in (factorized_linear("blocktt", "factorized"), second))
    moving = max(compiled.stages["fold"].networks[0].terms, key=lambda t: len(t.tensors))
    assert len(moving.cores) == first + last, "the cores of both layers are not in one term"


def test_an_activation_keeps_networks_apart() -> None:
    compiled = check_model(nn.Sequential(TTLinear(), nn.ReLU(), nn.Linear(12, 3)), (24,))
    assert [type(n) for n in compiled.program.nodes] == [Network, Opaque, Network]
    assert [n.name for n in compiled.program.nodes] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [
        (lambda: [nn.Linear(6, 5), nn.BatchNorm1d(5)], (6,), ["Gemm"]),
        (lambda: [nn.BatchNorm1d(6), nn.Linear(6, 5)], (6,), ["Gemm"]),
        (lambda: [nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)], (3, 4, 4), ["Conv"]),
        (lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)], (3, 40, 40), ["Conv"]),
    ],
    ids=["linear, norm", "norm, linear", "pointwise convolution, norm", "convolution, norm"],
)
def test_batch_norm_is_folded(layers: Callable[[], list[nn.Module]], shape: tuple[int, ...], expected: Any) -> None:
    torch.manual_seed(3)
    compiled = check_model(randomized(nn.Sequential(*layers())), shape)
    assert [n for n in operators(compiled.onnx) if n not in ("Reshape", "Transpose")] == expected


# ------------------------------------------------------------------------ interface


def interface(compiled: CompiledModel) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    session = session_of(compiled.onnx)
    return {i.name: i.shape for i in session.get_inputs()}, {o.name: o.shape for o in session.get_outputs()}


def test_names_of_inputs_and_of_dict_outputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.fc(tokens)
            return {"logits": torch.relu(hidden) * mask, "hidden": hidden, "mask": mask}

    model = Named()
    compiled = check_model(model, (5,), (3,))
    inputs, outputs = interface(compiled)
    assert inputs == {"tokens": ["batch", 5], "mask": ["batch", 3]}
    # ONNX has one name space: what is an input already carries a suffix
    assert outputs == {"logits": ["batch", 3], "hidden": ["batch", 3], "mask_out": ["batch", 3]}
    result = compiled.run(mask=np.ones((2, 3), np.float32), tokens=torch.ones(2, 5))
    assert isinstance(result, dict) and [*result] == ["logits", "hidden", "mask_out"]


def test_tuple_outputs_and_the_same_value_twice() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.fc(x)
        return y, y, m.fc.weight

    compiled = compiled_of(Model(function, fc=nn.Linear(5, 3)), torch.randn(EXAMPLE, 5))
    assert [*interface(compiled)[1]] == ["output_0", "output_1", "output_2"]
    a, b, weight = compiled.run(np.ones((2, 5), np.float32)).values()
    np.testing.assert_array_equal(a, b)
    assert weight.shape == (3, 5)


def test_several_inputs_by_position_keyword_and_star() -> None:
    class Star(nn.Module):
        def forward(self, *inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,bi,bi->b", *inputs, scale)

    x = torch.randn(EXAMPLE, 5)
    compiled = tncompile.compile(Star(), (x, x + 1), kwargs={"scale": x}, batch=4)
    assert [*interface(compiled)[0].values()] == [["batch", 5]] * 3
    a = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert_close(compiled.run(a, a, a), (a.astype(np.float64) ** 3).sum(1), tolerance=1e-6)


def test_dynamic_batch_and_sequence() -> None:
    torch.manual_seed(0)
    model = Model(attention, **{name: nn.Linear(6, 6) for name in ("q", "k", "v", "out")})
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}}
    compiled = compiled_of(model, torch.randn(EXAMPLE, 5, 6), dynamic_shapes=shapes)
    assert_plain(compiled.onnx)
    ((_, shape),) = interface(compiled)[0].items()
    assert shape[0] == "batch" and isinstance(shape[1], str) and shape[1] != "batch" and shape[2] == 6
    for batch, length in ((1, 2), (3, 7), (8, 5), (2, 11)):
        compare(model, compiled, torch.randn(batch, length, 6))


def test_dynamic_sequence_through_a_tensor_train() -> None:
    """The sequence's modes move past the batch's: shape arithmetic, where it is needed, is right."""
    torch.manual_seed(0)
    cores = nn.ParameterList([nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 4, 3))])

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsij,ipr,rjq->bpsq", x.unflatten(2, (2, 4)), *m.cores).transpose(0, 2)

    model = Model(function, cores=cores)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}}
    compiled = compiled_of(model, torch.randn(EXAMPLE, 5, 8), dynamic_shapes=shapes)
    assert_plain(compiled.onnx)
    for batch, length in ((2, 3), (7, 2), (3, 11)):
        compare(model, compiled, torch.randn(batch, length, 8))


def test_static_batch() -> None:
    model = TTLinear()
    compiled = compiled_of(model, torch.randn(EXAMPLE, 24), dynamic_shapes=None)
    assert_plain(compiled.onnx)
    assert [*interface(compiled)[0].values()] == [[EXAMPLE, 24]]
    compare(model, compiled, torch.randn(EXAMPLE, 24))


def test_a_batch_of_one_as_the_example_is_dynamic_too() -> None:
    compiled = compiled_of(nn.Linear(5, 3), torch.randn(1, 5))
    assert [*interface(compiled)[0].values()] == [["batch", 5]]


# ------------------------------------------------------------------------ the file


def metadata(node: onnx.NodeProto) -> Mapping[str, str]:
    return {p.key: p.value for p in node.metadata_props}


def test_nodes_say_which_layer_bonds_and_line_they_are_of() -> None:
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(TTLinear(), nn.ReLU()))
    model.add_module("head", nn.Linear(12, 3))
    compiled = check_model(model, (24,))
    nodes = list(nodes_of(onnx.load_model_from_string(compiled.onnx).graph))
    layers = {metadata(n).get("tncompile.layer") for n in nodes} - {None}
    assert layers == {"encoder.0", "head"}
    for node in nodes:
        layer = metadata(node).get("tncompile.layer")
        if layer is not None:
            assert node.name.startswith(f"{layer}/")
            file, _, line = metadata(node)["tncompile.source"].rpartition(":")
            assert file == __file__ or layer == "head"
            assert int(line) > 0
        assert metadata(node).keys() <= {f"tncompile.{k}" for k in ("layer", "network", "source", "bonds")}
    for network in compiled.program.networks:
        assert any(metadata(n).get("tncompile.network") == network.output.name for n in nodes)


def test_the_same_model_gives_the_same_bytes() -> None:
    def build() -> bytes:
        torch.manual_seed(4)
        model = nn.Sequential(TTLinear(), nn.ReLU(), nn.Linear(12, 3))
        return compiled_of(model, torch.randn(EXAMPLE, 24)).onnx

    first, second = build(), build()
    assert first == second
    model = onnx.load_model_from_string(first)
    assert model.producer_name == "tncompile" and not model.producer_version


def test_run_and_save(tmp_path: Path) -> None:
    model = TTLinear()
    compiled = compiled_of(model, torch.randn(EXAMPLE, 24))
    path = tmp_path / "model.onnx"
    compiled.save(path)
    assert path.read_bytes() == compiled.onnx
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    x = torch.randn(3, 24)
    by_position, by_name = compiled.run(x), compiled.run(x=x.numpy())
    np.testing.assert_array_equal(by_position, by_name)
    np.testing.assert_array_equal(by_position, session_of(path.read_bytes()).run(None, {"x": x.numpy()})[0])
    with torch.no_grad():
        assert_close(by_position, model.double()(x.double()).numpy(), tolerance=TOLERANCE[torch.float32])
    for wrong in (lambda: compiled.run(x, x), lambda: compiled.run(y=x), lambda: compiled.run(x, x=x)):
        with pytest.raises(TNCompileError, match="the model's inputs are x"):
            wrong()
    with pytest.raises(OutputError, match="does not exist"):
        compiled.save(tmp_path / "missing" / "model.onnx")


def test_a_saved_program_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    """From Python and from a file: one pipeline. And the example's batch leaves no trace."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = torch.randn(EXAMPLE, 5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt")
    loaded = tncompile.compile_file(tmp_path / "model.pt", batch=(1, 8))
    assert loaded.program == compiled_of(model, x).program
    compare(model, loaded, torch.randn(7, 5))


def test_functional_layers_without_a_module() -> None:
    weight = torch.randn(3, 5)
    compiled = check_model(Model(lambda m, x: F.linear(x, weight.to(x.dtype)) + torch.ones(3)), (5,))
    assert len(compiled.program.nodes) == 1
