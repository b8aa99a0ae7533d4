"""Each way to compute with a weight against float64, within bounds that follow from what it rounds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from tests.quantizing import LIMIT, model_of, node, numbers, operators, run, step
from tncompile.ir import Array
from tncompile.runtime.quantize import BITS, STORED, quantizable, quantize, simulated, stored_bytes, whole

LINEAR = [bits for bits in BITS if bits != "fp32"]


def linear(k: int, n: int, kind: str, rank: int, weight: Array, bias: Array) -> bytes:
    """``x @ W``, with or without a bias, as the emitter writes it or as others do."""
    batch = [*"bs"][: rank - 1]
    if kind == "Gemm":
        nodes, weights = [node("Gemm", "x W c", "y", "n")], {"W": weight, "c": bias}
    elif kind == "Gemm transposed":
        nodes, weights = [node("Gemm", "x W c", "y", "n", transB=1)], {"W": weight.T, "c": bias}
    elif kind == "MatMul folded":
        nodes = [node("Transpose", "W", "T", perm=[1, 0]), node("MatMul", "x T", "y", "n")]
        weights = {"W": weight.T}
    elif kind == "MatMul and Add":
        nodes, weights = [node("MatMul", "x W", "t", "n"), node("Add", "t c", "y", "n")], {"W": weight, "c": bias}
    else:
        nodes, weights = [node("MatMul", "x W", "y", "n")], {"W": weight}
    return model_of(nodes, weights, [*batch, k], [*batch, n])


def activation_error(x: Array, weight: Array, bits: str) -> Array:
    """What rounding activations adds at most to each number of ``x @ weight``."""
    if bits in ("int8", "int8-static"):
        return step(x) * np.broadcast_to(np.abs(weight).sum(0), (*x.shape[:-1], weight.shape[1]))
    if bits == "int4":  # blocks of activations have scales of their own
        largest = np.abs(x).max(-1, keepdims=True) / 127
        return np.asarray(largest * np.abs(weight).sum(0))
    return np.zeros((*x.shape[:-1], weight.shape[1]))


@pytest.mark.parametrize("bits", LINEAR)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_linear(bits: str, data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 90), label=name) for name in "mkn")
    kind = data.draw(st.sampled_from(["Gemm", "Gemm transposed", "MatMul", "MatMul folded", "MatMul and Add"]))
    rank = 2 if kind.startswith("Gemm") else data.draw(st.integers(2, 3))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    weight, bias, x = numbers(k, n) * np.float32(scale), numbers(n, seed=1), numbers(*(1, m, k)[3 - rank :], seed=2)
    model = linear(k, n, kind, rank, weight, bias)
    can = quantizable(model)
    if weight.size < 256:
        assert not can
        return
    (ways,) = can.values()
    missing = {bits for bits, least in (("int8-weights", 512), ("int4-weights", 2048)) if weight.size < least}
    missing |= {"int8-static"} if kind == "MatMul and Add" and rank == 2 else set()
    assert {*can} == {"n"} and {*ways} == {*BITS} - missing
    if bits not in ways:
        return
    small = quantize(model, {"n": bits}, [{"x": x}])
    rounded = simulated(weight, bits).astype(np.float64)
    added = 0.0 if kind in ("MatMul", "MatMul folded") else bias.astype(np.float64)
    want = x.astype(np.float64) @ rounded + added
    magnitude = np.abs(x).astype(np.float64) @ np.abs(rounded) + np.abs(added)
    # a bias in int32 counts in steps of both scales, and int8 scales are float32
    bound = activation_error(x, rounded, bits) * 1.01 + 4 * (k + 8) * LIMIT * magnitude + step(x) * scale * 0.05
    assert (np.abs(run(small, x=x) - want) <= bound).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_convolution(rank: int, data: st.DataObject) -> None:
    """Weights, the input and the output are rounded; the output's range is that of the sample."""
    channels, filters, size = (data.draw(st.integers(*limits)) for limits in ((2, 9), (4, 40), (1, 3)))
    sizes = [data.draw(st.integers(size, 7)) for _ in range(rank)]
    weight = numbers(filters, channels, *[size] * rank)
    if weight.size < 256:
        filters = -(-256 // (weight.size // filters))
        weight = numbers(filters, channels, *[size] * rank)
    bias, x = numbers(filters, seed=1), numbers(3, channels, *sizes, seed=2)
    letters = [f"s{i}" for i in range(rank)]
    conv = node("Conv", "x W c", "y", "n", kernel_shape=[size] * rank)
    model = model_of([conv], {"W": weight, "c": bias}, ["b", channels, *sizes], ["b", filters, *letters])
    least = {"fp32": 0, "fp16": 256, "int8-weights": 512, "int8-static": 256, "int4-weights": 2048}
    ways = tuple(bits for bits in least if weight.size >= least[bits])
    assert quantizable(model) == {"n": ways}

    def exact(x: Array, weight: Array) -> Array:
        axes = tuple(range(2, 2 + rank))
        windows = sliding_window_view(x.astype(np.float64), weight.shape[2:], axis=axes)
        inner = tuple(range(2 + rank, 2 + 2 * rank))
        return np.moveaxis(np.tensordot(windows, weight.astype(np.float64), ((1, *inner), (1, *axes))), -1, 1)

    shift = bias.reshape(-1, *[1] * rank)
    for bits in ways[1:]:
        rounded = simulated(weight, bits, 0)
        found, want = run(quantize(model, {"n": bits}, [{"x": x}]), x=x), exact(x, rounded) + shift
        bound = 1e-5 * (1 + exact(np.abs(x), np.abs(rounded)))
        if bits == "int8-static":
            bound += step(x) * np.abs(rounded).reshape(filters, -1).sum(1).reshape(shift.shape) * 1.01
            bound += 2 * step(exact(x, weight) + shift)
        assert (np.abs(found - want) <= bound).all(), bits


def test_convolutions_stay_in_eight_bits_between() -> None:
    """What has no weights between two convolutions is computed in eight bits too, and nothing is named anew."""
    weights = {"W": numbers(8, 8, 3, 3) * 0.1, "V": numbers(8, 8, 3, 3, seed=1) * 0.1, "c": numbers(8, seed=2)}
    attributes = {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        node("Conv", "x W c", "a", "first", **attributes),
        node("Relu", "a", "r"),
        node("Conv", "r V c", "b", "second", **attributes),
        node("Add", "b r", "y"),
    ]
    model = model_of(nodes, weights, ["b", 8, 12, 12], ["b", 8, 12, 12])
    x = numbers(2, 8, 12, 12)
    small = quantize(model, dict.fromkeys(("first", "second"), "int8-static"), [{"x": x}])
    assert operators(small).count("Add") == 1 and "Relu" not in operators(small)  # a range from 0 on is a Relu
    want = run(model, x=x)
    assert np.linalg.norm(run(small, x=x) - want) < 0.03 * np.linalg.norm(want)
    one = quantize(model, {"second": "int8-static"}, [{"x": x}])
    assert "Relu" in operators(one)
    kept = {p.value for n in onnx.load_model_from_string(one).graph.node for p in n.metadata_props}
    assert {"first", "second", "layer of first", "layer of second"} <= kept


@pytest.mark.parametrize("bits", ["fp16", "int8", "int8-weights", "int4-weights"])
def test_a_stack_of_matrices(bits: str) -> None:
    weight, x = numbers(3, 40, 24), numbers(3, 5, 40, seed=1)
    model = model_of([node("MatMul", "x W", "y", "n")], {"W": weight}, [3, "b", 40], [3, "b", 24])
    assert quantizable(model) == {"n": ("fp32", "fp16", "int8-weights", "int8", "int4-weights")}
    rounded = np.stack([simulated(matrix, bits) for matrix in weight]).astype(np.float64)
    found = run(quantize(model, {"n": bits}), x=x)
    bound = 1e-5 * (np.abs(x) @ np.abs(rounded)) + (bits == "int8") * 1.01 * step(x) * np.abs(rounded).sum(1)[:, None]
    assert (np.abs(found - x.astype(np.float64) @ rounded) <= bound).all()


@pytest.mark.parametrize("width", [32, 40, 96])
def test_table(width: int) -> None:
    """Rows that are read are the rounded table's; in four bits where ONNX Runtime has blocks of its width."""
    table, rows = numbers(100, width), np.arange(24).reshape(2, 12) * 2
    nodes = [node("Gather", "T x", "y")]
    model = model_of(nodes, {"T": table}, ["b", "s"], ["b", "s", width], onnx.TensorProto.INT64)
    ways = {"fp32", "fp16", "int8", "int8-weights", "int4-weights"} | ({"int4"} if width % 32 == 0 else set())
    assert {key: {*can} for key, can in quantizable(model).items()} == {"y": ways}
    for bits in ways:
        found = run(quantize(model, {"y": bits}), x=rows)
        np.testing.assert_allclose(found, simulated(table, bits, 0)[rows], rtol=1e-6, atol=1e-7, err_msg=bits)


@pytest.mark.parametrize("bits", ["fp16", "int8", "int8-weights", "int4-weights"])
def test_lstm(bits: str) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(24, 20, bidirectional=True).double()
    order = [0, 3, 1, 2]  # torch has the gates as i f g o, ONNX as i o f g

    def gates(name: str) -> Array:
        both = [np.split(getattr(lstm, f"{name}_l0{way}").detach().numpy(), 4) for way in ("", "_reverse")]
        return np.stack([np.concatenate([parts[i] for i in order]) for parts in both])

    weights = {"W": gates("weight_ih"), "R": gates("weight_hh")}
    weights["B"] = np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)
    nodes = [node("LSTM", "x W R B", "y", hidden_size=20, direction="bidirectional")]
    model = model_of(nodes, weights, ["s", "b", 24], ["s", 2, "b", 20])
    assert bits in quantizable(model)["y"]
    x = numbers(7, 3, 24)
    want = lstm(torch.from_numpy(x).double())[0].detach().numpy().reshape(7, 3, 2, 20).transpose(0, 2, 1, 3)
    small = quantize(model, {"y": bits})
    assert ("DynamicQuantizeLSTM" in operators(small)) == (bits == "int8")
    error = np.linalg.norm(run(small, x=x) - want) / np.linalg.norm(want)
    assert error < {"fp16": 1e-3, "int8": 0.02, "int8-weights": 0.01, "int4-weights": 0.1}[bits]
    if bits != "int4-weights":
        assert error > 1e-6


