"""Pretrained models made smaller and faster: ``tncompile tensorize`` beside the other ways to do it.

    python -m benchmarks.pretrained [--only NAME,...] [--ways TEXT,...] [--seconds S] [--docs FILE] [--out DIR]

Each way is one ONNX file; a step of one way (build, metric) runs in a process of its own, and all files of a case are
timed in turns in one. Writes pretrained.json, pretrained.md and a plot. What is there already is not done again
without --again, so that a run that was stopped can go on; --only-report draws up what there is. The data is named in
benchmarks/pretrained_data.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pretrained_report as report
from benchmarks.pretrained_cases import MAX_DROP, PRETRAINED
from benchmarks.pretrained_worker import CALIBRATION, FP32, MODEL, OURS, TENSORLY, WAYS, file_of
from tncompile.errors import TNCompileError
from tncompile.runtime.files import write_file
from tncompile.runtime.timing import wait_politely

ROOT = Path(__file__).resolve().parents[1]

#: After the model: how tncompile is called. {…} are filled in for each case.
COMMAND = (
    "tensorize {model} -o {output} --calibrate {calibration} --metric {metric} --max-drop {max_drop} --batch {batch} "
    "--threads {threads} --report {report}"
)

Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--only", type=_names, default=tuple(PRETRAINED), metavar="NAME,...", help="default: every case")
    add("--ways", default="", metavar="TEXT,...", help="only ways whose names have one of these in them")
    add("--again", action="store_true", help="build, judge and time the chosen ways anew")
    add("--only-report", action="store_true", help="measure nothing, write table and plot anew")
    add("--seconds", type=float, default=20.0, metavar="S", help="to time a batch size for (20)")
    add("--threads", type=int, default=1, metavar="N", help="threads of every way (1)")
    add("--limit", type=float, default=30.0, metavar="S", help="for a first call (30)")
    add("--step-limit", type=float, default=900.0, metavar="S", help="for a step of one way (900)")
    add("--search-limit", type=float, default=3600.0, metavar="S", help="for tncompile tensorize (3600)")
    add("--options", default="", metavar="TEXT", help="further options for tncompile tensorize")
    add("--out", type=Path, default=ROOT / "build" / "pretrained", metavar="DIR", help="default build/pretrained")
    add("--docs", type=Path, metavar="FILE", help="put the table between the markers of this file")
    return result


def _names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in found if name not in PRETRAINED]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; the cases are {', '.join(PRETRAINED)}")
    return found


class Bench:
    """One case: its folder, and the record of what was found so far, which is stored after every step."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.case = PRETRAINED[name]
        self.options = options
        self.folder: Path = options.out / name
        self.record: Record = _stored(self.folder / "record.json")

    def run(self) -> None:
        """Whatever is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if "metric" not in self.record:
            self.record |= {"ways": {}, "max_drop": MAX_DROP, **self._step("prepare", {})}
            self._keep("prepared")
        if "metric" not in self.record:
            return  # nothing can be compared with it
        chosen = [text.strip() for text in self.options.ways.split(",")]
        for way in (FP32, OURS, *(w for w in WAYS if w != FP32)):
            if any(text in way for text in chosen):
                self._way(way)
        self._race()

    def _way(self, way: str) -> None:
        ways: dict[str, Record] = self.record["ways"]
        size = ways.get(OURS, {}).get("bytes") if way in TENSORLY else None
        if way in ways and ways[way].get("size") == size and not self.options.again:
            return
        start = time.perf_counter()
        found = self._ours() if way == OURS else self._step("build", {"way": way, "size": size})
        found |= {"size": size, "seconds": time.perf_counter() - start}
        if not found["note"]:
            found |= self._step("score", {"way": way})
        if "metric" in found:
            found["drop"] = self.record["metric"] - found["metric"]
        ways[way] = found
        self._keep(way)

    def _ours(self) -> Record:
        """tncompile by its command line, as users call it."""
        output = file_of(self.folder, OURS)
        output.unlink(missing_ok=True)
        filled = {
            "model": self.folder / MODEL,
            "output": output,
            "calibration": self.folder / CALIBRATION,
            "metric": self.case.metric_name,
            "threads": self.options.threads,
            "max_drop": MAX_DROP / 2,  # it chooses by other samples than it is judged on
            "batch": ",".join(map(str, self.case.batches)),
            "report": self.folder / "report.json",
        }
        arguments = [part.format(**filled) for part in COMMAND.split()] + self.options.options.split()
        command = [sys.executable, "-m", "tncompile", *arguments]
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=self.options.search_limit
            )
        except subprocess.TimeoutExpired:
            return {"note": f"> {self.options.search_limit:g} s", "command": " ".join(arguments)}
        write_file(self.folder / "tncompile.log", (done.stdout + done.stderr).encode())
        told = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode or not output.is_file():
            return {"note": f"fails: {(told or ['no message'])[-1][:200]}", "command": " ".join(arguments)}
        data = output.with_name(output.name + ".data")
        size = output.stat().st_size + (data.stat().st_size if data.is_file() else 0)
        return {"note": "", "bytes": size, "command": " ".join(arguments)}

    def _race(self) -> None:
        """Time all files together, unless each of them was timed in this company already."""
        ways: dict[str, Record] = self.record["ways"]
        entrants = [way for way, found in ways.items() if "drop" in found]
        if not entrants or (self.record.get("raced") == entrants and all("ms" in ways[way] for way in entrants)):
            return
        found = self._step("race", {"ways": entrants, "seconds": self.options.seconds})
        if "note" in found:
            self.record["error"] = f"timing {found['note']}"
        else:
            self.record.pop("error", None)
            for way in entrants:
                ways[way]["ms"] = {batch: times[way] for batch, times in found.items()}
            self.record["raced"] = entrants
        self._keep("timed")

    def _step(self, step: str, options: Mapping[str, Any]) -> Record:
        given = {"threads": self.options.threads, "limit": self.options.limit, **options}
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            arguments = [step, self.case.name, str(self.folder.resolve()), str(result), json.dumps(given)]
            command = [sys.executable, "-m", "benchmarks.pretrained_worker", *arguments]
            try:
                done = subprocess.run(
                    command, env=_environment(), capture_output=True, text=True, timeout=self.options.step_limit
                )
            except subprocess.TimeoutExpired:
                return {"note": f"> {self.options.step_limit:g} s to {step}"}
            if not result.exists():
                told = done.stderr.strip().splitlines() or [""]
                return {"note": f"fails: the process ended with {done.returncode}: {told[-1][:200]}"}
            return _stored(result)

    def _keep(self, what: str) -> None:
        write_file(self.folder / "record.json", (json.dumps(self.record, indent=1) + "\n").encode())
        print(f"{self.case.name}, {what}: {report.brief(self.record, what)}", flush=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _stored(path: Path) -> Record:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TNCompileError(f"{path}: not readable ({error}); remove it, or give another --out") from error
    assert isinstance(stored, dict)
    return stored


def run(options: argparse.Namespace) -> int:
    """Measure what is missing and write everything anew. TNCompileError where a file is not there."""
    wait_politely()
    if options.docs is not None and not options.docs.is_file():
        raise TNCompileError(f"{options.docs}: no such file")
    if not options.only_report:
        for name in options.only:
            Bench(name, options).run()
    records = {name: _stored(options.out / name / "record.json") for name in PRETRAINED}
    records = {name: record for name, record in records.items() if record.get("ways")}
    text = report.markdown(records)
    write_file(options.out / "pretrained.json", (json.dumps(records, indent=1) + "\n").encode())
    write_file(options.out / "pretrained.md", text.encode())
    for line in report.summary(records):
        print(line)
    if options.docs is not None:
        write_file(options.docs, report.filled(options.docs.read_text(encoding="utf-8"), text).encode())
    drawn = report.plot(records, options.out)
    print(f"in {options.out}: pretrained.json, pretrained.md{''.join(f', {path.name}' for path in drawn)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 refused, 2 wrong usage."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except TNCompileError as error:
        print(f"benchmarks.pretrained: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
