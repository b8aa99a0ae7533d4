"""The float64 evaluation of networks against numpy.einsum on all tensors at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from hypothesis import given, settings

from tests.strategies import SYMBOLS, feeds, networks
from tncompile.ir import Array, Index, Network, Tensor, Term, Value, dims, evaluate
from tncompile.ir.evaluate import contract
from tncompile.ir.tree import flatten


def reference(network: Network, operands: Mapping[str, Array]) -> Array:
    """Every term as one call of einsum, in the letters of einsum's list form."""
    number = {name: k for k, name in enumerate(network.indices)}
    size = {i.name: dims.evaluate(i.size, SYMBOLS) for i in network.indices.values()}
    total = np.zeros([size[i.name] for i in network.output.indices])
    for term in network.terms:
        args: list[object] = []
        for tensor in term.tensors:
            data = operands[tensor.name] if tensor.data is None else tensor.data
            args += [np.float64(data).reshape([size[i.name] for i in tensor.indices])]
            args += [[number[i.name] for i in tensor.indices]]
        # an output index that the term lacks comes in with ones
        for index in network.output.indices:
            if index.name not in term.indices:
                args += [np.ones(size[index.name]), [number[index.name]]]
        total = total + np.einsum(*args, [number[i.name] for i in network.output.indices], optimize="greedy")  # type: ignore[call-overload]
    return total.reshape([math.prod(size[i.name] for i in axis) for axis in network.output.axes])


@settings(max_examples=150, deadline=None)
@given(networks())
def test_evaluate_agrees_with_einsum(drawn: tuple[tuple[Value, ...], Network]) -> None:
    values, network = drawn
    operands = feeds(values)
    expected = reference(network, operands)
    found = evaluate(network, operands, SYMBOLS)
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found, expected, rtol=1e-9, atol=1e-9 * max(1e-30, float(np.abs(expected).max(initial=0)))
    )


def test_symbols_are_read_off_the_operands() -> None:
    batch, i = Index("b", "batch"), Index("i", 2)
    network = Network("y", (Term((Tensor("x", ((batch,), (i,))),)),), Tensor("y", ((batch, i),)), "float32")
    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(evaluate(network, {"x": x}), x.reshape(6))


def test_more_indices_than_one_einsum_takes() -> None:
    chain = [(np.eye(2), (f"i{k}", f"i{k + 1}")) for k in range(80)]
    tree: object = 0
    for k in range(1, 80):
        tree = (tree, k)
    assert flatten(tree) == tuple(range(80))  # type: ignore[arg-type]
    result, names = contract(chain, tree, {"i0", "i80"})  # type: ignore[arg-type]
    assert names == ("i0", "i80")
    np.testing.assert_array_equal(result, np.eye(2))
