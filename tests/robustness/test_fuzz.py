"""A few damaged files of every kind; `python -m tests.robustness.fuzz` is the long run."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.mutate import mutant
from tncompile.errors import LoadError
from tncompile.frontend.files.detect import detect
from tncompile.frontend.files.weights import fill


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits of memory")
def test_damaged_files_of_every_kind() -> None:
    command = [sys.executable, "-m", "tests.robustness.fuzz", "--count", "30", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 mutants, 0 findings" in done.stdout


def test_mutants_are_the_same_each_time() -> None:
    from random import Random

    data = bytes(range(200)) * 3
    made = [[mutant(Random(f"{k}"), data, "bytes", [data]) for k in range(50)] for _ in range(2)]
    assert made[0] == made[1] and sum(m != data for m in made[0]) > 40


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    from tests.robustness.mutate import _bomb

    path = tmp_path / "model.pt"
    path.write_bytes(_bomb([("archive/data.pkl", b"\x80\x02N."), ("archive/version", b"3")], 0))
    with pytest.raises(LoadError, match="made to fill the memory: a file of "):
        detect(path)


def test_files_of_a_few_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for data in (bytes(pair)[:size] for pair in itertools.product(range(256), (8, 0x80)) for size in (1, 2)):
        path.write_bytes(data)
        assert detect(path) in ("unknown", "plain pickle")


def test_no_weights_at_all() -> None:
    import torch

    with pytest.raises(LoadError, match="missing in the file: weight, bias"):
        fill(torch.nn.Linear(2, 2), {}, Path("weights.pt"))


@pytest.mark.parametrize(
    "text", ["(" * 300 + "x" + ")" * 300, "-" * 3000 + "x", "x" + ".a" * 3000, "not " * 3000 + "x"]
)
def test_code_that_would_overflow_the_stack_of_its_reader(text: str) -> None:
    from tncompile.frontend.files.torchscript import _too_deep

    assert _too_deep(f"def f(x):\n  return {text}\n".encode())
    flat = ", ".join(["-1.5", "x"] * 3000)
    assert not _too_deep(f"def f(x):\n  return [{flat}]\n".encode() * 3)
