"""Layers of other libraries whose `forward` cannot be traced, computed another way while a model is.

An `Adapter` computes what one class's `forward` does, on the module's own parameters, with plain tensor operations.
Classes are known by their full names: nothing is imported for a model that does not use them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tncompile.errors import SourceRef, UnsupportedError
from tncompile.frontend.adapters import tensorly_torch

TOLERANCE = 1e-4
"""How far, relative to the largest number, an adapter's result may be from the module's own in its own dtype."""


@dataclass(frozen=True)
class Adapter:
    """`forward(module, ...)` computes what the module's own does, with parameters of the same names.

    `probes(module)` are positional arguments on which the two are compared before each trace.
    """

    forward: Callable[..., torch.Tensor]
    probes: Callable[[Any], Sequence[tuple[Any, ...]]]


ADAPTERS: Mapping[str, Adapter] = {
    "tltorch.factorized_layers.factorized_embedding.FactorizedEmbedding": Adapter(
        tensorly_torch.embedding, tensorly_torch.embedding_probes
    )
}
"""By the full name of the class that defines `forward`."""


@contextlib.contextmanager
def adapted(model: torch.nn.Module, adapters: Mapping[str, Adapter] = ADAPTERS) -> Iterator[None]:
    """Within it, every module of a model that has an adapter computes by it; after it, all is as before.

    UnsupportedError where an adapter does not compute what its module does.
    """
    swapped: dict[torch.nn.Module, Adapter] = {}
    for path, module in model.named_modules():
        adapter = adapters.get(_forward_of(module))
        if adapter is not None and "forward" not in vars(module):  # a forward of its own is the user's
            _compare(path, module, adapter)
            swapped[module] = adapter
    try:
        for module, adapter in swapped.items():
            module.forward = partial(adapter.forward, module)
        yield
    finally:
        for module in swapped:
            vars(module).pop("forward", None)


def _forward_of(module: torch.nn.Module) -> str:
    """Full name of the class that a module has its `forward` from."""
    owner = next((c for c in type(module).__mro__ if "forward" in vars(c)), type(module))
    return f"{owner.__module__}.{owner.__qualname__}"


def _compare(path: str, module: torch.nn.Module, adapter: Adapter) -> None:
    """UnsupportedError where module and adapter differ on a probe that the module can run."""
    with torch.no_grad():
        for args in adapter.probes(module):
            found = adapter.forward(module, *args)
            try:
                expected = module.forward(*args)
            except Exception:
                continue
            difference = (found - expected).abs().max() if found.shape == expected.shape else torch.inf
            if not difference <= TOLERANCE * expected.abs().max():
                raise UnsupportedError(
                    f"{type(module).__name__} cannot be traced, and does not compute what tncompile knows it to; "
                    "give it a forward of plain tensor operations",
                    SourceRef(path),
                )
