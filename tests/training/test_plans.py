"""Planned networks against one einsum a term in float64, forward and backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests import strategies
from tests.helpers import program_of
from tncompile.cost.devices import default_profile
from tncompile.cost.slices import Cut, best_cut, cut_of, moved, peak_of, seconds_of
from tncompile.cost.training import Arrangement, TrainingCost, cheapest_trees, is_recomputed
from tncompile.emit.module.contraction import Contraction
from tncompile.emit.module.plan import plan_of, sizes_of
from tncompile.emit.module.steps import Sliced
from tncompile.ir import Index, Network, Switch, dims
from tncompile.passes import Context
from tncompile.passes.training import TrainingOrder

PROFILE = default_profile()


def expected(network: Network, tensors: Sequence[torch.Tensor], symbols: Mapping[str, int]) -> torch.Tensor:
    """One einsum for each term, by torch."""

    def size(index: Index) -> int:
        return dims.evaluate(index.size, symbols)

    total = torch.zeros([size(i) for i in network.output.indices], dtype=torch.float64)
    rest = iter(tensors)
    for term in network.terms:
        number = {name: k for k, name in enumerate(term.indices)}
        args: list[object] = []
        for tensor in term.tensors:
            args += [next(rest).reshape([size(i) for i in tensor.indices]), [number[i.name] for i in tensor.indices]]
        carried = [i for i in network.output.indices if i.name in number]
        value = torch.einsum(*args, [number[i.name] for i in carried])
        total = total + value.reshape([size(i) if i.name in number else 1 for i in network.output.indices])
    return total.reshape([math.prod(size(i) for i in axis) for axis in network.output.axes])


def contraction(network: Network, symbols: Mapping[str, int], share: float) -> tuple[Contraction, list[int]]:
    """The module of a network, and the sizes that it is to be given."""
    sizes = {name: dims.evaluate(i.size, symbols) for name, i in network.indices.items()}
    found = sizes_of(network)
    names = {t.name for t in network.tensors}
    plan = plan_of(network, sizes, names, PROFILE, share)
    return Contraction("", found, [plan], []), [dims.evaluate(i.size, symbols) for i in found.given]


def drawn_cut(data: st.DataObject, cost: TrainingCost, arranged: Arrangement) -> Cut | None:
    """Slices of any index, in any number."""
    names = sorted({name for layout in cost.layouts for name in layout})
    if not arranged.pairs or not names:
        return None
    index, count = data.draw(st.sampled_from(names)), data.draw(st.sampled_from([1, 2, 3, 7]))
    return cut_of(arranged.pairs, cost.layouts, index, count, data.draw(st.booleans()))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_values_and_gradients_of_random_networks(data: st.DataObject) -> None:
    _, network = data.draw(strategies.networks("float64", max_tensors=6))
    symbols = strategies.SYMBOLS
    terms = tuple(replace(t, order=strategies.order_of(data.draw, len(t.tensors))) for t in network.terms)
    network = replace(network, terms=terms)
    generator = torch.Generator().manual_seed(0)
    needs = [data.draw(st.booleans()) for _ in network.tensors]
    tensors = []
    for tensor, need in zip(network.tensors, needs, strict=True):
        shape = [dims.evaluate(d, symbols) for d in tensor.shape]
        tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(need))
    share = data.draw(st.sampled_from([0.0, 0.05, math.inf]))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(
                "tncompile.emit.module.plan.best_cut", lambda cost, arranged, _: drawn_cut(data, cost, arranged)
            )
        module, given_sizes = contraction(network, symbols, share)
    found, wanted = module(tensors, given_sizes), expected(network, tensors, symbols)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    trained = [t for t in tensors if t.requires_grad]
    if not trained or not wanted.requires_grad:
        return
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(found, trained, weights)
    theirs = torch.autograd.grad(wanted, trained, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


CHAIN = """
program
  input x: float64[batch, 6]
  input a: float64[2, 2, 2]
  input b: float64[2, 3, 2, 2]
  input c: float64[4]
  network y: float64[batch, 4]
    indices batch=batch, i1=2, i2=3, r=2, o1=2, o2=2, s=2
    term
      0 operand x[batch, (i1 i2)]
      1 operand a[i1, o1, r]
      2 operand b[r, i2, o2, s]
      order ((0 1) 2)
    term
      0 operand c[(o1 o2)]
    -> y[batch, (o1 o2)]
  output y = y
