"""What `benchmarks.cases` measured, as a table, as a few lines and as a plot.

A result is the JSON that `benchmarks.worker` writes for one case: `group`, `rows`, and `error` where it has failed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tncompile.errors import TNCompileError
from tncompile.runtime.contest import DENSE, EXPORTER, OURS, RIVALS

Results = Mapping[str, Mapping[str, Any]]

#: Between these lines of a document goes the table.
BEGIN, END = "<!-- cases -->", "<!-- end of cases -->"

#: What is asked for: no case below this speed, and nothing said about an exporter that takes longer than this.
ENOUGH, EXPORTER_MS = 0.95, 1000.0

_SHORT = {"exporter": "exporter", "eager": "eager", "compile": "torch.compile", "dense": "dense", "naive": "opt_einsum"}


def _rows(results: Results, group: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, result in results.items():
        if group in (None, result["group"]):
            yield from ((name, row) for row in result["rows"])


def speed_over(row: Mapping[str, Any], way: str) -> float | None:
    """How many times faster tncompile is than a way; None where one of them has no time."""
    if way not in row["ms"] or OURS not in row["ms"]:
        return None
    if way == row["fastest"]:  # by the medians of the rounds' ratios, which is known for this one only
        return float(row["speed"])
    return float(row["ms"][way] / row["ms"][OURS])


def summary(results: Results) -> list[str]:
    """A few lines on all cases: the worst speed, the mean one over the exporter, memory, and what failed."""
    lines = []
    rated = [(row["speed"], name, row) for name, row in _rows(results) if row["speed"] is not None]
    if rated:
        below = [item for item in rated if item[0] < ENOUGH]
        speed, name, row = min(rated, key=lambda item: item[0])
        lines.append(
            f"{len(rated)} measurements: {len(rated) - len(below)} at no less than {ENOUGH} of the fastest other way's "
            f"speed; the worst is {speed:.2f} ({name}, {_batch(row)}, against {_SHORT[row['fastest']]})"
        )
    over, slow, failed = [], 0, 0
    for _, row in _rows(results, "C"):
        speed = speed_over(row, EXPORTER)
        if speed is None:
            failed += OURS in row["ms"] and EXPORTER in row["notes"]
        elif row["ms"][EXPORTER] > EXPORTER_MS:
            slow += 1
        else:
            over.append(speed)
    if over:
        lines.append(
            f"tensorized, over {RIVALS[EXPORTER]}: {statistics.geometric_mean(over):.2f} times as fast in the "
            f"geometric mean of {len(over)}; not counted: {slow} where that takes over a second, {failed} where it "
            "fails"
        )
    lines += _memory(results)
    missed = [f"{name} at {_batch(row)}" for name, row in _rows(results) if OURS not in row["ms"]]
    if missed:
        lines.append(f"tncompile has no time for {len(missed)}: {', '.join(missed)}")
    errors = [f"{name} ({result['error']})" for name, result in results.items() if result.get("error")]
    if errors:
        lines.append(f"not measured, or not to the end: {'; '.join(errors)}")
    return lines


def _memory(results: Results) -> list[str]:
    ratios = []
    for name, result in results.items():
        memory = result.get("memory", {})
        others = [size for way, size in memory.items() if way in (EXPORTER, DENSE)]
        if OURS in memory and others:
            ratios.append((memory[OURS] / max(1, min(others)), name))
    if not ratios:
        return []
    worst, name = max(ratios)
    median = statistics.median(ratio for ratio, _ in ratios)
    return [
        f"peak memory at the largest batch, against the better of exporter and dense: {median:.2f} times in the median "
        f"of {len(ratios)}, at worst {worst:.2f} ({name})"
    ]


def brief(name: str, result: Mapping[str, Any]) -> str:
    """One line on a case."""
    parts = [
        f"{_batch(row)}: {number(row['speed'])} of {_SHORT[row['fastest']]}" for row in result["rows"] if row["fastest"]
    ]
    parts += [result["error"]] if result.get("error") else []
    return f"{name}: {'; '.join(parts) or 'nothing to compare with'}"


def markdown(results: Results) -> str:
    """Conditions, summary, table, and every note on what failed."""
    if not results:
        raise TNCompileError("nothing was measured")
    head = ["case", "group", "parameters", "batch", OURS, *_SHORT.values(), "fastest other", "speed", "noise", "MB"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|--:|--:|{'--:|' * (1 + len(_SHORT))}---|--:|--:|--:|"]
    for name, result in results.items():
        first = [name, result["group"], f"{result.get('parameters', 0):,}"]
        for row in result["rows"]:
            cells = [*first, _batch(row).removeprefix("batch "), *(_cell(row, way) for way in (OURS, *_SHORT))]
            noise = "" if row["noise"] is None else f"{row['noise']:.0%}"
            last = row is result["rows"][-1]
            cells += [_SHORT.get(row["fastest"], ""), number(row["speed"]), noise, _megabytes(result) if last else ""]
            lines.append(f"| {' | '.join(cells)} |")
            first = ["", "", ""]
        if not result["rows"]:
            lines.append(f"| {' | '.join([*first, result.get('error') or '', *[''] * (len(head) - 4)])} |")
    parts = [_conditions(results), "\n".join(f"- {line}" for line in summary(results)), "\n".join(lines), _legend()]
    notes = _notes(results)
    return "\n\n".join([*parts, *(["What failed:\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def _conditions(results: Results) -> str:
    measured = [r for r in results.values() if "machine" in r]
    if not measured:
        return "Nothing could be measured."
    seen = sorted({f"{r['machine']}; {r['device']}, {r['threads']} threads for each way" for r in measured})
    return f"{'; '.join(seen)}."


def _legend() -> str:
    return (
        "Milliseconds a call, medians; `>` is a first call that was given up. *speed*: the time of the fastest other "
        "way divided by tncompile's, median of the rounds; above 1 tncompile is faster. *noise*: the difference of two "
        "sessions of tncompile's own file. *MB*: growth of resident memory for loading and running the file at the "
        "largest batch, tncompile / exporter / dense."
    )


def _notes(results: Results) -> list[str]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, row in _rows(results):
        for way, note in row["notes"].items():
            found.setdefault((name, way, note), []).append(_batch(row))
    return [f"- {name}, {way}, {', '.join(where)}: {_escaped(note)}" for (name, way, note), where in found.items()]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _batch(row: Mapping[str, Any]) -> str:
    return f"batch {row['batch']}" if row["batch"] is not None else "batch fixed"


def _cell(row: Mapping[str, Any], way: str) -> str:
    if way in row["ms"]:
        return number(row["ms"][way])
    note: str = row["notes"].get(way, "–")
    return note if note.startswith(">") else note.partition(":")[0]


def number(value: float | None) -> str:
    """Three digits of a number, or all before the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _megabytes(result: Mapping[str, Any]) -> str:
    memory = result.get("memory", {})
    return " / ".join(f"{memory[way] / 1e6:.0f}" if way in memory else "–" for way in (OURS, EXPORTER, DENSE))


