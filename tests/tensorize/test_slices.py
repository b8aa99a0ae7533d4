"""Where a model is cut, what each slice is to give, and which weights it trains."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.tensorize.healing import TRANSFORMER, Conv, Mlp, Transformer, feeds, pair
from tncompile.errors import TNCompileError, UnsupportedError
from tncompile.frontend.trace import trace
from tncompile.tensorizer.flow import Flow, Passage
from tncompile.tensorizer.slices import read_outside, slices_of, trained
from tncompile.tensorizer.student import aligned, changed


def flows(module: nn.Module, rank: int, names: list[str], *example: torch.Tensor) -> tuple[Flow, Flow]:
    student, teacher = (Flow(exported) for exported in pair(module, rank, names, *example))
    aligned(teacher, student)
    return student, teacher


def cut(module: nn.Module, names: list[str], *example: torch.Tensor) -> list[tuple[str, list[str]]]:
    """For each slice the module that it is named after, and the operations that give its targets."""
    student, teacher = flows(module, 2, names, *example)
    _, replaced = changed(student, teacher)
    slices = slices_of(student, replaced)
    assert all(a.end <= b.start for a, b in pairwise(slices))
    assert sum(len(part.sites) for part in slices) == 2 * len(names)
    target = [[str(student.varying[n].target) for n in part.targets] for part in slices]
    return [(part.name.split(".parametrizations")[0], t) for part, t in zip(slices, target, strict=True)]


def test_a_chain_is_cut_behind_each_activation() -> None:
    assert cut(Mlp(), ["fc1", "fc2", "fc3"], torch.randn(2, 32)) == [
        ("fc1", ["aten.relu.default"]),
        ("fc2", ["aten.relu.default"]),
        ("fc3", ["aten.linear.default"]),
    ]


def test_layers_that_stay_dense_are_in_no_slice() -> None:
    student, teacher = flows(Mlp(), 2, ["fc1"], torch.randn(2, 32))
    (part,) = slices_of(student, changed(student, teacher)[1])
    assert part.end == len(student.varying)  # the model's output is what counts, where nothing is behind
    student, teacher = flows(Mlp(), 2, ["fc1", "fc3"], torch.randn(2, 32))
    first, second = slices_of(student, changed(student, teacher)[1])
    between = [str(node.target) for node in student.varying[first.end : second.start]]
    assert between == ["aten.linear.default", "aten.relu.default"]


def test_residual_blocks_stay_whole() -> None:
    found = cut(Conv(), ["stem", "inner", "outer"], torch.randn(2, 4, 8, 8))
    assert found[0] == ("stem", ["aten.relu.default"])  # behind the norm, whose result is a tuple first
    assert len(found) == 2
    assert found[1][1] == ["aten.linear.default"]


def test_blocks_of_a_transformer_are_cut_at_the_residual_stream() -> None:
    found = cut(Transformer(), TRANSFORMER, torch.randint(1, 50, (2, 6)))
    adds, norm = ["aten.add.Tensor"], ["aten.layer_norm.default"]
    assert found == [("blocks.0", adds), ("blocks.0", adds), ("blocks.1", adds), ("blocks.1", norm)]


def test_a_slice_trains_its_cores_and_vectors() -> None:
    student, teacher = flows(Transformer(), 2, TRANSFORMER, torch.randint(1, 50, (2, 6)))
    cores, replaced = changed(student, teacher)
    first = slices_of(student, replaced)[0]
    names = trained(student, first, cores, True, read_outside(student, first))
    assert {name.split(".parametrizations")[0].removeprefix("blocks.0.") for name in names} == {
        *("before.weight", "before.bias", "q", "k", "v", "o"),
        *("q.bias", "k.bias", "v.bias", "o.bias"),
    }
    assert {*trained(student, first, cores, False)} == {*names} & cores


def test_slices_that_share_all_their_weights_are_one() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.again, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.tanh(self.again(torch.tanh(self.first(x))))
            return self.last(x)

    found = cut(Repeated(), ["first", "again", "last"], torch.randn(2, 16))
    assert [name.split(".")[0] for name, _ in found] == ["again", "last"]


def test_two_heads_are_both_taught() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.relu(self.body(x))
            return self.left(x), self.right(x).argmax(-1)

    student, teacher = flows(Heads(), 2, ["body", "left"], torch.randn(2, 16))
    slices = slices_of(student, changed(student, teacher)[1])
    assert student.varying[slices[-1].targets[-1]].name in ("linear_1",)
    assert student.outputs == (student.number[next(n for n in student.varying if n.name == "linear_1")],)


@pytest.mark.parametrize("model", [Mlp(), Conv(), Transformer()], ids=lambda model: type(model).__name__)
def test_parts_in_a_row_are_the_whole(model: nn.Module) -> None:
    shape = {"Mlp": (5, 32), "Conv": (5, 4, 8, 8)}.get(type(model).__name__)
    x = torch.randint(1, 50, (5, 6)) if shape is None else torch.randn(shape)
    flow = Flow(trace(model.eval(), (x,)))
    values: dict[int, object] = {0: x}
    places = [1, *range(2, len(flow.varying), 3), len(flow.varying)]
    for start, end in pairwise(places):
        values = Passage(flow, start, end, flow.outputs if end == places[-1] else ())(values, flow.tensors)
    (output,) = flow.outputs
    result = values[output]
    assert isinstance(result, torch.Tensor)
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-6)


def test_another_model_is_no_student() -> None:
    x = torch.randn(2, 32)
    student, teacher = Flow(trace(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), (x,))), Flow(trace(Mlp(), (x,)))
    with pytest.raises(TNCompileError, match="the same model with weights replaced"):
        aligned(teacher, student)


def test_a_model_in_training_mode_is_refused() -> None:
    exported = trace(Conv().train(), (torch.randn(2, 4, 8, 8),))
    with pytest.raises(UnsupportedError, match="inference mode"):
        Flow(exported)


def test_the_data_of_the_tests_is_the_same_each_time() -> None:
    assert (feeds(1, 2, 3)[0]["x"] == feeds(1, 2, 3)[0]["x"]).all()
