"""Model files raced with what they are without the compiler, by `tncompile bench`, one after the other."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import command
from benchmarks.report import between, number


class Entry(Protocol):
    """A model: what a table calls it, what it is for, sizes that it is run at, and its file."""

    @property
    def key(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def file(self, folder: Path) -> Path:
        """The file in a folder, made or downloaded unless it is there."""


def measure(path: Path, entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """What `tncompile bench` finds of a file, or why it does not."""
    record = path.with_suffix(".json")
    ask = [sys.executable, "-m", "tncompile", "bench", str(path), "--against", "exporter", "--json", str(record)]
    ask += ["--batch", "1,8", "--threads", str(options.threads), "--seconds", str(options.seconds)]
    ask += [part for name, size in entry.sizes.items() for part in ("--dim", f"{name}={size}")]
    done = subprocess.run(ask, capture_output=True, text=True, env=command.environment())
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def table(entries: Sequence[Entry], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table: a row for each model and batch size."""
    yield "| model | for | batch | tncompile, ms | without, ms | speed |"
    yield "|---|---|--:|--:|--:|--:|"
    for entry in entries:
        found = results.get(entry.key, {})
        for row in found.get("rows", ()):
            yield f"| {entry.key} | {entry.task} | {_row(row)} |"
        if "failed" in found:
            yield f"| {entry.key} | {entry.task} | {' '.join(found['failed'])} | | | |"


def _row(row: Mapping[str, Any]) -> str:
    """A batch size: both times and the speed, or what is wrong in their place."""
    cells = [
        number(row["ms"][way]) if way in row["ms"] else row["notes"].get(way, "–") for way in ("tncompile", "exporter")
    ]
    speed = "–" if row["speed"] is None else f"{row['speed']:.2f}"
    return " | ".join([str(row["batch"] or "fixed"), *cells, speed])


def main(name: str, entries: Sequence[Entry], description: str, arguments: Sequence[str] | None = None) -> int:
    """Race the models of the benchmark of a name; 1 where something is refused or a model fails.

    Its results go into ``build/NAME``, its table between the marks ``NAME`` and ``end of NAME`` of a document.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, default=Path("build") / name, help="folder of models and results")
    parser.add_argument("--only", default="", metavar="WORD", help="models whose name has this word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="to time a batch size for")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a document to put the table into")

    def run(options: argparse.Namespace) -> int:
        chosen = [entry for entry in entries if options.only in entry.key]
        if not chosen:
            parser.error(f"no model's name has {options.only!r} in it")
        command.check_document(options.write)
        options.out.mkdir(parents=True, exist_ok=True)
        store = options.out / "results.json"
        results: dict[str, Any] = {}
        for entry in chosen:
            results[entry.key] = found = measure(entry.file(options.out), entry, options)
            command.write(store, results)
            print(entry.key, *(_row(row) for row in found.get("rows", ())), *found.get("failed", ()), flush=True)
        lines = "\n".join(table(entries, results))
        print(lines)
        if options.write is not None:
            text = options.write.read_text(encoding="utf-8")
            text = between(text, lines, f"<!-- {name} -->", f"<!-- end of {name} -->")
            options.write.write_text(text, encoding="utf-8")
        return int(any("failed" in found for found in results.values()))

    return command.run_command(parser, run, arguments)
