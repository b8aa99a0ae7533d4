"""Every form of a step is written with the Transposes that it was priced with, as ONNX Runtime runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tncompile.cost.devices import default_profile
from tncompile.cost.layouts import halfway
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.schedule import Scheduler
from tncompile.emit.program import network_model
from tncompile.ir import Index, Network, Tensor, Term
from tncompile.ir.tree import left_to_right

BATCH, SIZES = 3, (2, 3, 4)


class Transposes(DeviceProfile):
    """A device on which a Transpose takes a second and nothing else takes any time."""

    def permute_time(self, *args: Any, **options: Any) -> float:
        return 1.0

    def _nothing(self, *args: Any, **options: Any) -> float:
        return 0.0

    matmul_time = conv_time = convolution_time = direct_time = _nothing  # type: ignore[assignment]
    turned_time = multiply_time = reduce_time = copy_time = _nothing  # type: ignore[assignment]


PROFILE = Transposes(**{f.name: getattr(default_profile(), f.name) for f in fields(DeviceProfile)} | {"node": 0.0})


@st.composite
def chains(draw: st.DrawFn, images: bool) -> Network:
    """A batch of tensors that meets core after core; modes of either are summed, kept apart or added, in any order.

    The result has one axis behind the batch, or the two or three of a signal or an image.
    """
    batch = Index("z", "batch")
    fresh = (Index(f"i{k}", draw(st.sampled_from(SIZES))) for k in range(100))
    alive = [next(fresh) for _ in range(draw(st.integers(1, 3)))]
    operand = Tensor("x", ((batch,), *draw(groups(draw(st.permutations(alive)), None))))
    cores: list[Tensor] = []
    for number in range(draw(st.integers(1, 3))):
        summed = draw(st.lists(st.sampled_from(alive), unique=True, max_size=2))
        stays = [i for i in alive if i not in summed]
        both = draw(st.lists(st.sampled_from(stays), unique=True, max_size=1)) if stays else []
        added = [next(fresh) for _ in range(draw(st.integers(0 if summed or both else 1, 2)))]
        modes = draw(st.permutations([*summed, *both, *added]))
        core = np.ones([int(i.size) for i in modes], np.float32)
        cores.append(Tensor(f"c{number}", tuple((i,) for i in modes), core))
        alive = [*stays, *added] or [next(fresh)]
        if alive[0] not in (*stays, *added):  # all was summed: what is left is the batch
            cores.append(Tensor(f"d{number}", ((alive[0],),), np.ones(int(alive[0].size), np.float32)))
    count = draw(st.integers(2, 3)) if images else 1
    axes = draw(groups(draw(st.permutations(alive)), min(count, len(alive))))
    tensors = (operand, *cores)
    term = Term(tensors, left_to_right(range(len(tensors))))
    return Network("layer", (term,), Tensor("y", ((batch,), *axes)), "float32")


@st.composite
def groups(draw: st.DrawFn, modes: Sequence[Index], count: int | None) -> list[tuple[Index, ...]]:
    """Modes as axes, so many or any number of them."""
    count = draw(st.integers(1, len(modes))) if count is None else count
    places = st.lists(st.integers(1, len(modes) - 1), unique=True, min_size=count - 1, max_size=count - 1)
    cuts = [0, *sorted(draw(places)), len(modes)] if len(modes) > 1 else [0, len(modes)]
    return [tuple(modes[a:b]) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("images", [False, True])
def test_every_form_is_written_as_it_was_priced(images: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("forms") / "optimized.onnx"

    @settings(max_examples=40, deadline=None)
    @given(network=chains(images), blocked=st.booleans())
    def check(network: Network, blocked: bool) -> None:
        (term,) = network.terms
        sizes = {n: BATCH if i.size == "batch" else int(i.size) for n, i in term.indices.items()}
        scheduler = Scheduler(term, network.output.axes, sizes, PROFILE, 4, images={"x"} if blocked and images else ())
        for found in scheduler.schedules(term.order, 6):
            model = network_model(replace(network, terms=(replace(term, steps=found.steps),)), shown=False)
            fused = sum(step.form == "fused" for step in found.steps)
            left = as_it_runs(model, path).count("Transpose")
            assert found.seconds - fused - 0.01 <= left <= found.seconds + 0.01, found.steps

    check()


def as_it_runs(model: onnx_ir.Model, path: Path) -> list[str]:
    """The operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    data = onnx_ir.to_proto(model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


@settings(max_examples=100, deadline=None)
@given(
    order=st.permutations("abcde"),
    sizes=st.lists(st.sampled_from([1, 2, 4, 16]), min_size=5, max_size=5),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_halfway_only_neighbours_have_changed_places(order: list[str], sizes: list[int], itemsize: int) -> None:
    layout, wanted = tuple("abcde"), tuple(order)
    middle = halfway(layout, wanted, dict(zip(layout, sizes, strict=True)), itemsize)
    if middle is not None:
        assert not exchanged(layout, wanted)
        assert exchanged(layout, middle) and exchanged(middle, wanted)


def exchanged(layout: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether two neighbouring groups have changed places, and nothing else."""
    cuts = combinations(range(len(layout) + 1), 3)
    return any((*layout[:i], *layout[j:k], *layout[i:j], *layout[k:]) == wanted for i, j, k in cuts)


@pytest.mark.parametrize(
    ("axes", "wanted", "transposes"),
    [
        ((16, 12, 16), (2, 1, 0), 2),
        ((16, 12, 16, 2), (2, 1, 0, 3), 2),
        ((16, 12, 16, 4), (2, 1, 0, 3), 1),  # wide blocks
        ((4, 3, 4), (2, 1, 0), 1),  # few numbers
        ((16, 12, 16), (2, 0, 1), 1),  # one axis moves
    ],
)
def test_a_permute_in_two_steps_stays_two(
    axes: tuple[int, ...], wanted: tuple[int, ...], transposes: int, tmp_path: Path
) -> None:
    """ONNX Runtime does not make one of them again, and the numbers are in their places."""
    modes = [Index(f"i{k}", size) for k, size in enumerate(axes)]
    x = Tensor("x", tuple((mode,) for mode in modes))
    y = Tensor("y", tuple((modes[k],) for k in wanted))
    network = Network("layer", (Term((x,), 0, steps=()),), y, "float32")
    model = network_model(network, shown=False)
    assert as_it_runs(model, tmp_path / "optimized.onnx").count("Transpose") == transposes
    given = np.arange(np.prod(axes), dtype=np.float32).reshape(axes)
    session = ort.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": given})[0], given.transpose(wanted))
