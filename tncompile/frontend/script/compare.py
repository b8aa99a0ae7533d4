"""Whether a traced graph is the TorchScript that it was traced from, for inputs other than those of the trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tncompile.errors import TNCompileWarning, UnsupportedError
from tncompile.frontend.script.module import Scripted

TOLERANCE = 1e-3
"""How far, relative to the largest number, the traced graph may be from the script in its own dtype."""
HALF_TOLERANCE = 3e-2
"""The same in a dtype of 16 bits."""

_ADVICE = (
    "write it with tensors, torch.where or torch.cond in the module that it was made from, and tncompile.save that"
)


def decide(module: Scripted, inputs: Mapping[str, torch.Tensor], fix_choices: bool) -> bool:
    """Let the module take its ways on these inputs; whether it chose any by their values.

    UnsupportedError where it did, unless `fix_choices`: then a warning for each. Assertions are taken to hold.
    """
    choices = module.record(inputs)
    chosen = [choice for choice in choices if not choice.assertion]
    if chosen and not fix_choices:
        more = f", and {len(chosen) - 1} more such" if len(chosen) > 1 else ""
        raise UnsupportedError(
            f"the model decides by the values of its inputs ({chosen[0]}{more}), and one way alone would be compiled: "
            f"{_ADVICE}; or, if one way will do, take the one that random inputs take with --fix-choices"
        )
    for choice in choices:
        told = (
            f"the model refuses inputs by their values ({choice}); the compiled one does not look"
            if choice.assertion
            else f"the model decides by the values of its inputs ({choice}); compiled for inputs that decide as random "
            "ones do"
        )
        warnings.warn(told, TNCompileWarning, stacklevel=3)
    return bool(chosen)


def compare(
    module: Scripted,
    program: torch.export.ExportedProgram,
    inputs: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
) -> None:
    """UnsupportedError where the program and the script itself differ on inputs, positional and named, of both."""
    traced = program.module()
    for args, kwargs in inputs:
        try:
            with module.as_saved():
                expected = _run(module, args, kwargs)
            found = _run(traced, args, kwargs)
        except Exception:  # inputs that one of them refuses, as the other sizes may be
            continue
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not _close(a, b):
                raise UnsupportedError(
                    f"the script computes something else than its trace on other random inputs (output {number}), so "
                    f"it depends on their values in a way that cannot be compiled: {_ADVICE}"
                )


def _run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, dict(kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return [x for x in torch.utils._pytree.tree_leaves(module(*args, **kwargs)) if x is not None]


def _close(found: Any, expected: Any) -> bool:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    if found.shape != expected.shape:
        return False
    wide = torch.complex128 if expected.is_complex() else torch.float64
    tolerance = HALF_TOLERANCE if expected.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    found, expected = found.to(wide), expected.to(wide)
    finite = expected.isfinite()
    largest = float(expected[finite].abs().max()) if finite.any() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * largest, equal_nan=True)