# --- rounding --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 2), st.sampled_from(BITS))
def test_rounding(shape: list[int], axis: int, bits: str) -> None:
    """No number moves further than half a step of its channel, or of its block."""
    axis %= len(shape)
    weight = numbers(*shape)
    moved = np.moveaxis(weight, axis, 0).reshape(shape[axis], -1).astype(np.float64)
    found = np.moveaxis(simulated(weight, bits, axis), axis, 0).reshape(moved.shape)
    if bits == "fp32":
        bound = np.zeros_like(moved)
    elif bits == "fp16":
        bound = np.abs(moved) * 2.0**-11 + 2.0**-25
    elif bits.startswith("int8"):
        bound = np.abs(moved).max(1, keepdims=True) / 254 * np.ones_like(moved)
    else:  # 16 steps; the zero point is rounded as well
        blocks = [moved[:, i : i + 32] for i in range(0, moved.shape[1], 32)]
        steps = [(np.maximum(b.max(1), 0) - np.minimum(b.min(1), 0)) / 15 for b in blocks]
        bound = np.concatenate([np.outer(s, np.ones(b.shape[1])) for s, b in zip(steps, blocks, strict=True)], axis=1)
    assert (np.abs(found - moved) <= bound * (1 + 1e-5) + 1e-12).all()
    assert found.dtype == np.float32


