"""The whole story of one search: every way that was measured, what each weight became, and which way won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tncompile.tensorizer.measure import Measured

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = 24
"""Weights that a terminal shows; the JSON report has all."""


@dataclass(frozen=True)
class WeightSummary:
    """What became of a weight: its shape as a matrix, how it is kept, the expected relative error of the outputs from
    it alone, predicted seconds of its networks and bytes, before and now; `tried` has how many ways there were."""

    name: str
    shape: tuple[int, int]
    kept: str
    error: float
    seconds: tuple[float, float]
    size: tuple[int, int]
    tried: int


@dataclass(frozen=True)
class TensorizeReport:
    """What was asked, measured and chosen; prints as tables, `to_dict` is what ``--report`` writes."""

    model: str
    asked: str
    data: str
    ways: tuple[Measured, ...]
    chosen: str
    verdict: str
    weights: tuple[WeightSummary, ...]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        return {"tncompile": data.pop("version"), **data}

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            for part in self.render():
                console.print(part)
        return capture.get().rstrip()

    def render(self) -> list[RenderableType]:
        """The summary for a terminal."""
        from rich.text import Text

        parts: list[RenderableType] = [Text(f"asked: {self.asked}; {self.data}")]
        if any(w.kept != "dense, fp32" for w in self.weights):
            parts += [self._weights()]
        parts += [self._ways(), Text(self.verdict, style="bold")]
        parts += [Text(note) for note in self.notes]
        spent = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())
        parts.append(Text(f"{sum(self.seconds.values()):.1f} s ({spent})"))
        return parts

    def _ways(self) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        batches = list(dict.fromkeys(batch for way in self.ways for batch in way.ms))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        table.add_column("way")
        for title in ("MB", *(f"ms, batch {b}" if b else "ms" for b in batches), "output error", "metric", "drop"):
            table.add_column(title, justify="right", no_wrap=True)
        for way in self.ways:
            numbers = [_number(way.ms.get(b)) for b in batches]
            cells = [f"{way.size / 1e6:.3g}", *numbers, _number(way.error), _number(way.metric, 5), _number(way.drop)]
            style = "bold" if way.name == self.chosen else ""
            table.add_row(*(Text(cell) for cell in (way.name, *cells)), style=style)
        return table

    def _weights(self) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        for title in ("weight", "in × out", "kept as"):
            table.add_column(title, overflow="fold")
        for title in ("output error", "µs predicted", "kB"):
            table.add_column(title, justify="right", no_wrap=True)
        shown = sorted(self.weights, key=lambda w: -w.size[0])[:_SHOWN]
        for w in shown:
            micro = " → ".join(f"{s * 1e6:,.3g}" for s in w.seconds)
            size = " → ".join(f"{s / 1e3:,.0f}" for s in w.size)
            cells = (w.name, f"{w.shape[0]} × {w.shape[1]}", w.kept, _number(w.error), micro, size)
            table.add_row(*(Text(cell) for cell in cells))
        if len(self.weights) > len(shown):
            table.add_row(Text(f"and {len(self.weights) - len(shown)} smaller ones, in the JSON report"))
        return table


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}g}"


def verdict(chosen: Measured, dense: Measured, others: Sequence[Measured], formats: bool) -> str:
    """Which way is best, and against what, in one sentence; `others` are those without tensor formats that are within
    the budget, `formats` says whether the chosen one has some."""
    if chosen.name == dense.name:
        return "nothing is better than the dense float32 model within this budget"
    text = f"{chosen.name}: {_against(chosen, dense)} than {dense.name}"
    if not formats:
        text += "; no tensor format was better than that within this budget"
    best = min((o for o in others if o.name != chosen.name), key=lambda m: m.mean_ms * m.size, default=None)
    if best is None or best.name == dense.name:
        return text
    return f"{text}; {_against(chosen, best)} than {best.name}, the best of the rest within it"


def _against(one: Measured, other: Measured) -> str:
    faster, smaller = other.mean_ms / one.mean_ms, other.size / one.size
    return f"{faster:.2f} times as fast and {smaller:.2f} times smaller"
