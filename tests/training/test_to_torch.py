"""Whole models as modules to train: values, gradients, names, modes, and what users do with modules."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import tltorch
import torch
from torch import nn

import tncompile
from tests.helpers import assert_close
from tncompile.errors import TNCompileError, UnsupportedError
from tncompile.training import to_torch


def factorized(form: str, implementation: str = "factorized", bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return tltorch.FactorizedLinear(  # type: ignore[no-any-return]
        (4, 6), (3, 5), factorization=form, rank=3, implementation=implementation, bias=bias
    )


class Train(nn.Module):
    """A tensor train by hand, 24 -> 15."""

    def __init__(self) -> None:
        super().__init__()
        self.cores = nn.ParameterList([torch.randn(4, 3, 2), torch.randn(2, 6, 5)])
        self.bias = nn.Parameter(torch.randn(15))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bij,ipr,rjq->bpq", x.reshape(-1, 4, 6), *self.cores)
        return y.reshape(-1, 15) + self.bias


class Net(nn.Module):
    """Convolution, batch norm, dropout, three factorized layers of which two share a core and a bias."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten())
        self.drop = nn.Dropout(dropout)
        self.first, self.second = Train(), factorized("cp", "reconstructed")
        self.third = Train()
        self.third.bias, self.third.cores[0] = self.first.bias, self.first.cores[0]
        self.frozen = nn.Parameter(torch.randn(15), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(self.stem(x))
        return {"sum": self.first(hidden) + self.third(torch.tanh(hidden)) * self.frozen, "other": self.second(hidden)}


@pytest.fixture(scope="module")
def planned() -> tuple[Net, nn.Module, torch.Tensor]:
    net = Net().double()
    x = torch.randn(5, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return net, to_torch(net, (x,)), x


def loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return outputs["sum"].pow(2).mean() + outputs["other"].pow(2).mean()


def test_training_mode_values_gradients_and_statistics(planned: tuple[Net, nn.Module, torch.Tensor]) -> None:
    net, module = copy.deepcopy(planned[0]).train(), copy.deepcopy(planned[1]).train()
    x = planned[2]
    expected, found = net(x), module(x)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    loss(expected).backward()
    loss(found).backward()
    parameters = dict(module.named_parameters())
    for name, parameter in net.named_parameters():
        mine = parameters[name]
        assert mine.requires_grad == parameter.requires_grad
        if parameter.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-8, atol=1e-10)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)
    assert int(module.get_buffer("stem.1.num_batches_tracked")) == 1


def test_evaluation_mode_at_another_batch(planned: tuple[Net, nn.Module, torch.Tensor]) -> None:
    net, module, _ = planned
    x = torch.randn(9, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        expected, found = net.eval()(x), module.eval()(x)
    torch.testing.assert_close(found["sum"], expected["sum"], rtol=1e-10, atol=1e-10)


def test_names_sharing_and_state(planned: tuple[Net, nn.Module, torch.Tensor]) -> None:
    net, module, x = planned
    assert {*module.state_dict()} == {*net.state_dict()}
    assert module.get_parameter("third.bias") is module.get_parameter("first.bias")
    assert module.get_parameter("first.bias") is not net.first.bias
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.get_parameter("first.bias").add_(1)
    buffer = io.BytesIO()
    torch.save(copied.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(module)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(again.eval()(x)["sum"], copied.eval()(x)["sum"])
    other = Net().double()
    copied.store_into(other)
    torch.testing.assert_close(other.eval()(x)["sum"], copied.eval()(x)["sum"])
    copied.load_from(net)
    torch.testing.assert_close(copied.eval()(x)["sum"], net.eval()(x)["sum"])
    with pytest.raises(TNCompileError, match="do not have the same parameters"):
        copied.load_from(nn.Linear(2, 2))


def test_torch_compile(planned: tuple[Net, nn.Module, torch.Tensor]) -> None:
    net, module = copy.deepcopy(planned[0]).train(), copy.deepcopy(planned[1]).train()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    loss(net(planned[2])).backward()
    loss(compiled(planned[2])).backward()
    core = "first.cores.0"
    torch.testing.assert_close(module.get_parameter(core).grad, net.get_parameter(core).grad)


def test_fine_tuned_and_compiled_again() -> None:
    net = nn.Sequential(factorized("blocktt"), nn.ReLU(), nn.Linear(15, 24), factorized("tucker"))
    x = torch.randn(6, 24)
    module = to_torch(net, (x,))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = module(x).pow(2).mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    compiled = tncompile.compile(module.eval(), (x,))
    cores = [{t.name for t in n.cores} for n in compiled.stages["fold"].networks]
    # two cores; a matrix and the five of a Tucker layer behind it; a bias each
    assert [len(c) for c in cores] == [3, 7]
    assert {"0.weight.factors.factor_0", "0.weight.factors.factor_1", "0.bias"} == cores[0]
    expected = module.double()(x.double()).detach().numpy()
    assert_close(compiled.run(x), expected, tolerance=1e-5)


def test_dropout_drops_in_training_alone() -> None:
    x = torch.randn(4, 2, 6)
    module = to_torch(Net(dropout=0.5), (x,))
    first, second = (module.train()(x)["sum"] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (module.eval()(x)["sum"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("memory", ["high", "low"])
def test_autocast_and_memory(memory: str) -> None:
    layer = factorized("tucker")
    x = torch.randn(4, 24)
    module = to_torch(layer, (x,), memory=memory)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    layer(x).sum().backward()
    core = "weight.factors.factor_0"
    mine, theirs = module.get_parameter(core).grad, layer.get_parameter(core).grad
    assert mine is not None and theirs is not None and mine.dtype == torch.float32
    assert float((mine - theirs).norm()) < 0.05 * float(theirs.norm())


def test_from_exported_programs_compiled_models_and_files(tmp_path: Path) -> None:
    layer = factorized("cp").eval()
    x = torch.randn(4, 24)
    tncompile.save(layer, (x,), tmp_path / "model.pt")
    sources = (tmp_path / "model.pt", torch.export.load(tmp_path / "model.pt"), tncompile.compile(layer, (x,)))
    for source in sources:
        module = to_torch(source)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)
        module(x).sum().backward()
        assert module.get_parameter("weight.factors.factor_0").grad is not None


def test_what_is_refused() -> None:
    layer = factorized("cp")
    x = torch.randn(4, 24)
    with pytest.raises(TNCompileError, match="needs example_inputs"):
        to_torch(layer)
    with pytest.raises(TNCompileError, match="no memory 'none'"):
        to_torch(layer, (x,), memory="none")  # type: ignore[arg-type]
    with pytest.raises(TNCompileError, match="no dynamic dimension seq"):
        to_torch(layer, (x,), sizes={"seq": 3})
    with pytest.raises(TNCompileError, match="when the model was traced: 1 in order"):
        to_torch(layer, (x,))(x, x)

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * 2

    with pytest.raises(UnsupportedError, match="writes to its input"):
        to_torch(Writes(), (x,))
