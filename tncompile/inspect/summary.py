"""What a compile did: for each network its shape, its cores, what each way to compute it costs, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tncompile.emit.file import Storage
from tncompile.emit.microbatch import MicroBatches
from tncompile.ir import Array, Network, Opaque, Program, Switch, Tensor, dims, networks_of
from tncompile.passes.base import Context, PassReport
from tncompile.passes.limit import peaks
from tncompile.passes.plans import cost_of, dense_tree
from tncompile.passes.positions import tables_of
from tncompile.passes.rows import gather_seconds
from tncompile.runtime.accuracy import CheckReport
from tncompile.runtime.settle import Settled

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply and add count as two), bytes read and written, and predicted seconds of one call."""

    flops: float
    bytes: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class NetworkSummary:
    """One network: `parameters` as traced, `dense_parameters` with all cores merged, `stored` in the file.

    `costs` has, by batch size, the cost as traced (``naive``), of the dense layer and of the chosen way, `measured` the
    seconds that the chosen way took on this machine where it was tuned, and `memory` the predicted bytes of operands
    and intermediates alive at once in that. `plans` has the steps of each plan by the batch sizes it serves.
    """

    name: str
    value: str
    inputs: tuple[str, ...]
    output: str
    cores: tuple[str, ...]
    bonds: tuple[str, ...]
    parameters: int
    dense_parameters: int
    stored: int
    costs: dict[int, dict[str, Cost]]
    measured: dict[int, float]
    memory: dict[int, int]
    plans: dict[str, tuple[str, ...]]
    decisions: tuple[str, ...]
    source: str

    def gained(self, batch: int) -> float:
        """Predicted seconds by which it is faster at a batch size than as traced, and than as the dense layer."""
        costs = self.costs[batch]
        return min(costs["naive"].seconds, costs["dense"].seconds) - costs["chosen"].seconds


