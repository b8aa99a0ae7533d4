"""The command line, from file to file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tncompile.cli import main
from tncompile.cost.devices import default_profile
from tncompile.ir import text as ir_text
from tncompile.passes import DEFAULT
from tncompile.passes.pipeline import PASSES


class TensorTrain(torch.nn.Module):
    """24 -> 30 as a train of two cores, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(4, 5, 3, generator=generator))
        self.second = torch.nn.Parameter(torch.randn(3, 6, 6, generator=generator))
        self.head = torch.nn.Linear(30, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bij,ior,rjp->bop", x.reshape(-1, 4, 6), self.first, self.second)
        return self.head(y.reshape(-1, 30).relu())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model under a name that says nothing of its kind."""
    path = tmp_path_factory.mktemp("model") / "model.bin"
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},)
    before = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False
    try:
        program = torch.export.export(TensorTrain().eval(), (torch.randn(3, 24),), dynamic_shapes=shapes)
    finally:
        torch.backends.opt_einsum.enabled = before
    with path.open("wb") as file:
        torch.export.save(program, file)
    return path


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    """The same model, compiled."""
    path = model.with_name("model.onnx")
    assert main([str(model), "-o", str(path), "-q"]) == 0
    return path


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it."""
    command = [sys.executable, "-m", "tncompile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_compile_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    done = run(str(model), "-o", "out.onnx", "--batch", "1,8", "--report", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "folded to dense: 2 cores are one" in done.stdout and "check passed" in done.stdout
    assert "order: 2 networks" in done.stderr  # progress, where it does not mix with the result
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["batches"] == [1, 8] and report["check"]["passed"]
    network = report["networks"][0]
    assert network["parameters"] == 60 + 108 and network["dense_parameters"] == 24 * 30
    assert {*network["costs"]} == {"1", "8"} and {*network["costs"]["8"]} == {"naive", "dense", "chosen"}
    assert [p["name"] for p in report["passes"]] == [p.name() for p in DEFAULT]


def test_the_compiled_file_computes_the_model(model: Path, compiled: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(compiled), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    with model.open("rb") as file:
        expected = torch.export.load(file).module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.run(["output"], {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_a_limit_of_memory(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    assert main([str(model), "-o", str(out), "--max-memory", "100B", "-q"]) == 1
    assert "cannot be computed in 0.0001 MB at batch 32" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit) as usage:
        main([str(model), "-o", str(out), "--max-memory", "12x"])
    assert usage.value.code == 2
    assert (
        main([str(model), "-o", str(out), "--max-memory", "1.5MiB", "--store", "folded", "--report", str(report), "-q"])
        == 0
    )
    assert main(["inspect", str(model), "--after", "limit", "--max-memory", "1.5MiB"]) == 0
    assert ir_text.parse(capsys.readouterr().out).networks[0].terms[0].steps is not None
    data = json.loads(report.read_text())
    assert max(data["networks"][0]["memory"].values()) <= 1.5 * 2**20
    assert data["storage"]["asked"] == "folded" and data["size"] == data["storage"]["folded_bytes"]


def test_quiet_prints_nothing(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "-o", str(tmp_path / "out.onnx"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_inspect_a_model_and_a_compiled_file(model: Path, compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    traced = ir_text.parse(capsys.readouterr().out)
    assert main(["inspect", str(model), "--after", "merge_cores"]) == 0
    merged = ir_text.parse(capsys.readouterr().out)
    assert len(traced.networks) > len(merged.networks) == 2
    assert [t.name for t in merged.networks[0].cores] == ["first", "second"]
    assert main(["inspect", str(compiled)]) == 0
    final = ir_text.parse(capsys.readouterr().out)
    assert [t.name for t in final.networks[0].cores] == ["first*second"]
    assert final.networks[0].terms[0].steps is not None


@pytest.mark.parametrize("form", ["json", "dot", "networkx"])
def test_inspect_formats(compiled: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(compiled), "--format", form]) == 0
    text = capsys.readouterr().out
    assert "first*second" in text
    if form == "dot":
        assert text.startswith("digraph")
    else:
        assert json.loads(text)["nodes"]


def test_verify(model: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), str(compiled)]) == 0
    assert capsys.readouterr().out.startswith("passed")
    tampered = onnx.load(compiled)
    weight = next(i for i in tampered.graph.initializer if i.name.startswith("first*second"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    wrong = tmp_path / "wrong.onnx"
    onnx.save(tampered, wrong)
    assert main(["verify", str(model), str(wrong)]) == 1
    assert capsys.readouterr().out.startswith("FAILED")


def test_verify_on_examples(model: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = tmp_path / "inputs.npz"
    np.savez(example, x=np.ones((4, 24)))
    assert main(["verify", str(model), str(compiled), "--example", str(example)]) == 0
    assert "example 0" in capsys.readouterr().out
    np.savez(example, y=np.ones((4, 24)))
    assert main(["verify", str(model), str(compiled), "--example", str(example)]) == 1
    assert "the example has y; the inputs are x" in capsys.readouterr().err


def test_passes_are_chosen_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert main([str(model), "-o", str(out), "-q", "--passes", "clean,order{max_trials=4}"]) == 0
    assert main(["inspect", str(out)]) == 0
    unfolded = ir_text.parse(capsys.readouterr().out)
    assert len(unfolded.networks) > 2
    assert main([str(model), "-o", str(out), "--passes", "clean,nonsense"]) == 1
    known = f"the passes are {', '.join(PASSES)}"
    assert f"no pass 'nonsense'; {known}" in capsys.readouterr().err
    assert main([str(model), "-o", str(out), "--passes", "order{trials=4}"]) == 1
    assert "order has no option 'trials'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.pt"],
        ["model.pt", "-o"],
        ["model.pt", "-o", "x", "--batch", "0"],
        ["model.pt", "-o", "x", "--nonsense"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: tncompile MODEL -o OUT" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys\ntry:\n from tncompile.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'onnx', 'onnxruntime', 'cotengra', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "usage: tncompile MODEL -o OUT" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_the_profile_is_chosen_and_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file, report = tmp_path / "out.onnx", tmp_path / "profile.json", tmp_path / "report.json"
    slow_start = replace(default_profile("cuda"), device="some accelerator")
    file.write_text(slow_start.to_json())
    assert main([str(model), "-o", str(out), "--profile", str(file), "--report", str(report)]) == 0
    assert "planned for some accelerator" in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert told["device"] == "some accelerator" and told["profile"] == str(file)
    assert main([str(model), "-o", str(out), "--profile", "default", "--report", str(report)]) == 0
    again = json.loads(report.read_text())
    assert again["profile"] == "shipped default"
    seconds = [r["networks"][0]["costs"]["32"]["chosen"]["seconds"] for r in (told, again)]
    assert seconds[0] > slow_start.node and seconds[0] != seconds[1]
    file.write_text("{")
    out.unlink()
    for command in (["-o", str(out)], []):
        arguments = [str(model), *command] if command else ["inspect", str(model), "--after", "order"]
        assert main([*arguments, "--profile", str(file)]) == 1
        assert "not a device profile: damaged JSON" in capsys.readouterr().err
    assert not out.exists()
