"""benchmarks.pretrained: rivals that compute what they should, metrics, verdicts, and runs that go on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import pretrained, pretrained_data, pretrained_metrics, pretrained_report, pretrained_worker
from benchmarks import pretrained_ways as ways
from benchmarks.models import Case, Loaded
from benchmarks.pretrained_cases import PRETRAINED, Pretrained
from tncompile.errors import TNCompileError
from tncompile.runtime.probe import Probe


def of_rank(rank: int, *shape: int) -> torch.Tensor:
    rows, columns = shape[0], int(np.prod(shape[1:]))
    return (torch.randn(rows, rank) @ torch.randn(rank, columns)).reshape(shape) / columns


class Padded(nn.Conv2d):
    """Pads by itself, as convolutions of EfficientNet do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.static_padding(x))


def network() -> nn.Module:
    """A stem too small to be decomposed, a convolution that pads by itself, a depthwise one, a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), Padded(16, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32)]
    result = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 3 * 3, 32))
    with torch.no_grad():
        result[2].weight.copy_(of_rank(4, 32, 16, 3, 3))
        result[6].weight.copy_(of_rank(4, 32, 288))
    return result.eval()


X = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.75, 0.33])
def test_low_rank_is_exact_where_the_weights_are(share: float) -> None:
    module = network()
    split = ways.low_rank(module, share)
    assert isinstance(split[2], nn.Sequential) and isinstance(split[6], nn.Sequential)
    assert isinstance(split[0], nn.Conv2d) and isinstance(split[4], nn.Conv2d)
    for k in (2, 6):
        weights = sum(p.numel() for n, p in split[k].named_parameters() if n.endswith("weight"))
        assert 0.85 * share * module[k].weight.numel() < weights <= share * module[k].weight.numel()
    torch.testing.assert_close(split(X), module(X), rtol=1e-4, atol=1e-5)


def test_low_rank_keeps_the_largest_singular_values() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 32, bias=False))
    split = ways.low_rank(layer, 0.5)
    found = split(torch.eye(48)).T
    kept = int(0.5 * 48 * 32 / 80)
    s = torch.linalg.svdvals(layer[0].weight.detach())
    torch.testing.assert_close(torch.linalg.norm(found - layer[0].weight), s[kept:].norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["tt", "tucker"])
@pytest.mark.parametrize("implementation", ["reconstructed", "factorized"])
def test_tensorly_torch_gets_nearer_with_more_parameters(form: str, implementation: str) -> None:
    pytest.importorskip("tltorch")
    module = network()
    expected = module(X).detach()
    errors = []
    for share in (0.2, 0.9):
        found = ways.tensorized(module, form, share, implementation)
        assert ways.parameters(found) < ways.parameters(module)
        errors.append(float((found(X) - expected).norm() / expected.norm()))
    assert errors[1] < 0.9 * errors[0] and errors[1] < 0.75


def test_share_for_a_size() -> None:
    module = nn.Sequential(nn.Embedding(1000, 10), nn.Linear(100, 100, bias=False))
    assert ways.share_for(module, 60_000, 80_000) == pytest.approx(0.5)
    assert ways.share_for(module, 90_000, 80_000) == 1.0
    with pytest.raises(TNCompileError, match=r"takes more than 0\.03 MB"):
        ways.share_for(module, 30_000, 80_000)


# ------------------------------------------------------------------------------------ data and metrics


def test_pitch_is_counted_in_semitones() -> None:
    _, hertz = pretrained_data.tones("test", pretrained_metrics.TONES)
    cents = 20 * torch.arange(360) + 1997.3794084376191

    def tracker(shift: float) -> Any:
        waiting = list(torch.split(1200 * torch.log2(hertz / 10) + shift, 16))
        return lambda x: torch.exp(-((cents - waiting.pop(0)[: len(x), None]) ** 2) / (2 * 25**2))

    assert pretrained_metrics.pitch(tracker(0.0)) == pytest.approx(0.0, abs=0.01)
    assert pretrained_metrics.pitch(tracker(100.0)) == pytest.approx(-1.0, abs=0.01)


def test_digits_and_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pretrained_data.VARIABLE, str(tmp_path))
    with pytest.raises(TNCompileError, match="no such file"):
        pretrained_data.digits("test")
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 784), np.uint8)
    pixels[:, :2] = np.arange(10_000, dtype=">u2").view(np.uint8).reshape(-1, 2)  # which digit it is
    (tmp_path / "mnist").mkdir()
    labels = (np.arange(10_000) % 10).astype(np.uint8)
    for name, head, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        (tmp_path / "mnist" / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + content.tobytes(), 1))

    def numbers(images: torch.Tensor) -> torch.Tensor:
        raw = (images.flatten(1)[:, :2] * 0.3081 + 0.1307) * 255
        return (256 * raw[:, 0] + raw[:, 1]).round().long()

    (seen, _), (unseen, truth) = (pretrained_data.digits(part) for part in ("calibration", "test"))
    assert sorted([*numbers(seen).tolist(), *numbers(unseen).tolist()]) == list(range(10_000))
    assert torch.equal(numbers(unseen) % 10, truth)
    right = pretrained_metrics.digits(lambda x: nn.functional.one_hot(numbers(x) % 10, 10).float().numpy())
    assert right == 1.0
    assert pretrained_metrics.digits(lambda x: torch.eye(10)[[0] * len(x)]) == pytest.approx(0.1, abs=0.01)


def test_parts_of_the_tones_differ() -> None:
    (a, _), (b, _), (again, _) = (pretrained_data.tones(part, 8) for part in ("calibration", "test", "test"))
    assert torch.equal(b, again) and torch.cdist(a, b).min() > 1.0
    torch.testing.assert_close(b.std(1, correction=0), torch.ones(8))


def test_metrics_are_named_as_the_command_line_takes_them() -> None:
    for case in PRETRAINED.values():
        module, _, function = case.metric_name.partition(":")
        assert module == "benchmarks.pretrained_metrics"
        searched = getattr(pretrained_metrics, function)  # the same number, of other data than it is judged on
        assert searched.func is case.metric and searched.keywords == {"part": "calibration"}


# ------------------------------------------------------------------------------------ steps


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch) -> str:
    calibration = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    module = network()

    def metric(run: Any) -> float:
        found, expected = torch.as_tensor(run(X)), module(X)
        return -float((found - expected).norm() / expected.norm())

    case = Pretrained("small", metric, "error", lambda: (calibration,), (1, 2))
    monkeypatch.setattr(pretrained_worker, "PRETRAINED", {"small": case})
    monkeypatch.setattr(pretrained_worker, "CASES", {"small": Case("small", "A", lambda: Loaded(network(), (X,)))})
    return "small"


def step(name: str, folder: Path, case: str, **options: Any) -> dict[str, Any]:
    result = folder / "result.json"
    pretrained_worker.main(name, case, folder, result, {"threads": 1, "limit": 60.0, **options})
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


def test_steps_of_every_way(tmp_path: Path, small_case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tltorch")
    tried = iter([pretrained_worker.probe])  # the first file is called in a process of its own, which takes seconds
    monkeypatch.setattr(pretrained_worker, "probe", lambda *a, **k: next(tried, lambda *_, **__: Probe(1.0))(*a, **k))
    prepared = step("prepare", tmp_path, small_case)
    assert prepared["metric"] == 0.0 and prepared["calibration_rows"] == 32
    sizes, metrics = {}, {}
    expected = {"fp32": 1e-5, "int8 dynamic": 0.05, "int8 static, weighted only": 0.1, "SVD 0.5": 1e-4, "tt": 1.0}
    for way, error in expected.items():
        built = step("build", tmp_path, small_case, way=way, size=None)
        assert built.get("note") == "", built
        sizes[way] = built["bytes"]
        metrics[way] = step("score", tmp_path, small_case, way=way)["metric"]
        assert -error < metrics[way] <= 0.0, way
    assert metrics["int8 dynamic"] < metrics["fp32"] - 1e-4
    assert sizes["SVD 0.5"] < 0.7 * sizes["fp32"] and sizes["int8 dynamic"] < 0.6 * sizes["fp32"]
    raced = step("race", tmp_path, small_case, ways=list(expected), seconds=0.0)
    assert {*raced} == {"1", "2"} and all({*times} == {*expected} for times in raced.values())
    nodes = step("profile", tmp_path, small_case, way="fp32")["2"]
    assert any(op == "Conv" and us > 0 for _, op, us in nodes)
    assert step("build", tmp_path, small_case, way="tucker", size=10)["note"].startswith("fails: what is not in")
    assert step("build", tmp_path, small_case, way="SVD x")["note"].startswith("fails: could not convert")


# ------------------------------------------------------------------------------------ verdicts


def way(size: float, ms: float, drop: float = 0.0) -> dict[str, Any]:
    return {"note": "", "bytes": size * 1e6, "metric": 0.9 - drop, "drop": drop, "ms": {"1": ms, "8": 8 * ms}}


def record(**found: Mapping[str, Any]) -> dict[str, Any]:
    common = {"metric": 0.9, "metric_name": "m:digits", "unit": "right", "parameters": 9, "in_layers": 6}
    return {**common, "calibration_rows": 4, "max_drop": 0.01, "machine": "M", "threads": 1, "ways": found}


def judged(**found: Mapping[str, Any]) -> pretrained_report.Verdict:
    result = pretrained_report.verdict(record(**found))
    assert result is not None
    return result


def test_verdict() -> None:
    rivals = {"fp32": way(8, 2.0), "int8": way(2, 1.5), "bad": way(1, 0.5, drop=0.3)}
    ahead = judged(tncompile=way(2, 1.1), **rivals)
    assert ahead.kept and ahead.ahead and not ahead.behind
    assert ahead.smaller == pytest.approx(1.0) and ahead.faster["8"] == pytest.approx(1.5 / 1.1)
    level = judged(tncompile=way(2.005, 1.55), **rivals)
    assert not level.behind and not level.ahead
    smaller = judged(tncompile=way(0.9, 3.0), **rivals)
    assert smaller.ahead and not smaller.behind
    assert judged(tncompile=way(2, 1.7), **rivals).behind == (("int8", "1"), ("int8", "8"))
    lost = judged(tncompile=way(1, 0.1, drop=0.011), **rivals)
    assert not lost.kept and not lost.ahead
    assert pretrained_report.verdict(record(**rivals)) is None
    assert not pretrained_report.keeps(record(), {"drop": float("nan")})
    assert pretrained_report.keeps(record(), {"drop": 0.9 - 0.89})


def records() -> dict[str, dict[str, Any]]:
    slow = {**way(8, 2.0), "share": 0.5, "implementation": "factorized"}
    failed = {"note": "fails: a|b <c>", "size": None}
    one = record(fp32=way(8, 2.0), tncompile=way(2, 1.1), int8=way(4, 1.5), tt=slow, bad=way(1, 0.5, 0.3), no=failed)
    one["ways"]["fast at 8"] = {**way(8, 2.0), "ms": {"1": 3.0, "8": 5.0}}
    return {"one": one, "two": record(fp32=way(8, 2.0), tncompile={"note": "> 5 s"})}


def test_table(tmp_path: Path) -> None:
    text = pretrained_report.markdown(records())
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {8}
    rows = {line.split("|")[1].strip(): line for line in tables[:9]}
    assert rows["int8"].endswith("| behind tncompile |") and rows["tncompile"].endswith("| on the front |")
    assert rows["bad"].endswith("| loses too much |")
    assert rows["fast at 8"].endswith("| on the front at batch 8 only |")
    assert rows["no"].endswith("| fails: a\\|b \\<c> |") and "tensorly-torch tt, 50%, factorized" in rows
    assert "one: never behind; speed over the fastest other way 1.36 at batch 1" in text and "two: > 5 s" in text
    assert "never behind on 1 of 1 cases; 1.3 times faster or 2 times smaller than the best of the others on 1" in text
    document = f"a\n{pretrained_report.BEGIN}\nold\n{pretrained_report.END}\nb\n"
    assert "old" not in pretrained_report.filled(document, text)
    with pytest.raises(TNCompileError, match="nothing was measured"):
        pretrained_report.markdown({})


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = pretrained_report.plot(records(), tmp_path)
    assert "<svg" in svg.read_text() and png.read_bytes().startswith(b"\x89PNG")
    assert pretrained_report.plot({"two": record(no={"note": "x"})}, tmp_path) == []


# ------------------------------------------------------------------------------------ runs


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    size = 500_000

    def told(bench: pretrained.Bench, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        done.append(name if "way" not in options else f"{name} {options['way']}")
        if "SVD" in done[-1]:
            return {"note": "fails: so it is"}
        if name == "prepare":
            return {key: value for key, value in record().items() if key not in ("ways", "max_drop")}
        if name == "race":
            return {batch: dict.fromkeys(options["ways"], 1.0) for batch in ("1", "8")}
        return {"metric": 0.895} if name == "score" else {"note": "", "bytes": 1_000_000}

    monkeypatch.setattr(pretrained.Bench, "_step", told)
    monkeypatch.setattr(pretrained.Bench, "_ours", lambda _: {"note": "", "bytes": size})
    monkeypatch.setattr(pretrained_report, "plot", lambda *_: [])
    arguments = ["--only", "crepe_tiny", "--out", str(tmp_path)]
    assert pretrained.main([*arguments, "--ways", "fp32,int8 dynamic"]) == 0
    assert done == ["prepare", "build fp32", "score fp32", "build int8 dynamic", "score int8 dynamic", "race"]
    done.clear()
    assert pretrained.main(arguments) == 0
    assert "build fp32" not in done and done.count("race") == 1 and "score SVD 0.5" not in done
    assert {"score tncompile", "build tt", "score tucker", "score int8 static"} <= {*done}
    done.clear()
    assert pretrained.main(arguments) == 0 and done == []
    size = 400_000  # another file of ours: those of its size are made anew, and all are timed again
    assert pretrained.main([*arguments, "--ways", "tncompile", "--again"]) == 0
    assert pretrained.main(arguments) == 0
    assert done == [
        *("score tncompile", "race", "build tt", "score tt", "build tucker", "score tucker", "race"),
    ]
    stored = json.loads((tmp_path / "pretrained.json").read_text())["crepe_tiny"]
    assert stored["ways"]["tt"]["size"] == 400_000 and stored["ways"]["SVD 0.5"]["note"] == "fails: so it is"
    assert stored["ways"]["fp32"]["drop"] == pytest.approx(0.005)


def test_ours_is_called_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the command, which is checked elsewhere."""
    monkeypatch.setattr(pretrained, "COMMAND", "--version {model} {metric}")
    options = pretrained.parser().parse_args(["--out", str(tmp_path)])
    bench = pretrained.Bench("crepe_tiny", options)
    bench.folder.mkdir()
    found = bench._ours()
    assert found["note"].startswith("fails:") and "benchmarks.pretrained_metrics:search_pitch" in found["command"]
    assert (bench.folder / "tncompile.log").exists()


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrained.main(["--only", "nothing"])
    assert stopped.value.code == 2 and "no case nothing; the cases are ccexam_mnist" in capsys.readouterr().err
    assert pretrained.main(["--only-report", "--out", str(tmp_path), "--docs", str(tmp_path / "no.md")]) == 1
    assert pretrained.main(["--only-report", "--out", str(tmp_path)]) == 1
    assert "nothing was measured" in capsys.readouterr().err
