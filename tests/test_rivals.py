"""The other ways to run a model: built, limited, checked, raced; without looking at any time itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.helpers import nodes_of
from tncompile.cli import main
from tncompile.errors import TNCompileError
from tncompile.frontend.trace import trace
from tncompile.runtime import contest as contests
from tncompile.runtime.contest import DENSE, EAGER, EXPORTER, NAIVE, OURS, Contest, Subject
from tncompile.runtime.device import NodeTime, profile, require_on_device
from tncompile.runtime.probe import Limits, probe
from tncompile.runtime.rivals import (
    Inputs,
    NotApplicable,
    contract_pairwise,
    eager_module,
    export_pairwise,
    export_plain,
    output_error,
    time_limit,
)
from tncompile.runtime.session import Session
from tncompile.runtime.timing import FEW_ROUNDS, race


class Train(torch.nn.Module):
    """12 -> 12 by one einsum of four operands."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((3, 3, 5), (5, 2, 2, 5), (5, 2, 2))
        self.cores = torch.nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("zabc,adr,rbes,scf->zdef", x, *self.cores)


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    return trace(Train().eval(), (torch.randn(4, 3, 2, 2),))


@pytest.fixture(scope="module")
def plain(exported: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    export_plain(exported, path)
    return path


# ------------------------------------------------------------------------------------ einsums in pairs


@pytest.mark.parametrize("equation", ["zabc,adr,rbes,scf->zdef", "ij,jk,kl", "ab,b,b->a", "a,b,c->abc", "ij,jk->ik"])
def test_contract_pairwise(equation: str) -> None:
    sizes = {name: 2 + k % 3 for k, name in enumerate("abcdefijklrsz")}
    generator = torch.Generator().manual_seed(1)
    terms = equation.partition("->")[0].split(",")
    tensors = [torch.randn([sizes[c] for c in t], generator=generator, dtype=torch.float64) for t in terms]
    found = contract_pairwise(equation, tensors, batch=1)
    torch.testing.assert_close(found, torch.einsum(equation, *tensors), rtol=1e-12, atol=1e-12)


def test_pairwise_export_has_no_einsum_of_three(exported: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "naive.onnx"
    export_pairwise(exported, path, batch=1)
    einsums = [len(n.input) for n in nodes_of(onnx.load(path).graph) if n.op_type == "Einsum"]
    assert einsums and {*einsums} == {2}  # the exporter writes some products as MatMul
    x = torch.randn(7, 3, 2, 2)
    (found,) = Session(path).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(found, Train()(x).detach(), rtol=1e-4, atol=1e-4)


def test_pairwise_export_declines_what_has_no_such_einsum(tmp_path: Path) -> None:
    linear = trace(torch.nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    with pytest.raises(NotApplicable, match="three or more"):
        export_pairwise(linear, tmp_path / "naive.onnx", batch=1)


def test_eager_module_has_an_order(exported: torch.export.ExportedProgram) -> None:
    module = eager_module(exported, batch=8)
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)  # type: ignore[attr-defined]
    assert len(node.kwargs["path"]) == 6
    x = torch.randn(9, 3, 2, 2)
    torch.testing.assert_close(module(x), Train()(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ limits and checks


def test_probe_runs_and_measures(plain: Path) -> None:
    found = probe(plain, {"x": np.zeros((5, 3, 2, 2), np.float32)}, Limits(first_call_s=60))
    assert found.ms is not None and found.ms > 0 and not found.note
    assert found.memory is None or 0 < found.memory < 1 << 30


def test_probe_tells_why_not(plain: Path) -> None:
    wrong = probe(plain, {"x": np.zeros((5, 3, 2), np.float32)}, Limits(first_call_s=60))
    assert wrong.ms is None and wrong.note.startswith("fails: ")
    late = probe(plain, {"x": np.zeros((5, 3, 2, 2), np.float32)}, Limits(first_call_s=0.01))
    assert late.ms is None and late.note == "> 0.01 s"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_probe_tells_a_crash_from_memory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signal that the process ends with, or by what it says before."""
    run = subprocess.run

    def ending(code: str) -> Callable[..., Any]:
        return lambda command, **options: run([sys.executable, "-c", code], **options)

    arrays = {"x": np.zeros((5, 3, 2, 2), np.float32)}
    kill = "import os, signal, sys; {0}; os.kill(os.getpid(), signal.{1})"
    aborted = "print('terminate: std::bad_alloc', file=sys.stderr, flush=True)"
    for code, note in (
        (kill.format("0", "SIGSEGV"), "crashes: SIGSEGV"),
        (kill.format("0", "SIGABRT"), "crashes: SIGABRT"),
        (kill.format(aborted, "SIGABRT"), "> 8 GB"),
        (kill.format("0", "SIGKILL"), "> 8 GB"),
        ("raise MemoryError", "> 8 GB"),
        ("raise ValueError('no such thing')", "fails: ValueError: no such thing"),
    ):
        monkeypatch.setattr(subprocess, "run", ending(code))
        assert probe(plain, arrays, Limits()).note == note


def test_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"> 0\.05 s"), time_limit(0.05):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # the alarm is off again


def test_output_error() -> None:
    one = np.array([1.0, 2.0])
    assert output_error([one * 1.01], [one]) == pytest.approx(0.01)
    assert output_error([one[:1]], [one]) == math.inf and output_error([], [one]) == math.inf
    assert math.isnan(output_error([one * np.nan], [one]))


def test_profile_names_nodes_and_providers(plain: Path) -> None:
    nodes = profile(plain, {"x": np.zeros((5, 3, 2, 2), np.float32)}, calls=3)
    assert nodes and {node.provider for node in nodes} == {"CPUExecutionProvider"}
    assert all(node.microseconds >= 0 and node.op for node in nodes)
    session = Session(plain)
    require_on_device(session, nodes, "cpu")
    with pytest.raises(TNCompileError, match="fell back to CPUExecutionProvider"):
        require_on_device(session, nodes, "cuda")


def test_nodes_on_the_wrong_device_are_told(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    monkeypatch.setattr(Session, "providers", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    nodes = (NodeTime("a", "Add", "CPUExecutionProvider", 1.0),)
    with pytest.raises(TNCompileError, match="ran none of the 1 nodes"):
        require_on_device(Session(plain), nodes, "cuda")


# ------------------------------------------------------------------------------------ races


def test_race_lets_the_hopeless_sit_out() -> None:
    entrants = {"fast": lambda: time.sleep(0.0005), "slow": lambda: time.sleep(0.02)}
    result = race(entrants, rounds=8, budget_s=60)
    assert result.fastest() == "fast"
    assert result.rounds("fast") == 8 and result.rounds("slow") == FEW_ROUNDS
    assert result.ratio("slow", "fast") > 1


def test_contest(exported: torch.export.ExportedProgram, plain: Path, tmp_path: Path) -> None:
    """A wrong way, one that fails and one that fixes its batch have notes and no times."""
    module = Train().eval()
    wrong = torch.nn.Sequential(Train(), torch.nn.Hardtanh()).eval()

    def fixed(path: Path) -> None:
        export_plain(trace(module, (torch.randn(4, 3, 2, 2),), None, None), path)

    def clipped(path: Path) -> None:
        export_plain(trace(wrong, (torch.randn(4, 3, 2, 2),)), path)

    inputs = torch.randn(16, 3, 2, 2)
    writers = {OURS: lambda path: path.write_bytes(plain.read_bytes()), DENSE: fixed, NAIVE: clipped}
    subject = Subject(exported, module, lambda batch: Inputs((inputs[:batch],)), {k: writers[k] for k in (OURS, DENSE)})
    contest = Contest(subject, tmp_path, (EXPORTER, EAGER, DENSE))
    first, second = contest.run((16, 4), seconds=0.0, rounds=2)
    assert (first.batch, second.batch) == (4, 16)
    assert DENSE in first.ms and second.notes[DENSE].startswith("fails") and DENSE not in second.ms
    assert {OURS, EXPORTER, EAGER} <= {*second.ms} and second.errors[OURS] < 1e-5
    assert second.speed is not None and second.ratio(EXPORTER) is not None and second.fastest in (EXPORTER, EAGER)

    subject = Subject(exported, module, subject.inputs, {OURS: writers[OURS], DENSE: clipped})
    (row,) = Contest(subject, tmp_path, (DENSE,)).run((4,), seconds=0.0, rounds=2)
    assert row.notes[DENSE].startswith("wrong: relative error") and row.speed is None


def test_an_exporter_that_fails_is_a_note(
    exported: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such operator\nand more")

    monkeypatch.setattr(contests.rivals, "export_plain", fail)
    subject = Subject(exported, Train().eval(), lambda batch: Inputs((torch.randn(batch or 1, 3, 2, 2),)), {OURS: fail})
    (row,) = Contest(subject, tmp_path, (EXPORTER, EAGER)).run((2,), seconds=0.0, rounds=2)
    assert row.notes == {OURS: "fails: no such operator", EXPORTER: "fails: no such operator"}
    assert {*row.ms} == {EAGER}


# ------------------------------------------------------------------------------------ the command


def test_bench_command(
    exported: torch.export.ExportedProgram, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, figures = tmp_path / "model.pt2", tmp_path / "figures.json"
    torch.export.save(exported, model)
    arguments = ["bench", str(model), "--batch", "2,8", "--seconds", "0", "--json", str(figures)]
    assert main([*arguments, "--against", "exporter,eager,dense,naive"]) == 0
    printed = capsys.readouterr().out
    for words in ("batch 2", "batch 8", "tncompile", "eager PyTorch", "dense + ORT", "times the speed of"):
        assert words in printed
    record = json.loads(figures.read_text())
    assert [row["batch"] for row in record["rows"]] == [2, 8]
    assert {*record["rows"][0]["ms"]} == {OURS, EXPORTER, EAGER, DENSE, NAIVE}
    assert not any(row["notes"] for row in record["rows"])
    assert {*record["built"]} == {OURS, EXPORTER, DENSE, NAIVE}


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", str(tmp_path / "none.pt")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "model.pt", "--against", "eager,magic"])
    assert stop.value.code == 2 and "no way magic; choose from exporter" in capsys.readouterr().err
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    model = tmp_path / "model.onnx"
    model.write_bytes(b"\x08\x08\x12\x00")
    assert main(["bench", str(model), "--device", "cuda"]) == 1
    assert "has no CUDAExecutionProvider" in capsys.readouterr().err
