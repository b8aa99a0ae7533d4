"""How long planning takes as networks grow, and how good the plans are.

    python -m benchmarks.planning [--cores 10,20,...] [--only TEXT] [--out DIR]

For networks of every shape in `benchmarks.networks`: seconds in the passes, and the predicted seconds of a call beside
those of cotengra's order (greedy, optimal for up to nine tensors), which counts FLOPs alone, scheduled as ours is.
The exponent is that of a power of the number of cores, fitted to the times from 20 cores on. Writes planning.json and,
with matplotlib, planning.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.networks import networks
from tncompile.commands.options import sizes
from tncompile.cost.devices import default_profile
from tncompile.cost.search import optimal
from tncompile.ir import Program, Switch
from tncompile.passes import Context, Pipeline
from tncompile.passes.plans import cost_of, merge_constants, tree_search

ROOT = Path(__file__).resolve().parents[1]


def plan(program: Program, batches: tuple[int, ...]) -> dict[str, Any]:
    """Seconds that planning takes, predicted seconds of a call at each batch size, and of cotengra's order."""
    context = Context(batches, profile=default_profile(), outputs=frozenset({"y"}))
    start = time.perf_counter()
    after, _ = Pipeline().run(program, context)
    seconds = time.perf_counter() - start
    (node,) = after.nodes
    (before,) = program.networks
    (term,) = before.terms
    planned, reference = [], []
    for batch in context.batches:
        network = node.case(batch) if isinstance(node, Switch) else after.networks[0]
        planned.append(sum(cost_of(network, t, None, context, batch).seconds for t in network.terms))
        search = tree_search(before, term, context, batch)
        tree = optimal(search.inputs, search.output, search.sizes)
        merged = merge_constants(before, term, tree, shapes_only=True)
        reference.append(cost_of(before, merged, merged.order, context, batch).seconds)
    return {"tensors": len(term.tensors), "seconds": seconds, "planned": planned, "flops_order": reference}


def exponent(cores: Sequence[int], seconds: Sequence[float]) -> float:
    """Of a power law through the times, from 20 cores on."""
    points = [(c, s) for c, s in zip(cores, seconds, strict=True) if c >= 20]
    if len(points) < 2:
        return float("nan")
    x, y = np.log(np.asarray(points)).T
    return float(np.polyfit(x, y, 1)[0])


def plot(results: dict[str, list[dict[str, Any]]], out: Path) -> Path | None:
    """Planning time by number of cores; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, rows in results.items():
        style = "-" if "a core" in name else "--"
        axes.loglog([r["cores"] for r in rows], [r["seconds"] for r in rows], style, marker=".", label=name)
    axes.axhline(10.0, color="grey", linewidth=0.8)
    axes.set(xlabel="cores", ylabel="seconds in the passes", title="Planning time")
    axes.legend(fontsize="small")
    path = out / "planning.png"
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan everything, print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=sizes, default=(10, 20, 40, 60, 100, 200), metavar="N,...")
    parser.add_argument("--batch", type=sizes, default=(1, 256), metavar="N,...")
    parser.add_argument("--only", default="", metavar="TEXT", help="networks whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "planning", metavar="DIR")
    options = parser.parse_args(arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    for cores in options.cores:
        for name, program in networks(cores):
            if options.only not in name:
                continue
            row = {"cores": cores, **plan(program, tuple(options.batch))}
            results.setdefault(name, []).append(row)
            ratios = (a / max(b, 1e-12) for a, b in zip(row["planned"], row["flops_order"], strict=True))
            against = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name}, {cores} cores: {row['seconds']:.2f} s; predicted ÷ FLOPs-only order {against}", flush=True)
    for name, rows in results.items():
        power = exponent([r["cores"] for r in rows], [r["seconds"] for r in rows])
        print(f"{name}: planning time grows as cores^{power:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planning.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn = plot(results, options.out)
    print(f"in {options.out}: planning.json{f', {drawn.name}' if drawn else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
