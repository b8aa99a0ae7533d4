"""Every case of `benchmarks.models`, by tncompile and by the other ways to run it.

    python -m benchmarks.cases [--only NAME,...] [--batch N,...] [--device cpu|cuda] [--out DIR]

Each case runs in a process of its own, where all ways take turns. Writes cases.json, cases.md and a plot; a case that
is in cases.json already is not measured again without --again, so that a run that was stopped can go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.command import ROOT, case_names, check_document, environment, read, run_command, write
from benchmarks.models import CASES
from tncompile.commands.bench import WAYS
from tncompile.commands.options import names, sizes
from tncompile.runtime.device import DEVICES, providers
from tncompile.runtime.files import write_file
from tncompile.runtime.timing import wait_politely


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.cases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--only", type=case_names, default=tuple(CASES), metavar="NAME,...", help="default: every case")
    result.add_argument("--batch", type=sizes, metavar="N,N,...", help="default: 1,16,256, of large models 1,8,32")
    result.add_argument(
        "--against", type=names(WAYS, "way "), default=WAYS, metavar="WAY,...", help=f"default: {','.join(WAYS)}"
    )
    result.add_argument("--device", choices=DEVICES, default="cpu", help="where to run (default cpu)")
    result.add_argument("--threads", type=int, metavar="N", help="threads of every way (default: torch's)")
    result.add_argument("--out", type=Path, default=ROOT / "build" / "cases", metavar="DIR", help="default build/cases")
    result.add_argument("--seconds", type=float, default=1.5, metavar="S", help="to time a batch size for (1.5)")
    result.add_argument("--limit", type=float, default=15.0, metavar="S", help="for a first call (15)")
    result.add_argument("--case-limit", type=float, default=180.0, metavar="S", help="for a whole case (180)")
    result.add_argument("--again", action="store_true", help="measure also what is in cases.json already")
    result.add_argument("--profile", action="store_true", help="ONNX Runtime's profile of tncompile and the best rival")
    result.add_argument("--docs", type=Path, metavar="FILE", help="put the table between the markers of this file")
    return result


def run(options: argparse.Namespace) -> int:
    """Measure what is missing and write everything anew. TNCompileError where the device or a file is not there."""
    providers(options.device)
    wait_politely()
    check_document(options.docs)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "cases.json"
    results = read(store) if store.exists() else {}
    for number, name in enumerate(options.only, 1):
        if name in results and not options.again:
            continue
        start = time.perf_counter()
        results[name] = measure(name, options)
        write(store, results)
        line = report.brief(name, results[name])
        print(f"[{number}/{len(options.only)}] {line} ({time.perf_counter() - start:.0f} s)", flush=True)
    chosen = {name: results[name] for name in CASES if name in results}
    text = report.markdown(chosen)
    write_file(options.out / "cases.md", text.encode())
    for line in report.summary(chosen):
        print(line)
    if options.docs is not None:
        write_file(options.docs, report.filled(options.docs.read_text(encoding="utf-8"), text).encode())
    if options.profile:
        write_file(options.out / "profiles.md", report.profiles(chosen).encode())
    drawn = report.plot(chosen, options.out)
    print(f"in {options.out}: cases.json, cases.md{''.join(f', {path.name}' for path in drawn)}")
    return 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a fresh process: whatever it does, the others are not touched."""
    keys = ("batch", "device", "limit", "threads", "seconds", "against", "profile")
    chosen = json.dumps({key: getattr(options, key) for key in keys})
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.worker", name, str(result), chosen]
        note = ""
        try:
            done = subprocess.run(
                command, env=environment(), capture_output=True, text=True, timeout=options.case_limit
            )
            if done.returncode:
                note = (
                    f"its process ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
                )
        except subprocess.TimeoutExpired:
            note = f"> {options.case_limit:g} s for the case"
        record: dict[str, Any] = {"group": CASES[name].group, "rows": []}
        if result.exists():
            record = json.loads(result.read_text(encoding="utf-8"))
    return {**record, "error": note} if note else record


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 refused, 2 wrong usage."""
    return run_command(parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
