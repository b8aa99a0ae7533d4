"""What `benchmarks.corpus` found, as a Markdown table and as a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report import between
from tncompile.runtime.contest import OURS

Results = Mapping[str, Mapping[str, Any]]
File = Mapping[str, Any]

BEGIN, END = "<!-- corpus -->", "<!-- end of corpus -->"

_HEAD = (
    "case",
    "file",
    "batch",
    "networks",
    "cores",
    "other",
    "error",
    "eager's",
    "MB",
    "s",
    "ms (best other)",
)


def markdown(results: Results, times: Results) -> str:
    """One row a file, and a list of what was said. `times`: what `benchmarks.cases` measured."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    notes: list[str] = []
    for name, result in results.items():
        shown = name
        for file in result["files"]:
            time = _times(times.get(name, {})) if shown else ""  # the case's, not the file's
            lines.append(f"| {' | '.join([shown, *_cells(file), time])} |")
            shown = ""
            notes += [f"- {name}, {file['kind']}: {_escaped(text)}" for text in _said(file)]
    parts = ["\n".join(f"- {line}" for line in summary(results)), "\n".join(lines)]
    parts += ["What was said:\n\n" + "\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> list[str]:
    """How many files compiled and verified, and what did not."""
    files = [(name, file) for name, result in results.items() for file in result["files"]]
    good = [file for _, file in files if "relative_error" in file and file["verify"]["exit"] == 0]
    dynamic = {n for n, f in files if f.get("dynamic") and f["verify"]["exit"] == 0}
    lines = [
        f"{len(results)} cases, {len(files)} files: {len(good)} compiled and verified; "
        f"{len(dynamic)} cases with a dynamic batch"
    ]
    if good:
        worst = max(good, key=_ratio)
        lines.append(f"largest error: {_ratio(worst):.2g} times eager PyTorch's, or one rounding where that is less")
    bad = [f"{n} ({f['kind']})" for n, f in files if not any(f is g for g in good)]
    return [*lines, *([f"not: {', '.join(bad)}"] if bad else [])]


def _ratio(file: File) -> float:
    """The error over eager PyTorch's; where that is below a rounding of float32, over one rounding."""
    return float(file["relative_error"] / max(file["eager_error"], 2.0**-23))


def _cells(file: File) -> list[str]:
    if "relative_error" not in file:
        return [file["kind"], "refused", *[""] * 7]
    return [
        file["kind"],
        "dynamic" if file["dynamic"] else "fixed",
        f"{_count(file['networks'])} → {file['networks_after']}",
        f"{_count(file['cores'])} → {file['cores_after']}",
        _count(file["opaque"]),
        f"{file['relative_error']:.1e}",
        f"{file['eager_error']:.1e}",
        f"{file['bytes'] / 1e6:.3g}",
        f"{file['compile']['seconds']:.0f}",
    ]


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _times(measured: Mapping[str, Any]) -> str:
    """``batch 1: 0.1 (0.2 eager)`` for each batch size that was measured."""
    found = []
    for row in measured.get("rows", ()):
        other = row["fastest"]
        if OURS in row["ms"] and other:
            size = "" if row["batch"] is None else f"{row['batch']}: "
            found.append(f"{size}{row['ms'][OURS]:.3g} ({row['ms'][other]:.3g} {other})")
    return "; ".join(found)


def _said(file: File) -> Iterator[str]:
    """Why a file was refused, or what its user was warned of."""
    for text in (file["error"], *(file.get(step, {}).get("refusal", "") for step in ("compile", "verify"))):
        if text:
            yield f"**{text}**"
    if file.get("warned"):
        yield file["warned"]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def filled(document: str, table: str) -> str:
    """A document with the table between its markers. TNCompileError where it has none."""
    return between(document, table, BEGIN, END)