@pytest.mark.parametrize("bits", LINEAR)
@pytest.mark.parametrize("shape", [(96, 64), (70, 90)])
def test_stored_bytes_are_what_the_file_has(bits: str, shape: tuple[int, int]) -> None:
    model = model_of([node("MatMul", "x W", "y", "n")], {"W": numbers(*shape)}, ["b", shape[0]], ["b", shape[1]])
    small = onnx.load_model_from_string(quantize(model, {"n": bits}, [{"x": numbers(3, shape[0])}]))
    held = sum(onnx.numpy_helper.to_array(t).nbytes for t in small.graph.initializer)
    held -= 2048 if bits == "int4-weights" else 0  # the two halves of every byte, once a file
    assert 0 <= held - stored_bytes(shape, bits) <= 80  # constants of the nodes: shapes, a scale of the input


def test_a_weight_that_has_no_range() -> None:
    """All zeros stay so; what float16 cannot hold stays float32."""
    for bits in BITS:
        assert not simulated(np.zeros((40, 3), np.float32), bits).any()
    weight = numbers(20, 20)
    weight[0, 0] = 1e6
    model = model_of([node("MatMul", "x W", "y", "n")], {"W": weight}, ["b", 20], ["b", 20])
    x = numbers(2, 20)
    np.testing.assert_array_equal(run(quantize(model, {"n": "fp16"}), x=x), run(model, x=x))


def test_whole() -> None:
    """All that can be in one way; convolutions are not computed with activations quantized as they come."""
    weights = {"W": numbers(8, 8, 3, 3), "V": numbers(8, 300), "s": np.array([0, 8])}
    nodes = [
        node("Conv", "x W", "a", "conv", kernel_shape=[3, 3]),
        node("GlobalAveragePool", "a", "p"),
        node("Reshape", "p s", "f"),
        node("MatMul", "f V", "y", "head"),
    ]
    model = model_of(nodes, weights, ["b", 8, 6, 6], ["b", 300])
    x = numbers(2, 8, 6, 6)
    assert whole(model, "fp32") == model
    assert "Conv" in operators(whole(model, "int8")) and "MatMulInteger" in operators(whole(model, "int8"))
    kinds = operators(whole(model, "int8-static", [{"x": x}]))
    assert "QuantizeLinear" in kinds and "MatMulInteger" not in kinds
    assert "MatMulNBits" in operators(whole(model, "int4"))
    sizes = {bits: len(whole(model, bits, [{"x": x}])) for bits in BITS}
    assert all(sizes[bits] < sizes["fp32"] for bits in BITS[1:])
    want = run(model, x=x)
    for bits in STORED:
        assert np.linalg.norm(run(whole(model, bits), x=x) - want) < 0.2 * np.linalg.norm(want)
