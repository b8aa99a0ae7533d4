"""`tncompile tune --device`, with a stopwatch that answers at once and one that really runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tncompile.cli import main
from tncompile.cost import devices
from tncompile.cost.profile import DeviceProfile
from tncompile.runtime import measure
from tncompile.runtime.primitives import PRIMITIVES, Primitive, core_left


class FakeStopwatch:
    """Every primitive takes a microsecond and a nanosecond a unit of work."""

    def __init__(self, primitives: list[Primitive], device: str = "cpu", threads: int = 0) -> None:
        measure._providers(device)
        self.primitives = primitives

    def run(self, seconds: float, progress: measure.Progress) -> tuple[float, list[float]]:
        progress(0.5)
        return 1e-6, [1e-6 + 1e-9 * p.work for p in self.primitives]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Stopwatch", FakeStopwatch)


def test_tune_stores_what_compile_then_reads(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "profile.json"
    monkeypatch.setenv(devices.VARIABLE, str(path))
    assert main(["tune", "--device"]) == 0
    printed = capsys.readouterr().out
    assert f"stored in {path}" in printed.replace("\n", "") and "GFLOP/s" in printed
    profile = devices.choose().profile
    assert profile.measured and profile.device == devices.machine("cpu")
    assert profile.matmul_time(1, 16, 64, 64, 4) == pytest.approx(1e-6 + 1e-9 * 16 * 64 * 64, rel=1e-3)
    assert profile.flops == pytest.approx(2e9, rel=0.1)


def test_tune_writes_where_it_is_told(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "here.json"
    assert main(["tune", "--device", "cpu", "--output", str(path)]) == 0
    first = path.read_text()
    assert DeviceProfile.from_json(first).measured
    assert main(["tune", "--device", "cpu", "--output", str(path)]) == 0
    assert path.read_text() == first


def test_tune_refuses(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--device", "--output", str(tmp_path / "no" / "x.json")]) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(devices.VARIABLE, str(tmp_path / "file" / "x.json"))
    assert main(["tune", "--device"]) == 1
    assert "choose another place with --output" in capsys.readouterr().err
    monkeypatch.setattr(measure, "available_providers", lambda: ["CPUExecutionProvider"])
    out = tmp_path / "cuda.json"
    assert main(["tune", "--device", "cuda", "--output", str(out)]) == 1
    assert "no CUDAExecutionProvider in this ONNX Runtime" in capsys.readouterr().err and not out.exists()
    for wrong in ([], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stop:
            main(["tune", *wrong])
        assert stop.value.code == 2


def test_tune_keeps_the_profile_of_another_kind_of_device(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TNCOMPILE_PROFILE names one file, whatever is measured."""
    path = tmp_path / "mine.json"
    monkeypatch.setenv(devices.VARIABLE, str(path))
    assert main(["tune", "--device"]) == 0
    assert main(["tune", "--device"]) == 0
    before = path.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(measure, "available_providers", lambda: ["CUDAExecutionProvider"])
    assert main(["tune", "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert f"{path}: is a profile of cpu" in said and "--output" in said and devices.VARIABLE in said
    assert path.read_bytes() == before
    monkeypatch.delenv(devices.VARIABLE)
    assert main(["tune", "--device", "cuda", "--output", str(path)]) == 0


def test_every_primitive_runs() -> None:
    points = [(name, grid.points()[len(grid.points()) // 3]) for name, grid in measure.GRIDS.items()]
    primitives = [PRIMITIVES[name](*point) for name, point in points] + [core_left(2, 3, 4, 5)]
    shares: list[float] = []
    node, times = measure.Stopwatch(primitives).run(0.01, shares.append)
    assert node > 0 and len(times) == len(primitives) and all(0 < t < 10 for t in times)
    assert shares and all(0 <= share <= 1 for share in shares)


def test_noise_is_taken_out_of_a_table() -> None:
    grid = measure.GRIDS["matmul"]

    def law(m: int, k: int, n: int) -> float:
        return 1e-6 + 2e-11 * m * k * n

    true = {p: law(*p) for p in grid.points() if p[0] * p[1] * p[2] <= grid.work}
    assert measure.fill("matmul", true)(64, 64, 64) == pytest.approx(law(64, 64, 64), rel=1e-9)
    noisy = dict(true)
    for point in ((64, 64, 64), (1, 1, 1), (256, 256, 512)):  # other work at that moment
        noisy[point] *= 100
    table = measure.fill("matmul", noisy)
    for point, seconds in table.points():
        if point in true:
            assert true[point] * 0.999 <= seconds <= true[point] * 1.5 + 5e-6, point


def test_what_was_not_measured_grows_in_proportion() -> None:
    grid = measure.GRIDS["matmul"]
    known = {p: 1e-12 * p[0] * p[1] * p[2] for p in grid.points() if p[0] * p[1] * p[2] <= grid.work}
    table = measure.fill("matmul", known)
    assert table(4096, 2048, 2048) == pytest.approx(1e-12 * 4096 * 2048 * 2048, rel=1e-6)
