"""Healing: what it gains, that it goes on after a kill as if nothing had happened, and what it refuses."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.tensorize.healing import TRANSFORMER, Conv, Mlp, Transformer, feeds, pair, sentences, truncated
from tncompile.errors import LoadError, TNCompileError, UnsupportedError
from tncompile.frontend.trace import trace
from tncompile.tensorizer.activations import Store
from tncompile.tensorizer.heal import Healed, Message, heal

MLP = ["fc1", "fc2", "fc3"]


def output_error(healed: torch.export.ExportedProgram, teacher: nn.Module, data: list[dict[str, Any]]) -> float:
    """The relative error on data that healing has not seen, by the modules themselves, in float64."""
    wrong = right = 0.0
    for feed in data:
        given = [torch.from_numpy(array) for array in feed.values()]
        with torch.no_grad():
            expected = teacher(*given).double()
            wrong += float((healed.module()(*given).double() - expected).square().sum())
            right += float(expected.square().sum())
    return (wrong / right) ** 0.5


def mlp(steps: int | None, **options: Any) -> Healed:
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    return heal(student, teacher, feeds(1, 100, 32), steps=steps, **options)


# ------------------------------------------------------------------------------------ what it gains


@pytest.mark.parametrize(
    ("model", "rank", "names", "factor"),
    [(Mlp(), 12, MLP, 0.8), (Conv(), 6, ["stem", "inner", "outer"], 0.7), (Transformer(), 12, TRANSFORMER, 0.7)],
    ids=["mlp", "conv", "transformer"],
)
def test_the_error_on_unseen_data_falls(model: nn.Module, rank: int, names: list[str], factor: float) -> None:
    shapes = {"Mlp": (32,), "Conv": (4, 6, 6)}
    shape = shapes.get(type(model).__name__)
    data = sentences(1, 160) if shape is None else feeds(1, 160, *shape)
    unseen = sentences(1, 40, seed=1) if shape is None else feeds(1, 40, *shape, seed=1)
    example = [torch.from_numpy(array[:2]) for array in data[0].values()]
    student, teacher = pair(model, rank, names, *example)
    before = output_error(student, model, unseen)
    result = heal(student, teacher, data, steps=60)
    after = output_error(result.exported, model, unseen)
    assert after < factor * before
    assert result.after < factor * result.before
    assert all(stage.after <= stage.before for stage in result.slices)
    assert {*result.exported.state_dict} == {*student.state_dict}
    more = heal(result.exported, teacher, data, steps=30, end_to_end=True)
    assert more.end_to_end is not None
    assert more.after <= result.after * 1.001


def test_biases_are_left_alone_where_that_is_asked() -> None:
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    data = feeds(1, 100, 32)
    result = heal(student, teacher, data, steps=20, vectors=False)
    moved = {n for n, t in result.exported.state_dict.items() if not torch.equal(t, student.state_dict[n])}
    assert moved
    assert not any(name.endswith("bias") for name in moved)


def test_divergence_of_logits_is_a_loss() -> None:
    result = mlp(40, end_to_end=True, loss="kl")
    assert result.end_to_end is not None
    assert result.end_to_end.after < result.end_to_end.before


def test_nothing_to_heal_is_said() -> None:
    teacher = trace(Mlp().eval(), (torch.randn(2, 32),))
    result = heal(teacher, teacher, feeds(1, 10, 32), steps=5)
    assert result.exported is teacher
    assert "no weight was replaced" in result.notes[0]


def test_one_fixed_run_is_judged_by_itself_and_said() -> None:
    module = Mlp().eval()
    teacher = torch.export.export(module, (torch.randn(8, 32),))
    fixed = torch.export.export(truncated(module, 12, MLP), (torch.randn(8, 32),))
    result = heal(fixed, teacher, feeds(1, 8, 32), steps=10)
    assert "nothing is held out" in result.notes[0]
    assert result.after < result.before


class Tied(nn.Module):
    """Two layers of one weight, and one of its own in between."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(16, 16) / 4
        between = nn.Linear(16, 16)
        if rank is None:
            self.weight: nn.Parameter | None = nn.Parameter(whole)
        else:
            u, s, v = torch.linalg.svd(whole)
            self.weight = None
            self.left, self.right = nn.Parameter(u[:, :rank] * s[:rank]), nn.Parameter(v[:rank].contiguous())
        self.between, self.again = between, nn.Linear(16, 16)
        self.again.bias = self.between.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.weight is not None else torch.einsum("or,ri->oi", self.left, self.right)
        x = torch.tanh(nn.functional.linear(x, weight))
        return nn.functional.linear(torch.tanh(self.between(x)), weight) + self.again(x)