"""


SHAPES = ((3, 6), (2, 2, 2), (2, 3, 2, 2), (4,))


@pytest.mark.parametrize("share", [0.0, math.inf])
def test_gradcheck(share: float) -> None:
    (network,) = program_of(CHAIN).networks
    module, _ = contraction(network, {"batch": 3}, share)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    assert torch.autograd.gradcheck(lambda *given: module(given, []), tensors)


def test_second_derivatives() -> None:
    (network,) = program_of(CHAIN).networks
    module, _ = contraction(network, {"batch": 3}, 0.0)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    assert torch.autograd.gradgradcheck(lambda *given: module(given, []), tensors)


def sliced(monkeypatch: pytest.MonkeyPatch, index: str, count: int, keeps: bool) -> None:
    """Let every plan have slices of an index."""

    def cut(cost: TrainingCost, arranged: Arrangement, _: float) -> Cut | None:
        return cut_of(arranged.pairs, cost.layouts, index, count, keeps) if arranged.pairs else None

    monkeypatch.setattr("tncompile.emit.module.plan.best_cut", cut)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("index", ["batch", "i1", "i2", "r", "o1", "o2"])
def test_derivatives_of_slices(monkeypatch: pytest.MonkeyPatch, index: str, keeps: bool) -> None:
    """First and second ones, forward ones, and of single examples by torch.func."""
    sliced(monkeypatch, index, 2, keeps)
    (network,) = program_of(CHAIN).networks
    module, _ = contraction(network, {"batch": 3}, 0.0)
    assert any(isinstance(step, Sliced) for step in module.plans[0].terms[0].steps)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    assert torch.autograd.gradcheck(lambda *given: module(given, []), tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *given: module(given, []), tensors)

    def loss(core: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return module([x[None], core, *tensors[2:]], []).pow(2).sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(tensors[1], tensors[0])
    (whole,) = torch.autograd.grad(module(tensors, []).pow(2).sum(), tensors[1])
    torch.testing.assert_close(single.sum(0), whole)


TWICE = """
program
  input x: float64[batch, 3]
  input w: float64[3, 3]
  network y: float64[batch, 3]
    indices batch=batch, i=3, j=3, k=3
    term
      0 operand x[batch, i]
      1 operand w[i, j]
      2 operand w[j, k]
      order ((0 1) 2)
    -> y[batch, k]
  output y = y
"""


@pytest.mark.parametrize("keeps", [False, True])
def test_slices_of_a_tensor_that_is_there_twice(monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    """Its gradients add up once, also where they are to be differentiated."""
    sliced(monkeypatch, "j", 2, keeps)
    (network,) = program_of(TWICE).networks
    module, _ = contraction(network, {"batch": 2}, 0.01)
    x, w = (torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True))
    (expected,) = torch.autograd.grad((x @ w @ w).pow(2).sum(), w)
    for create_graph in (False, True):
        result = module([x, w, w], []).pow(2).sum()
        (found,) = torch.autograd.grad(result, w, create_graph=create_graph)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keeps", [False, True])
def test_slices_of_nothing_under_autocast_and_inside_a_checkpoint(monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    sliced(monkeypatch, "o", 4, keeps)
    (network,) = program_of(DENSE).networks
    module, _ = contraction(network, {"batch": 4}, 0.01)
    weights = [torch.randn(s, requires_grad=True) for s in ((512, 64), (64, 512))]
    nothing = torch.autograd.grad(module([torch.randn(0, 512), *weights], []).sum(), weights)
    assert all(not gradient.any() for gradient in nothing)
    x = torch.randn(4, 512)
    expected = torch.autograd.grad(module([x, *weights], []).sum(), weights)
    again = checkpoint(lambda *given: module(given, []), x, *weights, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), weights), expected)
    result = module([x, *weights], []).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(result, weights)
    torch.testing.assert_close(found, expected)


DENSE = """
program
  input x: float32[batch, 512]
  input a: float32[512, 64]
  input b: float32[64, 512]
  network y: float32[batch, 512]
    indices batch=batch, i=512, r=64, o=512
    term
      0 operand x[batch, i]
      1 operand a[i, r]
      2 operand b[r, o]
      order (0 (1 2))
    -> y[batch, o]
  output y = y