@dataclass(frozen=True)
class Report:
    """The whole story of one compile; prints as a table, `to_dict` is what ``--report`` writes.

    It was planned for `batches`, for the `sizes` of other dynamic dimensions by name, and for `device`; `profile` says
    where the figures of that device come from, `lowered` what became of opaque operations.
    """

    networks: tuple[NetworkSummary, ...]
    passes: tuple[PassReport, ...]
    check: CheckReport | None
    seconds: dict[str, float]
    model: str = ""
    size: int = 0
    notes: tuple[str, ...] = ()
    storage: Storage | None = None
    views: int = 0
    opaque: int = 0
    batches: tuple[int, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    dynamic: bool = True
    version: str = field(default="")
    device: str = ""
    settled: Settled | None = None
    micro_batches: MicroBatches | None = None
    profile: str = ""
    lowered: str = "lowered by torch's exporter"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["check"] = None if self.check is None else {**asdict(self.check), "passed": self.check.passed}
        if self.settled is not None:
            data["settled"]["exported"] = self.settled.exported is not None
        return {"tncompile": data.pop("version"), **data}

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            for part in self.render():
                console.print(part)
        return capture.get().rstrip()

    def render(self) -> list[RenderableType]:
        """The summary for a terminal: a table and the lines under it."""
        from rich.text import Text

        parts: list[RenderableType] = []
        if self.networks:
            parts.append(self._table())
            told = Counter((net.name, "; ".join(net.decisions)) for net in self.networks if net.decisions)
            for (name, decisions), count in told.items():
                parts.append(Text.assemble((name, "bold"), _times(count), ": ", decisions))
        else:
            parts.append(Text("no tensor networks with weights in this model"))
        rest = [f"{self.views} views and sums without weights" * (self.views > 0)]
        rest.append(f"{self.opaque} other operations {self.lowered}" * (self.opaque > 0))
        if any(rest):
            parts.append(Text("also " + ", ".join(r for r in rest if r)))
        parts += [Text(note) for note in self.notes]
        if self.check is None:
            parts.append(Text("not checked (--no-check)"))
        else:
            runs = "; ".join(self.check.runs)
            parts.append(Text(f"check {'passed' if self.check.passed else 'FAILED'}, against float64 at {runs}"))
            parts += [Text(f"  {output}") for output in self.check.outputs]
            parts += [Text(f"  {self.check.note}")] * bool(self.check.note)
        if self.micro_batches:
            parts.append(Text(str(self.micro_batches)))
        if self.settled:
            parts.append(Text(str(self.settled)))
        if self.profile:
            parts.append(Text(f"planned for {self.device}: {self.profile}"))
        if self.sizes:
            sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            parts.append(Text(f"and for {sizes}; --dim NAME=SIZE says what is typical"))
        total = sum(self.seconds.values())
        spent = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())
        parts.append(Text(f"{total:.1f} s ({spent})" + (f"; {self._file()}" if self.size else "")))
        return parts

    def _file(self) -> str:
        """The file's size, and what it would be with weights stored the other way."""
        text = f"a file of {self.size / 1e6:.2f} MB"
        if self.storage is None or not self.storage.differs:
            return text
        folded, parts = (b / 1e6 for b in (self.storage.folded_bytes, self.storage.cores_bytes))
        return f"{text} (written out {folded:.2f} MB, as parts {parts:.2f} MB; {self.storage.why})"

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        largest = max(self.batches)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        sizes = f"batch {largest}" if self.dynamic else "fixed shapes"
        for title in ("network", "shape", "cores, bonds"):
            table.add_column(title, overflow="fold")
        for title in ("parameters\nof dense", f"MFLOP, {sizes}\nnaive dense now", "µs predicted\nnaive dense now"):
            table.add_column(title, justify="right", no_wrap=True)
        rows: Counter[tuple[str, ...]] = Counter()
        for net in self.networks:
            cost = net.costs[largest].values()
            cells = (
                net.name,
                f"{_few(net.inputs)} → {net.output}",
                f"{len(net.cores)}{', ' if net.bonds else ''}{_few(net.bonds)}",
                f"{net.parameters:,} of {net.dense_parameters:,}",
                "  ".join(_short(c.flops / 1e6) for c in cost),
                "  ".join(_few_digits(c.seconds * 1e6) for c in cost),
            )
            rows[cells] += 1
        for (name, *rest), count in rows.items():
            table.add_row(*(Text(cell) for cell in (name + _times(count), *rest)))  # Text: shapes are not markup
        return table


def _times(count: int) -> str:
    """How often what is said once is so: the steps of an unrolled loop are alike."""
    return f" ×{count}" if count > 1 else ""


def _few(items: Sequence[str], limit: int = 3) -> str:
    return " ".join([*items[:limit], "…"]) if len(items) > limit else " ".join(items)


def _few_digits(number: float) -> str:
    """Three digits, without a power of ten."""
    return f"{float(f'{number:.3g}'):,.10g}"


def _short(number: float) -> str:
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(digits, 4)}f}"


def summarize(
    before: Program,
    after: Program,
    passes: Sequence[PassReport],
    context: Context,
    as_parts: Collection[str] = (),
) -> tuple[tuple[NetworkSummary, ...], int]:
    """The networks with weights, and how many have none. `before` is the program with layers composed but
    cores as they were; values keep their names, so the two programs pair up. `as_parts` names the cores that the
    file holds as what they were made of."""
    originals = {n.output.name: n for n in before.networks}
    decisions = {name: _headlines(name, passes) for name in originals}
    tables, tables_after = tables_of(before), tables_of(after)
    summaries, views = [], 0
    for node in after.nodes:
        if isinstance(node, Opaque):
            continue
        original = originals[node.value.name]
        gathered = {t.name: (t, tables[t.name]) for t in original.operands if t.name in tables}
        if not gathered and not any(c.indices for c in original.cores):
            views += 1
            continue
        told = decisions.get(node.value.name, ())
        measured = _measured(node.value.name, passes)
        summary = _summary(original, node, told, context, as_parts, measured)
        if gathered:
            final = {t.name: (t, tables_after[t.name]) for t in node.operands if t.name in tables_after}
            held = sum(_held(after, name, as_parts) for name in {name for _, (name, _) in final.values()})
            summary = _with_tables(summary, original, gathered, final, held, context)
        summaries.append(summary)
    return tuple(summaries), views


