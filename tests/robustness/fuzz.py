"""Damage small files of every kind and let the command line read them: nothing may happen but an answer or a refusal.

    python -m tests.robustness.fuzz --count 2000 --seed 0
    python -m tests.robustness.fuzz --show "TorchScript" 17 --folder somewhere

Prints how many of each kind were compiled and refused, and every finding with the number that makes it again; exit 1
where there is one.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.robustness.mutate import zeros
from tests.robustness.seeds import Seed, seeds
from tests.robustness.worker import Outcome, serve, write_mutant

_SECONDS = 300.0  # a process that answers not at all, and computes nothing either
_PER_PROCESS = 80  # mutants; then a fresh one, so that no mutant is judged by what others left

_FORK = multiprocessing.get_context("fork")
Task = tuple[str, int]


@dataclass
class Worker:
    """One process at work, and what it works on."""

    process: Any
    connection: Connection
    folder: tempfile.TemporaryDirectory[str]
    task: Task | None = None
    since: float = field(default_factory=time.monotonic)
    done: int = 0

    @classmethod
    def start(cls, files: dict[str, Seed], seed: int) -> Worker:
        """A new process, a copy of this one."""
        ours, theirs = _FORK.Pipe()
        folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(
            prefix="fuzz-", ignore_cleanup_errors=True
        )
        process = _FORK.Process(target=_serve, args=(ours, theirs, files, seed, Path(folder.name)), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours, folder)

    def give(self, task: Task) -> None:
        """Let it run one more."""
        self.task, self.since, self.done = task, time.monotonic(), self.done + 1
        self.connection.send(task)

    def outcome(self) -> Outcome | None:
        """What became of its task; None while it runs. A process that died or hangs is a finding."""
        assert self.task is not None
        try:
            if self.connection.poll():
                return self.connection.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            died = signal.Signals(-code).name if code < 0 else f"exit {code}"
            words = (Path(self.folder.name) / "stderr").read_text("utf-8", "replace").splitlines()[-2:]
            name = "too slow" if died in ("SIGXCPU", "SIGKILL") else "crash"
            return Outcome(*self.task, name, " ".join((died, *words)))
        if time.monotonic() - self.since > _SECONDS:
            return Outcome(*self.task, "hang", f"{_SECONDS:.0f} s")
        return None

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def _serve(ours: Connection, theirs: Connection, files: dict[str, Seed], seed: int, folder: Path) -> None:
    ours.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries of C++ print
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    serve(theirs, files, seed, folder)


def fuzz(files: dict[str, Seed], tasks: Iterator[Task], seed: int, jobs: int) -> Iterator[Outcome]:
    """The outcome of each task, as they come."""
    workers: list[Worker] = []
    try:
        while True:
            for task in itertools.islice(tasks, jobs - len(workers)):
                workers.append(Worker.start(files, seed))
                workers[-1].give(task)
            if not workers:
                return
            wait([w.connection for w in workers], timeout=1.0)
            for worker in [*workers]:
                outcome = worker.outcome()
                if outcome is None:
                    continue
                yield outcome
                task = next(tasks, None) if worker.process.is_alive() and worker.done < _PER_PROCESS else None
                if task is not None and outcome.name != "hang":
                    worker.give(task)
                    continue
                worker.stop()
                workers.remove(worker)
                if task is not None:
                    tasks = itertools.chain([task], tasks)
    finally:
        for worker in workers:
            worker.stop()


def made_apart() -> dict[str, Seed]:
    """The seeds, made in a process of their own: one that has run threads cannot be copied safely."""
    with _FORK.Pool(1) as pool:
        return pool.apply(seeds)


def _warm() -> None:
    """Import once what every process needs."""
    import tncompile.compiler
    import tncompile.frontend.files.torchscript
    import tncompile.frontend.onnx.importer
    import tncompile.frontend.script.module  # noqa: F401


def main() -> int:
    """Run and print; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutants in all, shared out evenly (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more after so long")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--kind", action="append", help="only these kinds")
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    parser.add_argument("--show", nargs=2, metavar=("KIND", "INDEX"), help="write one mutant's files and stop")
    parser.add_argument("--folder", type=Path, default=Path("mutant"))
    options = parser.parse_args()
    os.environ.update({"TNCOMPILE_PROFILE": "default", "OMP_NUM_THREADS": "1"})
    _warm()
    import torch

    torch.set_num_threads(1)
    if options.count > _PER_PROCESS:
        zeros()  # once, for all processes
    files = made_apart()
    if options.show:
        options.folder.mkdir(exist_ok=True)
        write_mutant(files, options.show[0], int(options.show[1]), options.seed, options.folder)
        print("tncompile", *files[options.show[0]].arguments)
        return 0
    kinds = options.kind or [*files]
    end = time.monotonic() + options.seconds
    every = ((kind, index) for index in itertools.count() for kind in kinds)
    tasks = itertools.takewhile(lambda _: time.monotonic() < end, itertools.islice(every, options.count))
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    found = 0
    for outcome in fuzz(files, tasks, options.seed, options.jobs):
        counts[outcome.kind][outcome.name] += 1
        found += outcome.finding
        if outcome.finding or options.verbose:
            print(f"{outcome.kind} {outcome.index}: {outcome.name}: {outcome.detail.strip()[:600]}", flush=True)
    names = [*dict.fromkeys(("compiled", "refused", *(n for c in counts.values() for n in c)))]
    print(f"{'':28}" + "".join(f"{name:>14}" for name in names))
    for kind, count in counts.items():
        print(f"{kind:28}" + "".join(f"{count[name]:14}" for name in names))
    total = sum(sum(c.values()) for c in counts.values())
    print(f"{total} mutants, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
