"""The other ways to run a model that tncompile is measured against: PyTorch's own, and its ONNX exporter's."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import string
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export.passes import move_to_device_pass

from tncompile.cost.search import einsum_path
from tncompile.emit.onnxfile import EXTERNAL_FROM
from tncompile.errors import TNCompileError
from tncompile.frontend.trace import whole_einsums
from tncompile.ir import Array
from tncompile.runtime.accuracy import relative_error
from tncompile.runtime.session import Session


class NotApplicable(TNCompileError):
    """A way to run a model that would be the same as another one for this model."""


NO_PYTORCH = "the model came in as ONNX, without PyTorch"


def not_pytorch(path: Path) -> None:
    """In the place of a writer that needs the model in PyTorch."""
    raise NotApplicable(NO_PYTORCH)


@dataclass(frozen=True)
class Inputs:
    """What a model is called with: tensors, nested as `torch.export` takes them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[torch.Tensor], Any]) -> Inputs:
        """The same with each tensor replaced."""
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def arrays(self) -> list[Array]:
        """The tensors in order, as arrays."""
        return [t.detach().cpu().numpy() for t in _tensors((self.args, dict(self.kwargs)))]


@dataclass(frozen=True)
class Bound:
    """A way to run a model on fixed inputs: the call to be timed, and one that gives its outputs in order."""

    call: Callable[[], object]
    outputs: Callable[[], list[Array]]


def bind_module(module: Callable[..., Any], inputs: Inputs, device: str = "cpu") -> Bound:
    """A module, or what `torch.compile` made of one. On a GPU a call returns when it is done."""
    moved = inputs.map(lambda t: t.to(device))

    def call() -> Any:
        with torch.no_grad():
            result = module(*moved.args, **moved.kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return Bound(call, lambda: [t.detach().cpu().numpy() for t in _tensors(call())])


def eager_module(exported: torch.export.ExportedProgram, batch: int, device: str = "cpu") -> Callable[..., Any]:
    """An exported program as a module to call.

    Its einsums of three or more operands are given an order for one batch size, as `torch.einsum` gives them one:
    the traced operator alone would contract from left to right.
    """
    if device != "cpu":
        exported = move_to_device_pass(exported, device)
    module = exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default):
        equation, operands = node.args[0], node.args[1]
        shapes = [[n if isinstance(n, int) else batch for n in o.meta["val"].shape] for o in operands]
        path = einsum_path(equation, shapes)
        if path is not None:
            node.kwargs = {"path": path}
    module.recompile()
    return module


def bind_session(session: Session, arrays: Mapping[str, Array]) -> Bound:
    """An ONNX session, on arrays as `Session.feeds` takes them."""
    feeds = session.feeds(arrays)
    return Bound(session.bound(feeds), lambda: list(session.run(feeds).values()))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------------------------ ONNX without tncompile


def export_plain(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Write what one gets without tncompile: torch's own exporter. Whatever that raises is raised."""
    large = sum(t.nbytes for t in exported.state_dict.values()) > EXTERNAL_FROM
    with whole_einsums(), quiet():
        torch.onnx.export(exported, (), path, dynamo=True, external_data=large, verbose=False)


def export_pairwise(exported: torch.export.ExportedProgram, path: Path, batch: int) -> None:
    """The same, after each einsum of three or more operands became einsums of two in opt_einsum's order.

    The order is that for one batch size. NotApplicable where the model has no such einsum, or no opt_einsum is
    installed.
    """
    count = 0

    def pairwise(equation: str, tensors: list[torch.Tensor], *, path: Any = None) -> Any:
        nonlocal count
        if len(tensors) < 3 or "." in equation:
            return NotImplemented
        count += 1
        return contract_pairwise(equation, tensors, batch)

    with whole_einsums(), quiet():
        split = exported.run_decompositions({torch.ops.aten.einsum.default: pairwise})
    if not count:
        raise NotApplicable("no einsum of three or more operands")
    export_plain(split, path)


def contract_pairwise(equation: str, tensors: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
    """An einsum as einsums of at most two operands, in opt_einsum's order; a symbolic size counts as `batch`."""
    try:
        import opt_einsum
    except ModuleNotFoundError as error:
        raise NotApplicable("opt_einsum is not installed") from error
    left, _, output = equation.replace(" ", "").partition("->")
    if "->" not in equation:  # by convention: what occurs once, in the order of the alphabet
        output = "".join(sorted(c for c in {*left} - {","} if left.count(c) == 1))
    terms = left.split(",")
    shapes = [tuple(n if isinstance(n, int) else batch for n in t.shape) for t in tensors]
    steps, _ = opt_einsum.contract_path(f"{left}->{output}", *shapes, shapes=True)
    pool = list(zip(terms, tensors, strict=True))
    for number, step in enumerate(steps):
        taken = [pool.pop(position) for position in sorted(step, reverse=True)]
        later = {c for term, _ in pool for c in term} | {*output}
        kept = "".join(c for c in string.ascii_letters if c in later and any(c in term for term, _ in taken))
        result = output if number == len(steps) - 1 else kept
        operands = ",".join(term for term, _ in taken)
        pool.append((result, torch.einsum(f"{operands}->{result}", *(tensor for _, tensor in taken))))
    return pool[0][1]


# ------------------------------------------------------------------------------------ limits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter tells its progress, and of packages that are not there."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in what runs inside after so many seconds, as soon as Python gets its turn.

    Without effect where there is no alarm: on Windows, and in a thread.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"> {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def output_error(found: Sequence[Array], expected: Sequence[Array], least: Sequence[float] = ()) -> float:
    """The largest relative error of any output; infinite where their number or a shape differs, NaN as in `check`.
    `least` are the outputs' `accuracy.scales`, 0 where not given."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    floors = least or [0.0] * len(found)
    errors = [relative_error(a, b, floor) for a, b, floor in zip(found, expected, floors, strict=True)]
    return float(np.max(errors, initial=0.0))  # NaN where one is
