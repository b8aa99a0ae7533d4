"""tensorly-torch's embedding, whose own `forward` indexes by NumPy: rows of its cores, contracted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch

from tncompile.errors import UnsupportedError


def embedding(module: Any, input: torch.Tensor, indices: int = 0) -> torch.Tensor:
    """`tltorch.FactorizedEmbedding.forward`: float[*input.shape, embedding_dim] for any shape of ids.

    `indices` is the layer, where several are factorized jointly. UnsupportedError for other factorizations than
    CP, Tucker and block tensor train.
    """
    weight = module.weight
    kind = type(weight).__name__
    if kind not in _ROWS:
        raise UnsupportedError(f"an embedding of factorization {kind} cannot be traced; make it an nn.Embedding")
    joint = module.n_layers > 1
    rows, modes = weight.tensorized_shape[-2:]
    position = unravel(input, rows)
    factors = [weight.factors[k] for k in range(len(weight.factors))]
    result = _ROWS[kind](weight, factors, indices if joint else None, position, len(modes))
    return result.reshape(*input.shape, module.embedding_dim)


def embedding_probes(module: Any) -> list[tuple[Any, ...]]:
    """Ids that reach both ends of every mode, of the first and of the last layer."""
    last = module.num_embeddings - 1
    ids = torch.tensor([[0, 1, last // 2], [last // 3, last - 1, last]]).clamp(0, last)
    return [(ids, layer) for layer in dict.fromkeys((0, module.n_layers - 1))]


def unravel(ids: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """Row-major ids as one tensor of positions for each mode."""
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    quotients = [ids // stride if stride > 1 else ids for stride in strides]
    return [q % size if k else q for k, (q, size) in enumerate(zip(quotients, shape, strict=True))]


def _cp(weight: Any, factors: list[Any], layer: int | None, position: list[torch.Tensor], modes: int) -> torch.Tensor:
    scales = [weight.weights]
    if layer is not None:
        scales.append(factors.pop(0)[layer])
    rows = [factor[p] for factor, p in zip(factors, position, strict=False)]
    columns = factors[len(rows) :]
    names = ascii_letters[1 : 1 + modes]
    inputs = ["a"] * len(scales) + ["...a"] * len(rows) + [f"{name}a" for name in names]
    return torch.einsum(f"{','.join(inputs)}->...{names}", *scales, *rows, *columns)


def _tucker(
    weight: Any, factors: list[Any], layer: int | None, position: list[torch.Tensor], modes: int
) -> torch.Tensor:
    bonds = ascii_letters[: weight.core.ndim]
    chosen = [] if layer is None else [factors.pop(0)[layer]]
    rows = [factor[p] for factor, p in zip(factors, position, strict=False)]
    columns = factors[len(rows) :]
    names = ascii_letters[len(bonds) : len(bonds) + modes]
    inputs = [bonds, *bonds[: len(chosen)], *(f"...{b}" for b in bonds[len(chosen) : len(chosen) + len(rows)])]
    inputs += [name + bond for name, bond in zip(names, bonds[len(chosen) + len(rows) :], strict=True)]
    return torch.einsum(f"{','.join(inputs)}->...{names}", weight.core, *chosen, *rows, *columns)


def _block_tt(
    weight: Any, factors: list[Any], layer: int | None, position: list[torch.Tensor], modes: int
) -> torch.Tensor:
    cores = factors if layer is None else [factor[:, layer] for factor in factors]
    rows = [core.movedim(1, 0)[p] for core, p in zip(cores, position, strict=True)]
    bonds, names = ascii_letters[: modes + 1], ascii_letters[modes + 1 : 2 * modes + 1]
    inputs = [f"...{bonds[k]}{names[k]}{bonds[k + 1]}" for k in range(modes)]
    return torch.einsum(f"{','.join(inputs)}->...{names}", *rows)


_ROWS = {"CPTensorized": _cp, "TuckerTensorized": _tucker, "BlockTT": _block_tt}
