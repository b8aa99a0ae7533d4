"""Every case of `benchmarks.models` from file to file, by the command line, as a user would compile it.

    python -m benchmarks.corpus [--only NAME,...] [--jobs N] [--out DIR] [--docs FILE] [--times cases.json]

For each case a fresh process writes the files that a user might have: saved with fixed shapes, with a dynamic batch,
and of some cases a pickle, an ONNX model, or TorchScript. Then ``tncompile FILE -o OUT`` and ``tncompile verify FILE
OUT`` run on each. Writes corpus.json and corpus.md; a case that is in corpus.json already, and passed, is not compiled
again without --again. Exit code 1 where a file was refused or the result is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, case_names, check_document, environment, read, run_command, write
from benchmarks.corpus_table import filled, markdown, summary
from benchmarks.models import CASES
from tncompile.inspect.compiled import program_of
from tncompile.ir import Switch
from tncompile.runtime.files import write_file

Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--only", type=case_names, default=tuple(CASES), metavar="NAME,...", help="default: every case")
    result.add_argument("--kinds", default="", metavar="KIND,...", help="fixed,dynamic,pickle,ONNX,TorchScript (all)")
    result.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time (1)")
    result.add_argument("--out", type=Path, default=ROOT / "build" / "corpus", metavar="DIR", help="build/corpus")
    result.add_argument("--limit", type=float, default=300.0, metavar="S", help="for each command (300)")
    result.add_argument("--again", action="store_true", help="also what is in corpus.json already, and passed")
    result.add_argument("--docs", type=Path, metavar="FILE", help="put the table between the markers of this file")
    result.add_argument("--times", type=Path, metavar="FILE", help="cases.json of benchmarks.cases, for the times")
    return result


def run(options: argparse.Namespace) -> int:
    """Compile what is missing and write the table anew. TNCompileError for a file of results that is wrong."""
    check_document(options.docs)
    times = {} if options.times is None else read(options.times)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "corpus.json"
    results = read(store) if store.exists() else {}
    todo = [n for n in options.only if options.again or n not in results or not all(map(passed, results[n]["files"]))]
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, record in zip(todo, pool.map(lambda n: case(n, options.limit, options.kinds), todo), strict=True):
            results[name] = record
            write(store, results)
            print(_brief(name, record), flush=True)
    chosen = {name: results[name] for name in CASES if name in results}
    table = markdown(chosen, times)
    write_file(options.out / "corpus.md", table.encode())
    if options.docs is not None:
        write_file(options.docs, filled(options.docs.read_text(encoding="utf-8"), table).encode())
    for line in summary(chosen):
        print(line)
    return 0 if all(passed(f) for name in options.only for f in results[name]["files"]) else 1


def passed(file: Mapping[str, Any]) -> bool:
    """Whether a file of a case was there, compiled, and verified."""
    return not file["error"] and file["compile"]["exit"] == 0 and file["verify"]["exit"] == 0


def case(name: str, limit: float, kinds: str = "") -> Record:
    """A case's files (of these kinds), each compiled and verified, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        made = _command(["-m", "benchmarks.artifacts", name, folder, kinds], limit)
        listed = Path(folder, "artifacts.json")
        files = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
        if not files:
            files = [{"kind": "any", "error": made["refusal"] or "no file was written"}]
        batch = ",".join(map(str, CASES[name].batches))
        for file in files:
            if not file["error"]:
                file |= _compiled(file, Path(folder), batch, limit)
            file.pop("path", None)
    return {"group": CASES[name].group, "files": files}


def _compiled(file: Mapping[str, Any], folder: Path, batch: str, limit: float) -> Record:
    source, output, report = file["path"], folder / "out.onnx", folder / "report.json"
    for path in (output, report):
        path.unlink(missing_ok=True)
    flags = [*file["flags"], "--batch", batch]
    written = ["-o", str(output), "--report", str(report)]
    found: Record = {
        "compile": _command(["-m", "tncompile", source, *written, *flags], limit),
        "verify": {"exit": None},
    }
    if found["compile"]["exit"] != 0:
        return found
    found["verify"] = _command(["-m", "tncompile", "verify", source, str(output), *flags], limit)
    told = json.loads(report.read_text(encoding="utf-8"))
    program = program_of(output)
    cores = 0
    for node in program.nodes if program is not None else ():
        network = node.cases[-1] if isinstance(node, Switch) else node  # as at the largest batch size
        cores += len(getattr(network, "cores", ()))
    worst = max(told["check"]["outputs"], key=lambda output: output["error"] / output["bound"])
    return {
        **found,
        "bytes": output.stat().st_size,
        "dynamic": told["dynamic"],
        "networks_after": len(told["networks"]),
        "cores_after": cores,
        "error": "",
        "relative_error": worst["error"],
        "eager_error": worst["eager"],
        "notes": told["notes"],
    }


def _command(arguments: Sequence[str], limit: float) -> Record:
    """Run Python; its exit code (None where it was stopped), seconds, and a line of what it said where it failed."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"exit": None, "seconds": limit, "refusal": f"stopped after {limit:g} s"}
    said = [line for line in (done.stderr + ("" if done.returncode == 0 else done.stdout)).splitlines() if line.strip()]
    refusal = next((line for line in said if line.startswith("tncompile: ")), (said or [""])[-1])
    return {
        "exit": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "refusal": refusal if done.returncode else "",
    }


def _brief(name: str, record: Mapping[str, Any]) -> str:
    parts = []
    for file in record["files"]:
        if passed(file):
            fixed = "" if file["dynamic"] else ", batch fixed"
            parts.append(f"{file['kind']}: {file['relative_error']:.1e} ({file['compile']['seconds']:g} s{fixed})")
        else:
            said = [file["error"], *(file.get(step, {}).get("refusal", "") for step in ("compile", "verify"))]
            parts.append(f"{file['kind']} FAILED: {next((s for s in said if s), 'wrong')}")
    return f"{name}: {'; '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 all compiled and verified, 1 some did not, or refused; 2 wrong usage."""
    return run_command(parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
