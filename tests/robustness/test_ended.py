"""A compile that is killed, interrupted or out of disk leaves the old output, or the new one, or none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import tncompile.compiler
from tests.robustness.killed import model
from tncompile.cli import main
from tncompile.commands import tune
from tncompile.cost.devices import default_profile
from tncompile.errors import OutputError
from tncompile.runtime import temporary
from tncompile.runtime.files import check_writable, write_file, write_files
from tncompile.runtime.signals import Terminated, deferred, raised

FULL = OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("case", ["over one file", "over two files"])
def test_ended_at_every_moment(case: str) -> None:
    """In a process of its own, since it makes copies of itself: SIGKILL, SIGTERM and SIGINT at each file it touches."""
    command = [sys.executable, "-m", "tests.robustness.killed", case]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(", ")[1].split(":")[0] for line in lines] == ["SIGKILL", "SIGTERM", "SIGINT"]
    assert all("old" in line and "new" in line for line in lines)
    assert "none" not in "".join(lines[1:])


def test_signals_wait_for_what_must_not_be_half_done() -> None:
    done = []
    with pytest.raises(Terminated) as ended, raised(), deferred():
        signal.raise_signal(signal.SIGTERM)
        done.append(1)
    assert done == [1] and ended.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1, 2]


def test_what_a_killed_process_left_goes_with_the_next_and_what_another_uses_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    litter = tmp_path / ".out.onnx.abcdefgh"
    litter.write_bytes(b"half")
    (tmp_path / ".tncompile-abcdefgh").mkdir()
    (tmp_path / ".tncompile-abcdefgh" / "model.onnx.data").write_bytes(b"half")
    mine = [".out.onnx.abc", ".out.onnx.abcdefgh.txt", "out.onnx.abcdefgh", ".other.abcdefgh"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    with temporary.file_beside(out) as used, temporary.folder_in(tmp_path) as folder:
        write_file(out, b"new")
        with temporary.folder_in(tmp_path):
            assert used.exists() and folder.exists() and not litter.exists()
    assert {*contents(tmp_path)} == {"out.onnx", *mine}


# ------------------------------------------------------------------------------- full disks


def full(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk be full for temporary files of this name."""
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{handle}") or name in os.readlink(f"/proc/self/fd/{handle}"):
            raise FULL
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["out.onnx", "model.onnx.data", "report.json"])
def test_a_full_disk(
    name: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "model.onnx", tmp_path / "out"
    folder.mkdir()
    source.write_bytes(model(1.0))
    arguments = [str(source), "-o", str(folder / "out.onnx"), "--report", str(folder / "report.json"), "-q"]
    if "data" in name:
        arguments.append("--external-data")
    if old:
        assert main(arguments) == 0
    before = contents(folder)
    source.write_bytes(model(2.0))
    full(monkeypatch, name)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tncompile: {folder}") and said.count("\n") == 1
    assert "No space left on device); free some space, or write to another place" in said
    after = contents(folder)
    if name == "report.json":  # the model was written before it
        assert after.pop("out.onnx") and after.get("report.json") == before.get("report.json")
    else:
        assert after == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(model(1.0))
    assert main([str(source), "-o", str(out), "--report", "/dev/full", "-q"]) == 1
    assert "/dev/full: cannot be written (No space left on device); free some" in capsys.readouterr().err
    assert main([str(source), "-o", str(out), "--report", "/dev/null", "-q"]) == 0
    assert not Path("/dev/null").is_file() and {*contents(tmp_path)} == {"model.onnx", "out.onnx"}
    with open("/dev/full", "w") as nowhere:
        command = [sys.executable, "-m", "tncompile", "inspect", str(out)]
        done = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("tncompile: standard output: cannot be written (No space left")
    assert done.stderr.count("\n") == 1


def test_a_limit_of_file_sizes(tmp_path: Path) -> None:
    """The same through the system itself: the limit holds for a process of its own."""
    source, folder = tmp_path / "model.onnx", tmp_path / "out"
    folder.mkdir()
    source.write_bytes(model(1.0))
    code = (
        "import resource, sys; from tncompile.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        f"sys.exit(main([{str(source)!r}, '-o', {str(folder / 'out.onnx')!r}, '-q', '--external-data']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ulimit -f" in done.stderr and done.stderr.count("\n") == 1
    assert contents(folder) == {}


def test_other_files_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="No space left"):
        tncompile.save(torch.nn.Linear(2, 2).eval(), (torch.ones(2, 2),), tmp_path / "model.pt")
    monkeypatch.setattr(tune, "_measure", lambda device, threads: default_profile(device))
    assert main(["tune", "--device", "--output", str(tmp_path / "profile.json")]) == 1
    assert f"{tmp_path / 'profile.json'}: cannot be written (No space left" in capsys.readouterr().err
    assert contents(tmp_path) == {}


def test_the_cache_of_times_is_not_worth_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tncompile.errors import TNCompileWarning
    from tncompile.runtime.tuner import TimeStore

    monkeypatch.setenv("TNCOMPILE_CACHE", str(tmp_path))
    for damaged in (b"", b"[1]", b'{"a": "b"}', b"\xff\xfe", b'{"a":' * 100_000, json.dumps({"a": [1]}).encode()):
        (tmp_path / "times.json").write_bytes(damaged)
        assert TimeStore().seconds == {}

    def refuse(handle: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(TNCompileWarning, match="times.json: cannot be written"):
        TimeStore().put({"a": 1.0})
    assert {*contents(tmp_path)} == {"times.json"}


# ------------------------------------------------------------------------------------ paths


def test_paths_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(model(1.0))
    old = tmp_path / "old.onnx"
    old.write_bytes(b"old")
    data = tmp_path / "m.onnx.data"
    os.link(source, data)
    before = contents(tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != old and access(p, mode))
    for out, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "out.onnx", "does not exist; make it first"),
        (source, "is the model itself"),
        (tmp_path / "m.onnx", "m.onnx.data: is the model itself"),
        (old, "is read-only; make it writable, or write to another file"),
        (tmp_path / ("x" * 300), "File name too long); choose a shorter name"),
    ):
        assert main([str(source), "-o", str(out), "-q"]) == 1
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1 and str(out) in message
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path)
    with pytest.raises(OutputError, match="is not writable; write to another one"):
        check_writable(tmp_path / "out.onnx")
    assert main(["bench", str(source), "--json", str(source)]) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("taken", ["out.onnx", "out.onnx.data", "report.json", "out.b1.onnx.data"])
def test_no_part_of_the_model_is_written_over(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard of weights where any file would be written: told before any work."""
    shard = tmp_path / taken
    save_file({"weight": np.ones((3, 2), np.float32)}, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": taken}}))
    before = contents(tmp_path)
    monkeypatch.setattr(tncompile.compiler, "compile_file", lambda *_, **__: pytest.fail("was compiled"))
    device = ["--device", "cuda"] if ".b1." in taken else []
    for source in (index, tmp_path):
        flags = ["-o", str(tmp_path / "out.onnx"), "--report", str(tmp_path / "report.json"), "-q", *device]
        assert main([str(source), "--model", "torch.nn:Identity", *flags]) == 1
        assert f"{shard}: is the model itself" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_of_several_files_the_last_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment does the model that is there name weights that are not its own."""
    data, out = tmp_path / "data", tmp_path / "model"
    write_files({data: b"1", out: b"1"})
    seen: list[dict[str, bytes]] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        seen.append({n: d for n, d in contents(tmp_path).items() if not n.startswith(".")})

    monkeypatch.setattr(os, "replace", watched)
    write_files({data: b"2", out: b"2"})
    assert seen == [{"data": b"1"}, {"data": b"2"}, {"data": b"2", "model": b"2"}]
    assert contents(tmp_path) == seen[-1]
