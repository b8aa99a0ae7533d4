"""The device that models run on, and whether ONNX Runtime really runs them there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tncompile.errors import TNCompileError
from tncompile.ir import Array
from tncompile.runtime.session import Session

DEVICES = ("cpu", "cuda")
_FIRST = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def providers(device: str) -> tuple[str, ...]:
    """The execution providers for a device, first choice first. TNCompileError where this onnxruntime has none."""
    import onnxruntime as ort

    first, available = _FIRST[device], ort.get_available_providers()
    if first not in available:
        raise TNCompileError(
            f"--device {device}: onnxruntime {ort.__version__} has no {first}, only {', '.join(available)}; install "
            "onnxruntime-gpu in its place on a machine with an NVIDIA GPU, or leave --device out"
        )
    return tuple(dict.fromkeys((first, "CPUExecutionProvider")))


def threads_of(count: int | None = None) -> int:
    """The number of threads that every way to run a model is given: `count`, or one for each core that torch sees.

    Sets torch's own.
    """
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@dataclass(frozen=True)
class NodeTime:
    """What ONNX Runtime's profile says of one node of its optimized graph: mean microseconds a call."""

    name: str
    op: str
    provider: str
    microseconds: float


def profile(
    model: Path, feeds: Mapping[str, Array], device: str = "cpu", threads: int = 0, calls: int = 10
) -> tuple[NodeTime, ...]:
    """Run a model under ONNX Runtime's profiler, after one call to warm up; the slowest nodes first."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model, providers(device), threads=threads, trace=f"{folder}/trace")
        call = session.bound(feeds)
        for _ in range(calls + 1):
            call()
        events = json.loads(session.end_trace().read_text(encoding="utf-8"))
    return _node_times(events, calls)


def _node_times(events: Sequence[Mapping[str, Any]], calls: int) -> tuple[NodeTime, ...]:
    times: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            args = event["args"]
            key = (name.removesuffix("_kernel_time"), str(args["op_name"]), str(args.get("provider", "")))
            times.setdefault(key, []).append(float(event["dur"]))
    # one call comes first and is not counted; a node in a loop runs several times in each
    counted = {key: sum(t[len(t) // (calls + 1) :]) / calls for key, t in times.items()}
    return tuple(NodeTime(*key, us) for key, us in sorted(counted.items(), key=lambda item: -item[1]))


def require_on_device(session: Session, nodes: Sequence[NodeTime], device: str) -> None:
    """TNCompileError where the provider of a device did not start, or ran none of the nodes."""
    first = _FIRST[device]
    if session.providers[0] != first:
        raise TNCompileError(
            f"--device {device}: {first} could not be started and ONNX Runtime fell back to "
            f"{session.providers[0]}; check its driver and libraries (onnxruntime-gpu names the versions it needs)"
        )
    if nodes and not any(node.provider == first for node in nodes):
        raise TNCompileError(f"--device {device}: {first} ran none of the {len(nodes)} nodes; all ran on the CPU")