def test_tied_weights_stay_tied() -> None:
    x = torch.randn(2, 16)
    student, teacher = (trace(Tied(rank).eval(), (x,)) for rank in (8, None))
    result = heal(student, teacher, feeds(1, 100, 16), steps=30)
    assert result.after < result.before
    state = result.exported.state_dict
    assert state["between.bias"] is state["again.bias"]
    torch.testing.assert_close(result.exported.module().between.bias, result.exported.module().again.bias)


class Shared(nn.Module):
    """A bias that is read before the first replaced weight too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.fc = nn.Linear(16, 16), nn.Linear(16, 16)
        self.fc.bias = self.dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.dense(x)))


def test_the_error_is_that_of_the_healed_model() -> None:
    model, unseen = Shared(), feeds(1, 40, 16, seed=1)
    student, teacher = pair(model, 8, ["fc"], torch.randn(2, 16))
    result = heal(student, teacher, feeds(1, 100, 16), held_out=unseen, steps=30, end_to_end=True)
    assert result.after < result.before
    assert result.before == pytest.approx(output_error(student, model, unseen), rel=1e-4)
    assert result.after == pytest.approx(output_error(result.exported, model, unseen), rel=1e-4)


def test_the_student_itself_is_not_changed() -> None:
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    before = {name: tensor.clone() for name, tensor in student.state_dict.items()}
    with torch.inference_mode():
        heal(student, teacher, feeds(1, 50, 32), steps=3)
    assert all(torch.equal(tensor, student.state_dict[name]) for name, tensor in before.items())


# ------------------------------------------------------------------------------------ limits


def test_time_is_shared_and_kept() -> None:
    ticks = itertools.count()
    messages: list[Message] = []
    result = mlp(None, seconds=240, end_to_end=True, clock=lambda: float(next(ticks)), progress=messages.append)
    assert result.end_to_end is not None
    stages = [*result.slices, result.end_to_end]
    assert all(stage.steps > 5 for stage in stages)
    assert sum(stage.seconds for stage in result.slices) <= 180  # 0.7 of it, and a few readings of the clock
    assert result.seconds <= 260
    shown = [str(message) for message in messages]
    assert shown[0].startswith("1/4 fc1")
    assert shown[-1].startswith("4/4 end to end: step ")


def test_no_time_changes_nothing() -> None:
    result = mlp(None, seconds=0)
    assert result.after == result.before
    assert all(stage.steps == 0 for stage in result.slices)


def test_memory_over_the_limit_goes_to_files(tmp_path: Path) -> None:
    plain, mapped = mlp(10), mlp(10, memory=20_000)
    for name, tensor in plain.exported.state_dict.items():
        assert torch.equal(tensor, mapped.exported.state_dict[name])
    store = Store(100, tmp_path)
    kept = store.keep({0: torch.arange(10.0), 1: torch.arange(20.0), 2: 7})
    assert kept[1].tolist() == [*range(20)]
    assert (store.used, len([*tmp_path.iterdir()])) == (40, 1)
    del kept
    assert (store.used, [*tmp_path.iterdir()]) == (0, [])


# ------------------------------------------------------------------------------------ kills

WORKER = """
import itertools, os, signal, sys
from pathlib import Path
import safetensors.torch, torch
from tests.tensorize.healing import Mlp, feeds, pair
from tncompile.tensorizer.heal import heal