"""


def allocated(module: Contraction, tensors: Sequence[torch.Tensor]) -> int:
    """The most bytes that PyTorch allocates at once, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = module(tensors, [])  # which the caller holds
        result.sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_slices_lower_the_peak_as_predicted() -> None:
    """A merged weight of 1 MB and its gradient, never there as a whole."""
    (network,) = program_of(DENSE).networks
    sizes = {"batch": 16, "i": 512, "r": 64, "o": 512}
    cost = TrainingCost([("batch", "i"), ("i", "r"), ("r", "o")], ("batch", "o"), sizes, [True] * 3, PROFILE)
    arranged = cost.arrange(network.terms[0].order)
    cut = best_cut(cost, arranged, math.inf)
    assert cut is not None and cut.index in "io"
    pairs = moved(arranged.pairs, 3, cut)
    peaks = []
    for share, predicted in ((0.0, peak_of(cost, arranged.pairs)), (math.inf, peak_of(cost, pairs, cut))):
        tensors = [torch.randn(s, requires_grad=True) for s in ((16, 512), (512, 64), (64, 512))]
        module, _ = contraction(network, {"batch": 16}, share)
        peaks.append(allocated(module, tensors))
        assert predicted == pytest.approx(peaks[-1], rel=0.25)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("index", ["batch", "i", "o"])
def test_the_peak_of_slices_is_as_predicted(monkeypatch: pytest.MonkeyPatch, index: str, keeps: bool) -> None:
    (network,) = program_of(DENSE).networks
    found: list[tuple[int, float]] = []

    def cut(cost: TrainingCost, arranged: Arrangement, _: float) -> Cut:
        chosen = cut_of(arranged.pairs, cost.layouts, index, 4, keeps)
        pairs = moved(arranged.pairs, len(cost.layouts), chosen)
        found.append((peak_of(cost, pairs, chosen), seconds_of(cost, pairs, chosen) / arranged.seconds))
        return chosen

    monkeypatch.setattr("tncompile.emit.module.plan.best_cut", cut)
    module, _ = contraction(network, {"batch": 256}, 0.01)
    tensors = [torch.randn(s, requires_grad=True) for s in ((256, 512), (512, 64), (64, 512))]
    ((predicted, ratio),) = found
    assert predicted == pytest.approx(allocated(module, tensors), rel=0.3)
    assert ratio > 1  # a slice takes time, and saves none


def test_memory_decides_between_trees_of_one_time() -> None:
    """Whatever the order is in which the model has it."""
    sizes = {"batch": 32, "i1": 8, "i2": 16, "r": 4, "o1": 8, "o2": 8}
    chosen = set()
    for order in ("((0 1) 2)", "((0 2) 1)", "(0 (1 2))"):
        program = program_of(f"""
program
  input x: float32[32, 8, 16]
  input a: float32[8, 8, 4]
  input b: float32[4, 16, 8]
  network y: float32[32, 8, 8]
    indices batch=32, i1=8, i2=16, r=4, o1=8, o2=8
    term
      0 operand x[batch, i1, i2]
      1 operand a[i1, o1, r]
      2 operand b[r, i2, o2]
      order {order}
    -> y[batch, o1, o2]
  output y = y
""")
        ordered, _ = TrainingOrder(frozenset("xab")).run(program, Context(batches=(32,)))
        chosen.add(ordered.networks[0].terms[0].order)
    assert len(chosen) == 1
    cost = TrainingCost(
        [("batch", "i1", "i2"), ("i1", "o1", "r"), ("r", "i2", "o2")], ("batch", "o1", "o2"), sizes, [True] * 3, PROFILE
    )
    assert chosen <= {*cheapest_trees(cost)}


