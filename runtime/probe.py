"""A model's first call in a process of its own, with a limit to its time and its memory.

What asks for terabytes, or for minutes, is then a note and not the end of this process or of the machine. As a module
(``python -m tncompile.runtime.probe``) this is that process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tncompile.ir import Array

_KILLED = 9
"""SIGKILL, which not every system has a name for: what Linux sends where memory is out."""


@dataclass(frozen=True)
class Limits:
    """What a way to run a model may take: seconds for its first call (load included) and to build it, and memory."""

    first_call_s: float = 20.0
    build_s: float = 120.0
    gigabytes: int = 8


@dataclass(frozen=True)
class Probe:
    """The first call of a model: its ms and the growth of resident memory in bytes, or why there are none.

    The memory is the peak of loading and running the model less what the process had with onnxruntime imported; None
    where the system does not say.
    """

    ms: float | None
    memory: int | None = None
    note: str = ""


def probe(model: Path, arrays: Mapping[str, Array], limits: Limits, *, device: str = "cpu", threads: int = 0) -> Probe:
    """Load an ONNX file and run it once in a subprocess, on arrays as `Session.feeds` takes them."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs.npz")
        np.savez(inputs, **arrays)  # type: ignore[arg-type]
        arguments = [str(model), str(inputs), str(limits.gigabytes), device, str(threads)]
        command = [sys.executable, "-m", "tncompile.runtime.probe", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limits.first_call_s)
        except subprocess.TimeoutExpired:
            return Probe(None, note=f"> {limits.first_call_s:g} s")
    if done.returncode == 0:
        ms, memory = json.loads(done.stdout.splitlines()[-1])
        return Probe(ms, memory)
    return Probe(None, note=_note(done.returncode, done.stderr, limits.gigabytes))


def _note(code: int, stderr: str, gigabytes: int) -> str:
    """Why a process ended with an exit code other than 0; a negative one is that of a signal.

    What may take no more memory says so before it ends, or is killed by the system. Any other signal is a crash.
    """
    if code == -_KILLED or "alloc" in stderr or "MemoryError" in stderr:
        return f"> {gigabytes} GB"
    if code < 0:
        return f"crashes: {_signal(-code)}"
    return f"fails: {_reason(stderr)}"


def _signal(number: int) -> str:
    """``SIGSEGV``, or ``signal 34`` of those that have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def _run(model: str, inputs: str, gigabytes: int, device: str, threads: int) -> None:
    from tncompile.runtime.device import providers
    from tncompile.runtime.session import Session

    with np.load(inputs, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    choice = providers(device)
    if device == "cpu":  # a GPU's driver maps more address space than any model takes
        _limit_memory(gigabytes)
    before = _resident(reset=True)
    session = Session(model, choice, threads=threads)
    start = time.perf_counter()
    session.run(session.feeds(arrays))
    ms = (time.perf_counter() - start) * 1e3
    after = _resident()
    print(json.dumps([ms, after - before if before is not None and after is not None else None]))


def _limit_memory(gigabytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30,) * 2)


def _resident(reset: bool = False) -> int | None:
    """The peak of resident memory in bytes since the last reset, where Linux tells it."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return None if line is None else int(line.split()[1]) * 1024


if __name__ == "__main__":
    _model, _inputs, _gigabytes, _device, _threads = sys.argv[1:]
    _run(_model, _inputs, int(_gigabytes), _device, int(_threads))
