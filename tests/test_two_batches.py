"""A model with two inputs whose first modes have nothing to do with each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import tncompile


class Scores(nn.Module):
    """How well each of some queries fits each of some documents."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return self.query(queries) @ self.document(documents).relu().T


def test_the_second_batch_is_a_dimension_with_a_typical_size() -> None:
    """The first is ``batch``; the other is dynamic too, checked at other sizes, and planned for a size that is told."""
    torch.manual_seed(0)
    model = Scores().eval()
    compiled = tncompile.compile(model, (torch.randn(3, 8), torch.randn(5, 8)), batch=(1, 32))
    queries, documents = compiled.program.inputs
    name = (documents.shape or ())[0]
    assert queries.shape == ("batch", 8) and isinstance(name, str) and name != "batch"
    assert compiled.report.sizes == {name: 5}
    assert f"and for {name}=5; --dim NAME=SIZE says what is typical" in str(compiled.report)
    assert compiled.report.check is not None and len({run.partition(name)[2] for run in compiled.report.check.runs}) > 1
    x, y = torch.randn(7, 8), torch.randn(2, 8)
    np.testing.assert_allclose(compiled.run(x, y), model(x, y).detach().numpy(), atol=1e-5)

    typical = tncompile.compile(model, (x, torch.randn(5, 8)), batch=(1, 32), sizes={name: 1000}, check=False)
    assert typical.report.sizes == {name: 1000}
    costs = [next(n for n in c.report.networks if n.name == "document").costs[1]["chosen"] for c in (compiled, typical)]
    assert costs[1].flops == 200 * costs[0].flops