def _summary(
    original: Network,
    final: Network | Switch,
    decisions: Sequence[str],
    context: Context,
    as_parts: Collection[str],
    measured: dict[int, float],
) -> NetworkSummary:
    moving = original.moving
    output = {i.name for i in original.output.indices}
    outer = output | {i.name for t in original.operands for i in t.indices}
    outer |= {name for t in original.terms for name in t.slid}
    bonds = {i.name: i for t in original.cores for i in t.indices if i.name not in outer}
    costs = {}
    dense_parameters = 0
    for batch in context.batches:
        ways = {"naive": [0.0] * 3, "dense": [0.0] * 3, "chosen": [0.0] * 3}
        for term in moving:
            dense = dense_tree(original, term, context, batch) or term.order
            for way, tree in (("naive", term.order), ("dense", dense)):
                _add(ways[way], cost_of(original, term, tree, context, batch))
        now = final.case(batch) if isinstance(final, Switch) else final
        for term in now.moving:
            _add(ways["chosen"], cost_of(now, term, None, context, batch))
        costs[batch] = {way: Cost(*numbers) for way, numbers in ways.items()}
    for term in moving:
        dense_parameters += _dense_size(original, term)
    dense_parameters += sum(_size(c) for t in original.constants for c in t.cores)
    cores = {id(c.data): c for case in networks_of(final) for c in case.cores}
    return NetworkSummary(
        name=final.label,
        value=final.output.name,
        inputs=tuple(dict.fromkeys(f"[{' '.join(str(d) for d in t.shape)}]" for t in original.operands)),
        output=f"[{' '.join(str(d) for d in original.output.shape)}]",
        cores=tuple(f"{c.name}[{', '.join(i.name for i in c.indices)}]" for c in original.cores),
        bonds=tuple(f"{name}={index.size}" for name, index in bonds.items()),
        parameters=sum(_size(c) for c in original.cores),
        dense_parameters=dense_parameters,
        stored=sum(c.recipe.elements if c.recipe and c.name in as_parts else _size(c) for c in cores.values()),
        costs=costs,
        measured=measured,
        memory=dict(zip(context.batches, peaks(final, context), strict=True)),
        plans={serves: _plan(case) for serves, case in _cases(final)},
        decisions=tuple(decisions),
        source=str(final.source),
    )


_Gathered = Mapping[str, tuple[Tensor, tuple[str, Array]]]
"""Operands of a network that are rows of tables, with the tables' names and arrays."""


def _held(program: Program, weight: str, as_parts: Collection[str]) -> int:
    """Numbers of a weight in the file."""
    made = program.made.get(weight)
    return made.recipe.elements if made and made.recipe and weight in as_parts else program.weights[weight].size


