"""Layers whose forward cannot be traced: computed another way while a model is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tncompile
from tncompile.errors import UnsupportedError
from tncompile.frontend.adapters import Adapter, adapted
from tncompile.frontend.trace import trace


class Unraveled(nn.Module):
    """Indexes by NumPy, as no traced module can."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(5, 3, generator=generator))

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        rows, columns = np.unravel_index(ids.numpy(), (4, 5))
        return scale * self.a[torch.from_numpy(rows)] * self.b[torch.from_numpy(columns)]


class Inherited(Unraveled):
    """Has its forward from its base."""


def plain(module: Unraveled, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * module.a[ids // 5] * module.b[ids % 5]


def wrong(module: Unraveled, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * module.a[ids % 4] * module.b[ids % 5]


def registry(forward: object, probes: object = lambda module: [(torch.arange(20),)]) -> dict[str, Adapter]:
    return {f"{__name__}.Unraveled": Adapter(forward, probes)}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Unraveled, Inherited])
def test_a_module_is_adapted_and_left_as_it_was(kind: type[Unraveled]) -> None:
    model = nn.Sequential(kind(), nn.ReLU())
    ids = torch.tensor([[3, 19], [7, 0]])
    before, state = model(ids), dict(vars(model[0]))
    with pytest.raises(UnsupportedError):
        trace(model, (ids,))
    with adapted(model, registry(plain)):
        exported = torch.export.export(model, (ids,), strict=False)
        assert "forward" in vars(model[0])
    assert vars(model[0]) == state
    assert {*exported.state_dict} == {"0.a", "0.b"}
    torch.testing.assert_close(exported.module()(ids), before)
    torch.testing.assert_close(model(ids), before)


def test_it_is_left_as_it_was_after_an_error() -> None:
    model = Unraveled()
    with pytest.raises(RuntimeError, match="in between"), adapted(model, registry(plain)):
        raise RuntimeError("in between")
    assert "forward" not in vars(model)


def test_an_adapter_that_computes_something_else_is_refused() -> None:
    model = nn.Sequential(Unraveled())
    with pytest.raises(UnsupportedError, match="does not compute"), adapted(model, registry(wrong)):
        pass
    assert "forward" not in vars(model[0])


def test_what_the_module_cannot_run_is_not_compared() -> None:
    with adapted(Unraveled(), registry(plain, lambda module: [(torch.tensor([0]), torch.ones(2, 1, 1))])):
        pass


def test_a_forward_of_the_users_own_stays() -> None:
    class Own(Unraveled):
        def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.a[ids % 4]

    patched = Unraveled()
    patched.forward = lambda ids: patched.a[ids % 4]  # type: ignore[assignment,method-assign]
    for model in (Own(), patched):
        own = vars(model).get("forward")
        with adapted(model, registry(plain)):
            assert vars(model).get("forward") is own
        assert vars(model).get("forward") is own


# ------------------------------------------------------------------------------ tensorly-torch


def embedding(factorization: str, layers: int = 1, modes: int = 3) -> nn.Module:
    tltorch = pytest.importorskip("tltorch")
    torch.manual_seed(0)
    module = tltorch.FactorizedEmbedding(
        1000, 48, n_tensorized_modes=modes, factorization=factorization, rank=4, n_layers=layers
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("modes", [2, 3])
@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt"])
def test_embeddings_of_tensorly_torch(factorization: str, modes: int) -> None:
    module = embedding(factorization, modes=modes)
    ids = torch.randint(0, 1000, (4, 7), generator=torch.Generator().manual_seed(1))
    expected = module(ids)
    scale = float(expected.detach().abs().max())
    edges = torch.tensor([[0, 999, 1, 998, 500, 499, 333]]).repeat(9, 1)  # another batch
    for compact in (False, True):
        compiled = tncompile.compile(module, (ids,), batch=(1, 16), compact=compact)
        torch.testing.assert_close(module(ids), expected)
        assert {*compiled.traced.exported.state_dict} == {*module.state_dict()}
        np.testing.assert_allclose(compiled.run(ids), expected.detach(), rtol=0, atol=2e-6 * scale)
        np.testing.assert_allclose(compiled.run(edges), module(edges).detach(), rtol=0, atol=2e-6 * scale)
    assert largest_array(compiled.onnx) < 1000 * 48


@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt"])
def test_one_of_several_joint_embeddings(factorization: str) -> None:
    main = embedding(factorization, layers=3, modes=2)
    module = main.get_embedding(2)  # type: ignore[operator]
    ids = torch.randint(0, 1000, (4, 7), generator=torch.Generator().manual_seed(1))
    expected = module(ids).detach()
    compiled = tncompile.compile(module, (ids,), batch=(1, 16))
    np.testing.assert_allclose(compiled.run(ids), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_another_factorization_is_refused() -> None:
    tltorch = pytest.importorskip("tltorch")
    module = tltorch.FactorizedEmbedding(100, 8, n_tensorized_modes=2, factorization="dense", rank=None)
    with pytest.raises(UnsupportedError, match="make it an nn"):
        tncompile.compile(module, (torch.tensor([[1, 2], [3, 4]]),))


def largest_array(data: bytes) -> int:
    """Elements of the largest array that an ONNX file holds, or that any node of it computes from constants alone."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data)).graph
    sizes = {i.name: int(np.prod(i.dims)) for i in graph.initializer}
    constants = {*sizes}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    for node in graph.node:
        if all(name in constants for name in node.input if name):
            constants |= {*node.output}
            sizes |= {name: int(np.prod(shapes[name])) for name in node.output if name in shapes}
    return max(sizes.values())
