"""Runs mutants through the command line, in a process that may crash, hang or run out of memory without harm."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from tests.robustness.mutate import MARK, mutant
from tests.robustness.seeds import Seed

CPU_SECONDS = 60  # far more than any of these files needs
MEMORY = 4 << 30  # bytes of addresses beyond what the process has at first: what asks for more is told so
RESIDENT = 3 << 27  # bytes that reading a small file may really take

_STARTS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")


@dataclass(frozen=True)
class Outcome:
    """How one mutant ended: ``compiled``, ``refused``, or, as a finding, anything else, with its `detail`."""

    kind: str
    index: int
    name: str
    detail: str = ""

    @property
    def finding(self) -> bool:
        """Whether this must not happen."""
        return self.name not in ("compiled", "refused", "the same")


def write_mutant(seeds: dict[str, Seed], kind: str, index: int, seed: int, folder: Path) -> bool:
    """Write the files of mutant `index` of a kind; False where it is no other than the seed."""
    random = Random(f"{seed} {kind} {index}")
    whole = seeds[kind]
    others = [s.files[s.target] for s in seeds.values()]
    damaged = mutant(random, whole.files[whole.target], whole.format, others)
    for name, data in whole.files.items():
        (folder / name).write_bytes(damaged if name == whole.target else data)
    return damaged != whole.files[whole.target]


def serve(connection: Connection, seeds: dict[str, Seed], seed: int, folder: Path) -> None:
    """Take (kind, index) from the connection and send an Outcome for each, until the connection is closed."""
    from tncompile.cli import main

    os.chdir(folder)
    sys.setrecursionlimit(1000)
    _limit_memory()
    events: list[str] = []
    sys.addaudithook(
        lambda event, arguments: events.append(f"{event} {arguments!r:.200}") if event in _STARTS_CODE else None
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            kind, index = connection.recv()
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            os.chdir(work)
            changed = write_mutant(seeds, kind, index, seed, work)
            events.clear()
            name, detail = _run(main, seeds[kind])
            if name == "compiled" and not changed:
                name = "the same"
            if events:
                name, detail = "started code", events[0]
            if (work / MARK).exists() or (folder / MARK).exists():
                name, detail = "ran code", detail
            connection.send(Outcome(kind, index, name, detail))


def _run(main: Any, seed: Seed) -> tuple[str, str]:
    """What the command line makes of the files in the current directory."""
    before = _resident()
    out = Path("compiled.onnx")
    arguments = [*seed.arguments]
    if arguments[0] not in ("inspect", "verify"):
        arguments += ["-o", str(out), "--batch", "2", "-q"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(arguments)
    except BaseException as error:  # what a user would see as a traceback
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return "traceback", f"{type(error).__name__}: {str(error)[:160]} at {' '.join(where[-12:])}"
    message = errors.getvalue()
    grown = _resident(peak=True) - before
    if grown > RESIDENT:
        return "memory", f"{grown >> 20} MiB: {message[:200]}"
    if code == 0:
        return "compiled", message
    if code != 1:
        return "odd exit", f"{code}: {message}"
    left = [p.name for p in Path(".").iterdir() if p.name not in (*seed.files, MARK)]
    if left:
        return "left over", f"{left}: {message}"
    if "verify" in arguments and "FAILED" in printed.getvalue():
        return "refused", message
    last = message.rstrip().splitlines()
    lines = [line for line in last if not line.startswith("tncompile: note:")]
    if not lines or not lines[0].startswith("tncompile: ") or not _names(seed, lines[0]):
        return "unclear", message[:500]
    return "refused", message


def _names(seed: Seed, line: str) -> bool:
    return any(re.search(rf"(^|\W){re.escape(name)}", line) for name in seed.files)


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident(peak: bool = False) -> int:
    """Bytes of memory in use, or at most since the last call that asked for those in use."""
    if not peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB" if peak else r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0