def filled(document: str, table: str) -> str:
    """A document with the table between its markers. TNCompileError where it has none."""
    return between(document, table, BEGIN, END)


def between(document: str, text: str, begin: str, end: str) -> str:
    """A document with a text between two lines of it. TNCompileError where it does not have those."""
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise TNCompileError(f"the document has no lines {begin} and {end} for the table to go between")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def profiles(results: Results) -> str:
    """ONNX Runtime's profiles by operator, tncompile and its best rival side by side."""
    lines = ["Microseconds a call by ONNX Runtime's profiler, which itself takes some time for each node.", ""]
    for name, result in results.items():
        for found in result.get("profiles", []):
            ways: Sequence[str] = list(found["operators"])
            operators = dict.fromkeys(op for way in ways for op in found["operators"][way])
            lines += [
                f"## {name}, {_batch(found)}",
                "",
                f"| operator | {' | '.join(ways)} |",
                f"|---|{'--:|' * len(ways)}",
            ]
            for op in operators:
                times = (found["operators"][way].get(op) for way in ways)
                lines.append(f"| {op} | {' | '.join(number(t) for t in times)} |")
            lines += ["", "| slowest nodes | operator | µs |", "|---|---|--:|"]
            for way in ways:
                nodes = found["nodes"][way][:6]
                lines += [f"| {way}: {_escaped(n['name'])} | {n['op']} | {number(n['microseconds'])} |" for n in nodes]
            lines.append("")
    return "\n".join(lines)


def plot(results: Results, folder: Path) -> list[Path]:
    """cases.svg and cases.png: the speed over the fastest other way and over the exporter. None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, result in results.items() if any(row["speed"] is not None for row in result["rows"])]
    if not names:
        return []
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.27 * len(names)), layout="constrained")
    series: dict[str, tuple[list[float], list[int]]] = {
        "over the fastest other way": ([], []),
        "over the exporter": ([], []),
    }
    for position, name in enumerate(names):
        for row in results[name]["rows"]:
            for label, speed in zip(series, (row["speed"], speed_over(row, EXPORTER)), strict=True):
                if speed is not None and math.isfinite(speed):
                    series[label][0].append(speed)
                    series[label][1].append(position)
    (fastest, exporter) = series.items()
    axes.scatter(*exporter[1], marker="o", facecolors="none", edgecolors="tab:gray", label=exporter[0])
    axes.scatter(*fastest[1], marker="D", s=18, color="tab:blue", label=fastest[0])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("speed of tncompile, one mark for each batch size (right is faster)")
    axes.legend(loc="lower right", fontsize=8)
    paths = [folder / "cases.svg", folder / "cases.png"]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths
