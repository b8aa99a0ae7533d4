"""What `benchmarks.pretrained` measured, as a verdict on each case, a table and a plot.

A record is the JSON of one case: the eager `metric`, and `ways`, each with its `bytes`, `metric`, `drop` and `ms` by
batch size, or a `note` that says why there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pretrained_worker import FP32, OURS
from benchmarks.report import between
from tncompile.errors import TNCompileError

Record = Mapping[str, Any]

#: Between these lines of a document goes the table.
BEGIN, END = "<!-- pretrained -->", "<!-- end of pretrained -->"

#: Differences up to these are none: of times, which two sessions of one file show as well, and of sizes.
SAME_TIME, SAME_SIZE = 1.05, 1.01

#: What is asked for over the best of the others, on at least half of the cases.
FASTER, SMALLER = 1.3, 2.0


@dataclass(frozen=True)
class Verdict:
    """tncompile's file against the rivals that keep the metric.

    `behind` are rivals and the batch size at which they are as small and as fast, and better in one. `faster` is the
    time of the fastest rival divided by tncompile's, by batch size, `smaller` the size of the smallest one divided by
    tncompile's.
    """

    kept: bool
    behind: tuple[tuple[str, str], ...]
    faster: Mapping[str, float]
    smaller: float

    @property
    def ahead(self) -> bool:
        """Whether it is clearly better than the best of the others: at every batch size faster, or smaller."""
        return self.kept and (min(self.faster.values()) >= FASTER or self.smaller >= SMALLER)


def verdict(record: Record) -> Verdict | None:
    """None where tncompile's file, or every rival, was not measured."""
    ours = record["ways"].get(OURS, {})
    rivals = {way: found for way, found in _kept(record) if way != OURS}
    if "ms" not in ours or not rivals:
        return None
    return Verdict(
        keeps(record, ours),
        tuple((way, batch) for way, found in rivals.items() for batch in ours["ms"] if beats(found, ours, batch)),
        {batch: min(found["ms"][batch] for found in rivals.values()) / ms for batch, ms in ours["ms"].items()},
        min(found["bytes"] for found in rivals.values()) / ours["bytes"],
    )


def keeps(record: Record, found: Record) -> bool:
    """Whether a way loses no more of the metric than is allowed; NaN is no metric."""
    return bool(found.get("drop", float("nan")) <= record["max_drop"] + 1e-9)


def beats(a: Record, b: Record, batch: str) -> bool:
    """Whether `a` is no larger and no slower than `b`, and clearly better in one of the two."""
    larger, slower = a["bytes"] / b["bytes"], a["ms"][batch] / b["ms"][batch]
    better = larger < 1 / SAME_SIZE or slower < 1 / SAME_TIME
    return bool(larger <= SAME_SIZE and slower <= SAME_TIME and better)


def _kept(record: Record) -> Iterator[tuple[str, Record]]:
    """The ways that keep the metric and were timed."""
    yield from ((way, found) for way, found in record["ways"].items() if "ms" in found and keeps(record, found))


def standing(record: Record, way: str) -> str:
    """Where a way stands: on the front of those that keep the metric at every batch size, or behind whom."""
    found = record["ways"][way]
    if "ms" not in found:
        return ""
    if not keeps(record, found):
        return "loses too much"
    others = [(other, its) for other, its in _kept(record) if other != way]
    behind = {batch: [other for other, its in others if beats(its, found, batch)] for batch in found["ms"]}
    ahead = [batch for batch, better in behind.items() if not better]
    if not ahead:
        everywhere = [name for name, _ in others if all(name in better for better in behind.values())]
        return f"behind {everywhere[0] if everywhere else ', '.join({b[0]: 0 for b in behind.values()})}"
    return "on the front" if len(ahead) == len(behind) else f"on the front at batch {', '.join(ahead)} only"


def brief(record: Record, way: str) -> str:
    """One line on a step of a case."""
    found = record.get("ways", {}).get(way)
    if found is None:
        return str(record.get("error") or record.get("note") or f"{record['metric']:.4f} {record['unit']}")
    if "drop" not in found:
        return str(found["note"])
    return f"{found['bytes'] / 1e6:.2f} MB, {found['metric']:.4f}, drop {found['drop']:.4f}"


def summary(records: Mapping[str, Record]) -> list[str]:
    """A line on each case, and one on all."""
    lines, found = [], []
    for name, record in records.items():
        judged = verdict(record)
        if judged is None:
            lines.append(f"{name}: {record['ways'].get(OURS, {}).get('note') or 'not measured'}")
            continue
        found.append(judged)
        lines.append(f"{name}: {_told(judged)}")
    if found:
        never = sum(v.kept and not v.behind for v in found)
        lines.append(
            f"never behind on {never} of {len(found)} cases; {FASTER:g} times faster or {SMALLER:g} times smaller "
            f"than the best of the others on {sum(v.ahead for v in found)}"
        )
    return lines


def _told(judged: Verdict) -> str:
    if not judged.kept:
        return "loses more of the metric than allowed"
    rank = ", ".join(f"behind {way} at batch {batch}" for way, batch in judged.behind) or "never behind"
    speeds = ", ".join(f"{speed:.2f} at batch {batch}" for batch, speed in judged.faster.items())
    return f"{rank}; speed over the fastest other way {speeds}; {judged.smaller:.2f} times smaller than the smallest"


def markdown(records: Mapping[str, Record]) -> str:
    """Conditions, verdicts, one table a case, and what failed. TNCompileError where nothing was measured."""
    if not records:
        raise TNCompileError("nothing was measured")
    measured_on = sorted({f"{r['machine']}; {r['threads']} thread(s) for each way" for r in records.values()})
    parts = [f"{'; '.join(measured_on)}.", "\n".join(f"- {line}" for line in summary(records))]
    for name, record in records.items():
        parts += [_heading(name, record), _table(record)]
    return "\n\n".join([*parts, _legend(records)]) + "\n"


def _heading(name: str, record: Record) -> str:
    return (
        f"**{name}**: {record['parameters']:,} parameters, {record['in_layers'] / record['parameters']:.0%} in linear "
        f"layers and full convolutions; metric `{record['metric_name'].rpartition(':')[2]}` ({record['unit']}), "
        f"eager PyTorch {record['metric']:.4f}; calibrated on {record['calibration_rows']} rows"
    )


def _table(record: Record) -> str:
    batches = next((list(found["ms"]) for found in record["ways"].values() if "ms" in found), [])
    head = ["way", "MB", *(f"ms, batch {batch}" for batch in batches), "metric", "drop", ""]
    lines = [f"| {' | '.join(head)} |", f"|---|--:|{'--:|' * len(batches)}--:|--:|---|"]
    for way, found in record["ways"].items():
        cells = [_label(way, found), f"{found['bytes'] / 1e6:.2f}" if "bytes" in found else "–"]
        cells += [f"{found['ms'][batch]:.3g}" if "ms" in found else "–" for batch in batches]
        cells += [f"{found['metric']:.4f}", f"{found['drop']:+.2%}"] if "drop" in found else ["–", "–"]
        lines.append(f"| {' | '.join([*cells, _escaped(standing(record, way) or found.get('note', ''))])} |")
    return "\n".join(lines)


def _label(way: str, found: Record) -> str:
    if "implementation" in found:
        return f"tensorly-torch {way}, {found['share']:.0%}, {found['implementation']}"
    return f"{way} + ORT" if way == FP32 else way


def _legend(records: Mapping[str, Record]) -> str:
    drop = next(iter(records.values()))["max_drop"]
    return (
        f"Medians of interleaved calls. *drop* is eager PyTorch's metric less the way's, a semitone counting as 100 %; "
        f"a way that drops more than {drop:.0%} is no rival. *On the front*: no other way that keeps the metric is as "
        f"small and as fast and better in one, where {SAME_TIME - 1:.0%} of time and {SAME_SIZE - 1:.0%} of size are "
        "no difference. *SVD s* keeps this share of the parameters of every layer; tensorly-torch's are as large as "
        "tncompile's file, where there is one."
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def filled(document: str, table: str) -> str:
    """A document with the table between its markers. TNCompileError where it has none."""
    return between(document, table, BEGIN, END)


# ------------------------------------------------------------------------------------ plot

_COLORS = {"int8": "tab:orange", "SVD": "tab:green", "tt": "tab:purple", "tucker": "tab:brown"}


def plot(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """pretrained.svg and pretrained.png: size against time, a panel for each case and batch size.

    None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return []
    timed = {name: record for name, record in records.items() if any("ms" in w for w in record["ways"].values())}
    if not timed:
        return []
    batches = {name: list(next(w["ms"] for w in r["ways"].values() if "ms" in w)) for name, r in timed.items()}
    columns = max(map(len, batches.values()))
    figure = Figure(figsize=(5.4 * columns, 3.6 * len(timed)), layout="constrained")
    grid = figure.subplots(len(timed), columns, squeeze=False)
    for panels, (name, record) in zip(grid, timed.items(), strict=True):
        for panel in panels[len(batches[name]) :]:
            panel.set_axis_off()
        for panel, batch in zip(panels, batches[name], strict=False):
            _panel(panel, record, batch)
            panel.set_title(f"{name}, batch {batch}", fontsize=10)
    figure.suptitle(
        f"filled: drops at most {next(iter(timed.values()))['max_drop']:.0%} of the metric; "
        "line: the front of the others",
        fontsize=10,
    )
    paths = [folder / "pretrained.svg", folder / "pretrained.png"]
    for path in paths:
        figure.savefig(path, dpi=110)
    return paths


def _panel(axes: Any, record: Record, batch: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    points: list[tuple[float, float, str]] = []
    for way, found in record["ways"].items():
        if "ms" not in found:
            continue
        color = next((c for start, c in _COLORS.items() if way.startswith(start)), "black")
        color = "tab:blue" if way == OURS else color
        face = color if keeps(record, found) else "none"
        x, y = found["ms"][batch], found["bytes"] / 1e6
        marker, size = ("*", 160) if way == OURS else ("o", 36)
        axes.scatter([x], [y], s=size, marker=marker, edgecolors=color, facecolors=face, zorder=3)
        points.append((x, y, way))
    middle = (min(points)[0] * max(points)[0]) ** 0.5
    for place, (x, y, way) in enumerate(sorted(points)):  # above and below in turn, as neighbours are close
        side, offset = ("left", 5) if x <= middle else ("right", -5)
        where = (offset, 4 if place % 2 else -9)
        axes.annotate(way, (x, y), textcoords="offset points", xytext=where, ha=side, fontsize=7)
    front: list[tuple[float, float]] = []
    for ms, megabytes in sorted((w["ms"][batch], w["bytes"] / 1e6) for n, w in _kept(record) if n != OURS):
        if not front or megabytes < front[-1][1]:
            front.append((ms, megabytes))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlabel="ms a call", ylabel="MB")
    axes.margins(0.14)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