def test_slices_take_no_longer_than_allowed() -> None:
    """None where all is kept; within 10% for the share of ``memory="auto"``."""
    sizes = {"batch": 256, "i": 2048, "r": 16, "o": 2048}
    cost = TrainingCost([("batch", "i"), ("i", "r"), ("r", "o")], ("batch", "o"), sizes, [True] * 3, PROFILE)
    arranged = cost.arrange((0, (1, 2)))
    assert best_cut(cost, arranged, 0.0) is None
    cut = best_cut(cost, arranged, 0.01)
    assert cut is not None
    pairs = moved(arranged.pairs, 3, cut)
    assert seconds_of(cost, pairs, cut) <= 1.1 * arranged.seconds
    assert peak_of(cost, pairs, cut) < 0.7 * peak_of(cost, arranged.pairs)


def kept_bytes(module: Contraction, tensors: Sequence[torch.Tensor]) -> int:
    """What is kept for the backward pass, beside the tensors themselves."""
    given = {t.untyped_storage().data_ptr() for t in tensors}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(tensors, [])
    return sum(found.values())


def test_slices_keep_what_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged weight, for the gradients, as often as they are asked for; not without them."""
    (network,) = program_of(DENSE).networks
    gradients, kept = [], []
    for keeps in (False, True):
        sliced(monkeypatch, "o", 4, keeps)
        module, _ = contraction(network, {"batch": 16}, 0.01)
        generator = torch.Generator().manual_seed(0)
        shapes = ((16, 512), (512, 64), (64, 512))
        tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        kept.append(kept_bytes(module, tensors))
        result = module(tensors, []).sum()
        first = torch.autograd.grad(result, tensors, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(result, tensors), first, rtol=0, atol=0)
        gradients.append(first)
        with torch.no_grad():
            assert kept_bytes(module, tensors) == 0
    assert kept == [0, 512 * 512 * 4]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_copies_of_long_runs_are_cheap() -> None:
    sizes = {"a": 64, "b": 64, "c": 64}
    cost = TrainingCost([("a", "b", "c")], (), sizes, [True], PROFILE)
    assert cost.copy(("a", "b", "c"), ("b", "a", "c")) < 0.5 * cost.copy(("a", "b", "c"), ("c", "b", "a"))


def test_low_memory_keeps_no_intermediates() -> None:
    (network,) = program_of(CHAIN).networks
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    high, low = (kept_bytes(contraction(network, {"batch": 3}, share)[0], tensors) for share in (0.0, math.inf))
    assert low == 96 < high  # b, summed over s before anything else


def test_the_order_follows_the_batch() -> None:
    """Rows of a low-rank layer one by one; many rows through the full-rank one, merged first."""
    text = """
program
  input x: float32[batch, 512]
  input a: float32[512, 400]
  input b: float32[400, 512]
  network y: float32[batch, 512]
    indices batch=batch, i=512, r=400, o=512
    term
      0 operand x[batch, i]
      1 operand a[i, r]
      2 operand b[r, o]
    -> y[batch, o]
  output y = y
"""
    program = program_of(text)
    ordered, changes = TrainingOrder(frozenset("ab")).run(program, Context(batches=(4, 65536)))
    (node,) = ordered.nodes
    assert isinstance(node, Switch)
    assert [case.terms[0].order for case in node.cases] == [((0, 1), 2), (0, (1, 2))]
    assert 4 <= node.limits[0] < 65536
    assert "order ((x a) b) or (x (a b))" in changes[0].what


def test_the_search_prices_gradients() -> None:
    """Where one side needs none, only the other's product is paid for."""
    sizes = {"b": 64, "i": 256, "r": 8, "o": 256}
    layouts = [("b", "i"), ("i", "r"), ("r", "o")]
    seconds = []
    for needs in ([False] * 3, [False, True, True], [True] * 3):
        cost = TrainingCost(layouts, ("b", "o"), sizes, needs, PROFILE)
        tree, *_ = cheapest_trees(cost)
        assert tree in (((0, 1), 2), (2, (0, 1)))
        arranged = cost.arrange(((0, 1), 2))
        seconds.append(arranged.seconds)
        assert is_recomputed(cost, arranged, math.inf)
        assert not is_recomputed(cost, arranged, 0.0)
    assert seconds[0] < seconds[1] < seconds[2]
