"""What an order of rows and columns by correlation does for formats with modes, on the weights of a trained model.

    python -m benchmarks.permutation --write docs/tensorize.md

The matrices of the sentence encoder `minilm_l6`, at a quarter of their parameters: the error of each format with two
modes on either side, as the weights are and permuted (`tncompile.decomp.by_correlation`), beside that of an SVD, which
no permutation changes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.models import CASES
from benchmarks.report import between
from tncompile.decomp import BlockTrain, MatrixTrain, Ranks, Tucker, by_correlation
from tncompile.decomp.modes import balanced
from tncompile.decomp.treeformat import TreeFactorized
from tncompile.ir import Array

FORMATS: tuple[type[TreeFactorized], ...] = (MatrixTrain, Tucker, BlockTrain)
SHARE = 0.25
START, END = "<!-- permutation -->", "<!-- end of permutation -->"


@dataclass(frozen=True)
class Result:
    """Relative errors of a weight ``[in, out]``: of its SVD, and of each format as it is and permuted."""

    name: str
    svd: float
    errors: tuple[tuple[float, float], ...]


def weights() -> Iterator[tuple[str, Array]]:
    """The matrices of all layers but the tables, one of each kind of a layer, as ``[in, out]``."""
    module = CASES["minilm_l6"].load().module
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and "embedding" not in name and ".0." in name:
            yield name.removesuffix(".weight"), parameter.detach().double().numpy().T


def measure(name: str, weight: Array) -> Result:
    """The errors of one weight."""
    size = int(weight.size * SHARE)
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    rank = size // sum(weight.shape)
    axes = (balanced(weight.shape[0], 2), balanced(weight.shape[1], 2))
    ordered = by_correlation(weight).apply(weight)
    errors = tuple((_error(f, weight, axes, size), _error(f, ordered, axes, size)) for f in FORMATS)
    return Result(name, math.sqrt(squares[rank:].sum() / squares.sum()), errors)


def _error(kind: type[TreeFactorized], weight: Array, axes: tuple[tuple[int, ...], ...], size: int) -> float:
    found = kind.from_dense(weight, axes, Ranks(parameters=size)).dense()
    return float(np.linalg.norm(found - weight) / np.linalg.norm(weight))


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    names = [kind.__name__ for kind in FORMATS]
    head = ["weight", "SVD", *(cell for name in names for cell in (name, "permuted"))]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for r in results:
        cells = [f"{r.svd:.3f}", *(f"{e:.3f}" for pair in r.errors for e in pair)]
        lines.append(f"| `{r.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and with --write put the table into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file with the places for the table")
    args = parser.parse_args()
    text = table([measure(name, weight) for name, weight in weights()])
    print(text)
    if args.write is not None:
        page = args.write.read_text("utf-8")
        args.write.write_text(between(page, text, START, END), "utf-8")


if __name__ == "__main__":
    main()
