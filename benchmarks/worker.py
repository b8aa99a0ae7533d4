"""One case in a process of its own: ``python -m benchmarks.worker CASE FILE OPTIONS``, the options as JSON.

The result so far is written to FILE after every batch size, so that little is lost when the process is stopped.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.models import CASES, Case, Loaded
from tncompile.commands.bench import DENSE_PASSES, record_of, writer
from tncompile.frontend.trace import trace
from tncompile.runtime.contest import DENSE, OURS, Contest, Row, Subject
from tncompile.runtime.device import NodeTime, threads_of
from tncompile.runtime.files import write_file
from tncompile.runtime.probe import Limits
from tncompile.runtime.rivals import Inputs, quiet


def measure(case: Case, options: Mapping[str, Any], result: Path) -> None:
    """Measure a case and write what was found; `error` is why a case has no rows."""
    record: dict[str, Any] = {"group": case.group, "rows": []}
    threads = threads_of(options["threads"])  # before any package is imported: some change it for all
    try:
        with quiet():
            loaded, again = case.load(), case.load()
        threads_of(threads)
        record["parameters"] = sum(p.numel() for p in loaded.module.parameters())
        batches: Sequence[int | None] = (None,)
        if loaded.batch_axis is not None:
            batches = tuple(options["batch"] or case.batches)
        _contest(loaded, again, batches, {**options, "threads": threads}, result, record)
    except ModuleNotFoundError as error:
        record["error"] = f"not installed: {error.name}"
    except Exception as error:  # a library fails as it likes, and the other cases are to go on
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        record["error"] = f"fails: {first[:300]}"
    _write(result, record)


def _contest(
    loaded: Loaded,
    again: Loaded,
    batches: Sequence[int | None],
    options: Mapping[str, Any],
    result: Path,
    record: dict[str, Any],
) -> None:
    # The module that is traced is not the one that is run: either may leave some libraries' modules changed.
    with quiet():
        exported = trace(loaded.module, loaded.inputs, None, "batch" if loaded.batch_axis is not None else None)
    sizes = [b for b in batches if b is not None] or [1]
    module = again.module.to(options["device"])
    device = options["device"]
    planned = {OURS: None, DENSE: DENSE_PASSES}
    writers = {way: writer(exported, sizes, device, passes, options["threads"]) for way, passes in planned.items()}
    subject = Subject(exported, module, lambda batch: Inputs(again.at(batch)), writers)
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(first_call_s=options["limit"])
        contest = Contest(subject, Path(folder), options["against"], options["device"], options["threads"], limits)
        rows: list[Row] = []
        for row in contest.run(batches, options["seconds"]):
            rows.append(row)
            record |= record_of(contest, rows)
            if options["profile"]:
                record.setdefault("profiles", []).append(_profiles(contest, row))
            _write(result, {**record, "error": "stopped before its last batch size"})


def _profiles(contest: Contest, row: Row) -> dict[str, Any]:
    """Where the time of tncompile and of the fastest other ONNX file goes, by operator and by node."""
    files = [way for way in contest.files if way in row.ms and way != OURS]
    ways = [OURS, min(files, key=lambda way: row.ms[way])] if files else [OURS]
    found = {way: contest.profile(way, row.batch) for way in ways if way in row.ms}
    return {
        "batch": row.batch,
        "operators": {way: _by_operator(nodes) for way, nodes in found.items()},
        "nodes": {way: [asdict(node) for node in nodes[:20]] for way, nodes in found.items()},
    }


def _by_operator(nodes: Sequence[NodeTime]) -> dict[str, float]:
    times: dict[str, float] = {}
    for node in nodes:
        times[node.op] = times.get(node.op, 0.0) + node.microseconds
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _write(result: Path, record: Mapping[str, Any]) -> None:
    write_file(result, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    measure(CASES[sys.argv[1]], json.loads(sys.argv[3]), Path(sys.argv[2]))
