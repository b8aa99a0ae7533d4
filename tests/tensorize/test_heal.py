"""Healing: what it gains, that it goes on after a kill as if nothing had happened, and what it refuses."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.tensorize.healing import TRANSFORMER, Conv, Mlp, Transformer, feeds, pair, sentences
from tncompile.errors import LoadError, TNCompileError, UnsupportedError
from tncompile.frontend.trace import trace
from tncompile.tensorize.activations import Store
from tncompile.tensorize.heal import Healed, Message, heal

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


def mlp(steps: int = 60, **options: Any) -> Healed:
    student, teacher = pair(Mlp(), 12, MLP, torch.randn(2, 32))
    return heal(student, teacher, feeds(1, 400, 32), steps=steps, **options)


# ------------------------------------------------------------------------------------ what it gains


@pytest.mark.parametrize(
    ("model", "rank", "names", "factor"),
    [(Mlp(), 12, MLP, 0.7), (Conv(), 6, ["stem", "inner", "outer"], 0.5), (Transformer(), 12, TRANSFORMER, 0.6)],
    ids=["mlp", "conv", "transformer"],
)
def test_the_error_on_unseen_data_falls(model: nn.Module, rank: int, names: list[str], factor: float) -> None:
    kind = type(model).__name__
    make: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "Mlp": lambda seed: feeds(1, 400, 32, seed=3 * seed) if not seed else feeds(1, 100, 32, seed=0),
        "Conv": lambda seed: feeds(1, 100, 4, 8, 8, seed=0),
        "Transformer": lambda seed: sentences(1, 200, seed=seed),
    }
    data, unseen = make[kind](0), make[kind](1)
    example = [torch.from_numpy(array[:2]) for array in data[0].values()]
    student, teacher = pair(model, rank, names, *example)
    before = output_error(student, model, unseen)
    result = heal(student, teacher, data, steps=120)
    after = output_error(result.exported, model, unseen)
    assert after < factor * before
    assert result.after < factor * result.before
    assert all(stage.after <= stage.before for stage in result.slices)
    assert {*result.exported.state_dict} == {*student.state_dict}
    more = heal(result.exported, teacher, data, steps=60, end_to_end=True)
    assert more.end_to_end is not None and more.after <= result.after * 1.001