torch.set_num_threads(1)
kill, target = int(sys.argv[1]), Path(sys.argv[2])
count, ticks = itertools.count(1), itertools.count()

def progress(message):
    if next(count) == kill:
        os.kill(os.getpid(), signal.SIGKILL)

x = torch.linspace(-1, 1, 64).reshape(2, 32)
student, teacher = pair(Mlp(), 12, ["fc1", "fc2", "fc3"], x)
result = heal(student, teacher, feeds(1, 120, 32), steps=25, end_to_end=True, checkpoint=target / "healing",
              checkpoint_every=3, clock=lambda: float(next(ticks)), progress=progress)
safetensors.torch.save_file(dict(result.exported.state_dict), target / "result")
print(result.before, result.after, [stage.after for stage in (*result.slices, result.end_to_end)], next(count))
"""


def work(kill: int, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORKER, str(kill), str(target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    done = work(0, whole)
    assert done.returncode == 0, done.stderr
    assert work(40, cut).returncode == -signal.SIGKILL  # in the second slice
    again = work(0, cut)
    assert again.returncode == 0, again.stderr
    assert (whole / "result").read_bytes() == (cut / "result").read_bytes()
    assert again.stdout.rsplit(maxsplit=1)[0] == done.stdout.rsplit(maxsplit=1)[0]
    assert int(again.stdout.split()[-1]) < int(done.stdout.split()[-1])  # it did not begin anew


def test_a_finished_checkpoint_gives_the_result_at_once(tmp_path: Path) -> None:
    path = tmp_path / "healing"
    first = mlp(10, checkpoint=path, end_to_end=True)
    messages: list[Message] = []
    again = mlp(10, checkpoint=path, end_to_end=True, progress=messages.append)
    assert messages == []
    assert (again.before, again.after, again.slices) == (first.before, first.after, first.slices)
    assert all(torch.equal(t, again.exported.state_dict[n]) for n, t in first.exported.state_dict.items())


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "healing"
    mlp(2, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(TNCompileError, match="other calibration data or other options"):
        mlp(3, checkpoint=path)
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    with pytest.raises(TNCompileError, match="another model"):
        heal(student, teacher, feeds(1, 400, 32, seed=5), steps=2, checkpoint=path)
    assert path.read_bytes() == before
    for content in (b"", b"no checkpoint", safetensors.torch.save({"a": torch.zeros(2)})):
        path.write_bytes(content)
        with pytest.raises(LoadError, match="is no checkpoint of healing"):
            mlp(2, checkpoint=path)


# ------------------------------------------------------------------------------------ refusals


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    with pytest.raises(TNCompileError, match="give seconds or steps"):
        heal(student, teacher, feeds(1, 10, 32))
    with pytest.raises(TNCompileError, match="no loss"):
        heal(student, teacher, feeds(1, 10, 32), steps=1, loss="l1")  # type: ignore[arg-type]
    with pytest.raises(TNCompileError, match="no calibration data"):
        heal(student, teacher, [], steps=1)
    with pytest.raises(TNCompileError, match="the inputs are x"):
        heal(student, teacher, feeds(1, 10, 32, name="y"), steps=1)
    with pytest.raises(TNCompileError, match="of shape"):
        heal(student, teacher, feeds(1, 10, 31), steps=1)
    with pytest.raises(TNCompileError, match="does not exist"):
        heal(student, teacher, feeds(1, 10, 32), steps=1, checkpoint=tmp_path / "missing" / "healing")


def test_what_cannot_be_trained_is_refused() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, training=True)

    student, teacher = pair(Drops(), 4, ["fc"], torch.randn(2, 32))
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        heal(student, teacher, feeds(1, 40, 32), steps=1)
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    bad = feeds(1, 40, 32)
    bad[0]["x"][-1] = np.inf
    with pytest.raises(UnsupportedError, match="not finite"):
        heal(student, teacher, bad, steps=1)
    bad[0]["x"][-2] = np.nan
    with pytest.raises(TNCompileError, match="NaN"):
        heal(student, teacher, bad, steps=1)
