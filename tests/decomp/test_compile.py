"""A module of a factorization is one network to the compiler."""

from __future__ import annotations

import numpy as np
import torch

import tncompile
from tests.decomp.strategies import random
from tncompile.decomp import CP, BlockTrain, Hierarchical, MatrixTrain, Permutation, Ranks, Ring, TensorTrain
from tncompile.frontend.importer import import_exported
from tncompile.frontend.trace import trace
from tncompile.ir import Network
from tncompile.passes import Clean, Context, Fold, Pipeline

AXES = ((3, 4), (4, 3))


def test_the_compiler_finds_one_network_for_each_module() -> None:
    kinds = (TensorTrain, Hierarchical, Ring, BlockTrain, CP)
    formats = [kind.from_dense(random(AXES, 1), AXES, Ranks(given=2, larger=True)) for kind in kinds]
    layers = [part for found in formats for part in (found.to_module(bias=np.ones(12)), torch.nn.ReLU())]
    program = import_exported(trace(torch.nn.Sequential(*layers), (torch.zeros(4, 12),), None, "batch")).program
    found, _ = Pipeline((Clean(), Fold(), Clean()), scheduled=False).run(program, Context())
    networks = [node for node in found.nodes if isinstance(node, Network)]
    assert len(networks) == len(kinds) and len(found.nodes) == 2 * len(kinds)
    for number, (network, factorized) in enumerate(zip(networks, formats, strict=True)):
        assert {core.name for core in network.cores} >= {f"{2 * number}.{n}" for n in factorized.core_names}


def test_a_compiled_layer_computes_what_its_module_does() -> None:
    """With leading axes, a bias and a permutation; compile checks the numbers itself."""
    generator = np.random.default_rng(2)
    permutation = Permutation(generator.permutation(12), generator.permutation(12))
    found = MatrixTrain.from_dense(permutation.apply(random(AXES, 3)), AXES, Ranks(given=4))
    module = torch.nn.Sequential(
        found.to_module(bias=np.ones(12), permutation=permutation),
        torch.nn.ReLU(),
        TensorTrain.from_dense(random(AXES, 4), AXES, Ranks(given=2)).to_module(),
    ).eval()
    x = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(5))
    compiled = tncompile.compile(module, (x,), batch=(1, 8))
    np.testing.assert_allclose(compiled.run(x), module(x).detach().numpy(), rtol=0, atol=1e-4)