def _with_tables(
    summary: NetworkSummary, network: Network, gathered: _Gathered, final: _Gathered, held: int, context: Context
) -> NetworkSummary:
    """The summary of a network that reads rows of tables, which are weights of it too; `final` are those that it reads
    after the passes, of which the file holds `held` numbers."""
    weights = {id(array): array for _, (_, array) in gathered.values()}
    places = {i.name for rows, _ in gathered.values() for axis in rows.axes[:-1] for i in axis}
    columns = [i.size for i in network.output.indices if i.name not in places and isinstance(i.size, int)]
    named = [f"{name}[rows of {array.shape[0]}]" for _, (name, array) in gathered.values()]
    alone = len(gathered) == len(network.operands)
    one = {"": next(iter(gathered.values()))}
    costs = {}
    for batch, ways in summary.costs.items():
        naive, chosen = (_gathers(network, tables, context, batch) for tables in (gathered, final))
        dense = _gathers(network, one, context, batch, math.prod(map(int, columns))) if alone else naive
        costs[batch] = {
            "naive": ways["naive"] + naive,
            "dense": dense if alone else ways["dense"] + dense,
            "chosen": ways["chosen"] + chosen,
        }
    return replace(
        summary,
        cores=(*named, *summary.cores),
        parameters=summary.parameters + sum(array.size for array in weights.values()),
        dense_parameters=math.prod([*columns, *(array.shape[0] for _, (_, array) in gathered.values())]),
        stored=summary.stored + held,
        costs=costs,
    )


def _gathers(network: Network, tables: _Gathered, context: Context, batch: int, width: int | None = None) -> Cost:
    """What it takes to gather the rows that a network reads, or rows of another width."""
    total = Cost(0.0, 0.0, 0.0)
    itemsize = np.dtype(network.dtype).itemsize
    for rows, (_, array) in tables.values():
        count = math.prod(context.size(i.size, batch) for axis in rows.axes[:-1] for i in axis)
        columns = array.shape[1] if width is None else width
        seconds = gather_seconds(context, count, columns, itemsize)
        total += Cost(0.0, 2.0 * count * columns * itemsize, seconds)
    return total


def _cases(node: Network | Switch) -> list[tuple[str, Network]]:
    return list(zip(node.ranges, node.cases, strict=True)) if isinstance(node, Switch) else [("all", node)]


def _plan(network: Network) -> tuple[str, ...]:
    return tuple(f"{s.form} -> {' '.join(s.order)}" for t in network.terms if t.steps for s in t.steps)


def _add(total: list[float], schedule: Any) -> None:
    for k, number in enumerate((schedule.flops, schedule.bytes, schedule.seconds)):
        total[k] += number


def _size(core: Any) -> int:
    return int(core.data.size)


def _dense_size(network: Network, term: Any) -> int:
    """Elements of the layer's weight if it were dense: over all modes that cores share with the outside."""
    outside = {i.name for i in network.output.indices} | {i.name for t in term.operands for i in t.indices} | term.slid
    names = {i.name: i.size for c in term.cores for i in c.indices if i.name in outside}
    return int(dims.product(names.values())) if names else sum(_size(c) for c in term.cores)


def _measured(value: str, passes: Sequence[PassReport]) -> dict[int, float]:
    """Seconds that the chosen plans took at each batch size; empty where none was timed."""
    taken: dict[int, float] = {}
    for change in (c for p in passes for c in p.changes if c.network == value and "chosen" in c.details):
        for batch, way in change.details["chosen"].items():
            if "measured" in way:
                taken[batch] = taken.get(batch, 0.0) + way["measured"] * 1e-6
    return taken


def _headlines(value: str, passes: Sequence[PassReport]) -> tuple[str, ...]:
    """What the passes made of one network, in a few words; the report has every change."""
    changes = [(p.name, c) for p in passes for c in p.changes if c.network == value and not c.declined]
    lines = [c.what for name, c in changes if name == "fold" and c.what.endswith("composed")]
    lines += [f"{c.what} ({c.why})" for name, c in changes if name in ("gathers", "steps", "tables")]
    merged = [c.what for name, c in changes if name == "merge_cores"]
    lines += merged if len(merged) <= 2 else [f"{len(merged)} merges of adjacent cores"]
    lines += [f"{_brief(c.what)} ({c.why})" if c.why else _brief(c.what) for name, c in changes if name == "order"]
    lines += [f"{c.what} ({c.why})" for name, c in changes if name in ("layout", "limit")]
    return tuple(lines)


def _brief(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
