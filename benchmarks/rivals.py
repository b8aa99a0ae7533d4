"""The other ways to run a model that tncompile is measured against.

ONNX Runtime always runs with its default session options: every graph optimization, one thread a
core.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float32]
Model = Callable[[Array], Array]

#: A call that takes longer than this is not worth repeating: its first time is its time.
SLOW_MS = 500.0


def trace(module: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """Export a module of one input with a dynamic batch."""
    with _einsum_kept_whole(), _quiet():
        return torch.export.export(
            module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def exporter(program: torch.export.ExportedProgram, path: Path) -> None:
    """What one gets without tncompile: torch's own ONNX exporter."""
    with _einsum_kept_whole(), _quiet():
        torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)


@contextmanager
def _einsum_kept_whole() -> Iterator[None]:
    """With opt_einsum, PyTorch picks an order from the example's sizes, which fixes the batch."""
    enabled = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False
    try:
        yield
    finally:
        torch.backends.opt_einsum.enabled = enabled


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its progress, and of packages that are not there."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def eager(module: nn.Module) -> Model:
    """The model in PyTorch itself."""
    module.eval()

    def call(x: Array) -> Array:
        with torch.no_grad():
            result: Array = module(torch.from_numpy(x)).numpy()
        return result

    return call


def deployed(path: Path) -> Model:
    """The model of an ONNX file in stock ONNX Runtime."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(x: Array) -> Array:
        result: Array = session.run(None, {name: x})[0]
        return result

    return call


@dataclass(frozen=True)
class Probe:
    """The first call of a model in a process of its own: its time, or why there is none."""

    ms: float | None
    note: str = ""

    @property
    def repeatable(self) -> bool:
        """Whether it is fast enough to be raced."""
        return self.ms is not None and self.ms <= SLOW_MS


# Loads a model, runs it once and prints how long that took. The memory limit makes a call that asks
# for terabytes, or for all of this machine, fail instead of taking the machine down.
_PROBE = """
import json, sys, time
path, shape, gigabytes = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30,) * 2)
except ImportError:
    pass
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
feeds = {session.get_inputs()[0].name: np.zeros(shape, np.float32)}
start = time.perf_counter()
session.run(None, feeds)
print((time.perf_counter() - start) * 1e3)
"""


def probe(path: Path, x: Array, *, limit_s: float, gigabytes: int = 8) -> Probe:
    """Run a model once in a subprocess that has ``limit_s`` seconds to load and run it."""
    arguments = [str(path), json.dumps(x.shape), str(gigabytes)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, *arguments],
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return Probe(None, f"> {limit_s:.0f} s")
    if done.returncode == 0:
        return Probe(float(done.stdout.split()[-1]))
    out_of_memory = done.returncode < 0 or "alloc" in done.stderr
    return Probe(None, f"> {gigabytes} GB" if out_of_memory else "fails")
