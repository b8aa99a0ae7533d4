"""One step of `benchmarks.pretrained` in a process of its own, so that whatever it does, the others are not touched.

    python -m benchmarks.pretrained_worker STEP CASE FOLDER RESULT OPTIONS

FOLDER is the case's own; OPTIONS are JSON. Writes to the file RESULT what was found, as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import pretrained_ways as ways
from benchmarks.models import CASES
from benchmarks.pretrained_cases import PRETRAINED, Inputs, Pretrained
from benchmarks.pretrained_ways import Arrays
from tncompile.compiler import save
from tncompile.errors import TNCompileError
from tncompile.runtime.device import profile
from tncompile.runtime.files import write_file
from tncompile.runtime.probe import Limits, probe
from tncompile.runtime.rivals import bind_session, quiet
from tncompile.runtime.session import Session
from tncompile.runtime.timing import machine, race

FP32, OURS = "fp32", "tncompile"
MODEL, CALIBRATION = "model.pt2", "calibration.npz"

#: Ways of tensorly-torch; a share of the parameters may follow, else it is that of tncompile's file, else a half.
TENSORLY = ("tt", "tucker")
WAYS = (
    FP32,
    "int8 dynamic",
    "int8 static",
    "int8 static, weighted only",
    *(f"SVD {share:g}" for share in ways.SHARES),
    *TENSORLY,
)


def file_of(folder: Path, way: str) -> Path:
    """The ONNX file of a way."""
    return folder / f"{way.replace(', ', '-').replace(' ', '-')}.onnx"


def prepare(case: Pretrained, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the traced module and the calibration data; the eager module's metric."""
    module, inputs = _module(case), case.calibrate()
    with quiet():
        save(module, tuple(x[:4] for x in inputs), folder / MODEL)
    write_file(folder / CALIBRATION, _npz(dict(zip(_names(folder), (x.numpy() for x in inputs), strict=True))))
    layers = [m for m in module.modules() if ways.replaceable(m)]
    return {
        "metric": case.metric(module),
        "metric_name": case.metric_name,
        "unit": case.unit,
        "parameters": ways.parameters(module),
        "in_layers": sum(ways.parameters(layer) for layer in layers),
        "calibration_rows": len(inputs[0]),
        "machine": machine("torch", "onnxruntime", "onnxruntime-gpu", "tensorly-torch"),
        "threads": options["threads"],
    }


def build(case: Pretrained, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file of one way and call it once, at the largest batch size."""
    way = str(options["way"])
    name, _, given = way.rpartition(" ")
    path, dense, found = file_of(folder, way), file_of(folder, FP32), dict[str, Any]()
    with quiet():
        if way == "int8 dynamic":
            ways.quantize_dynamic(dense, path)
        elif way.startswith("int8 static"):
            ways.quantize_static(dense, path, _calibration(folder), ways.WEIGHTED if "weighted" in way else ())
        elif way == FP32:
            ways.export(_module(case), _example(case), path)
        elif name == "SVD":
            ways.export(ways.low_rank(_module(case), float(given)), _example(case), path)
        else:
            found = _tensorly(case, folder, way, options)
    if "note" not in found:
        found["note"] = _tried(case, folder, path, options)
    return {**found, "bytes": path.stat().st_size}


def _tensorly(case: Pretrained, folder: Path, form: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """As tensorly-torch has it, in the faster of its two implementations."""
    module = _module(case)
    size = options.get("size")
    share = 0.5 if size is None else ways.share_for(module, size, file_of(folder, FP32).stat().st_size)
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written: dict[str, Path] = {}
        for implementation in ("reconstructed", "factorized"):
            path = Path(scratch, f"{implementation}.onnx")
            torch.manual_seed(0)
            try:
                ways.export(ways.tensorized(module, form, share, implementation), _example(case), path)
            except Exception as error:  # either may fail, as the library or the exporter likes
                notes[implementation] = first_line(error)
                continue
            notes[implementation] = _tried(case, folder, path, options)
            if not notes[implementation]:
                written[implementation] = path
        if not written:
            raise TNCompileError("; ".join(f"{name}: {note}" for name, note in notes.items()))
        best = _race(written, _rows(folder, case.batches[-1]), options["threads"], 2.0)
        fastest = min(best, key=lambda name: best[name])
        write_file(file_of(folder, form), written[fastest].read_bytes())
    return {"share": share, "implementation": fastest, "note": ""}


def score(case: Pretrained, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The metric of a file."""
    session = Session(file_of(folder, options["way"]), threads=options["threads"])
    names = _names(folder)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        feeds = session.feeds(dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        return torch.from_numpy(next(iter(session.run(feeds).values())))

    return {"metric": case.metric(run)}


def timed(case: Pretrained, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds a call of all files, in turns, at each batch size."""
    files = {way: file_of(folder, way) for way in options["ways"]}
    return {
        str(batch): _race(files, _rows(folder, batch), options["threads"], options["seconds"]) for batch in case.batches
    }


def profiled(case: Pretrained, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where the time of a file goes, by node, at each batch size."""
    path = file_of(folder, options["way"])
    return {
        str(batch): [
            [node.name, node.op, node.microseconds]
            for node in profile(path, _rows(folder, batch), threads=options["threads"])
        ]
        for batch in case.batches
    }


def _race(files: Mapping[str, Path], arrays: Arrays, threads: int, seconds: float) -> dict[str, float]:
    calls = {}
    for way, path in files.items():
        calls[way] = bind_session(Session(path, threads=threads), arrays).call
    times = race(calls, budget_s=seconds)
    return {way: times.median(way) for way in files}


def _tried(case: Pretrained, folder: Path, path: Path, options: Mapping[str, Any]) -> str:
    """Why a file does not run in time and memory, or nothing."""
    limits = Limits(first_call_s=options["limit"])
    return probe(path, _rows(folder, case.batches[-1]), limits, threads=options["threads"]).note


def _module(case: Pretrained) -> torch.nn.Module:
    with quiet():
        return CASES[case.name].load().module


def _example(case: Pretrained) -> Inputs:
    return tuple(x[:4] for x in case.calibrate())


def _names(folder: Path) -> list[str]:
    """The inputs as the traced module calls them."""
    exported = torch.export.load(folder / MODEL)
    return [s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]


def _calibration(folder: Path) -> Arrays:
    with np.load(folder / CALIBRATION, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _rows(folder: Path, batch: int) -> Arrays:
    return next(ways.rows(_calibration(folder), batch))


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def first_line(error: BaseException) -> str:
    """What is told of an error of any library."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"fails: {next((line for line in lines if line), type(error).__name__)[:200]}"


STEPS: Mapping[str, Callable[[Pretrained, Path, Mapping[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "build": build,
    "score": score,
    "race": timed,
    "profile": profiled,
}


def main(step: str, name: str, folder: Path, result: Path, options: Mapping[str, Any]) -> None:
    """Do one step and write what was found; a failure is a note."""
    torch.set_num_threads(options["threads"])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = STEPS[step](PRETRAINED[name], folder, options)
    except ModuleNotFoundError as error:
        found = {"note": f"not installed: {error.name}"}
    except Exception as error:  # a library fails as it likes, and the other ways are to go on
        found = {"note": first_line(error)}
    write_file(result, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), json.loads(sys.argv[5]))
