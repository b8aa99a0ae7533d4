"""Plans on disk: what comes back is what was written, and what is for something else or damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from tncompile.decomp import (
    CP,
    SVD,
    BlockTrain,
    Factorized,
    Hierarchical,
    Kronecker,
    MatrixTrain,
    Ranks,
    Ring,
    Split,
    TensorTrain,
    Tucker,
)
from tncompile.errors import TNCompileError
from tncompile.tensorizer.saved import fingerprint, load_plan, save_plan
from tncompile.tensorizer.search import Option, Plan
from tncompile.tensorizer.sites import Part, Replacement, Site

AXES = ((4, 6), (6, 4))
FORMATS = (BlockTrain, CP, Hierarchical, Kronecker, MatrixTrain, Ring, Split, TensorTrain, Tucker)


def site(name: str, seed: int = 0) -> Site:
    array = np.random.default_rng(seed).standard_normal((24, 24)).astype(np.float32)
    return Site((Part(name, array, (0,), (1,)),))


def factorized(kind: type[Any]) -> Factorized:
    """A matrix of 24 x 24 in a format."""
    matrix = site("w").matrix
    ranks = Ranks(given=2, larger=True) if kind in (CP, Ring, Kronecker) else Ranks(error=0.5, larger=True)
    made: Factorized = kind.from_dense(matrix, AXES, ranks)
    return made


@cache
def plan() -> Plan:
    """A weight in every format, one that is dense, and two that share a factor."""
    made = [factorized(kind) for kind in FORMATS]
    made.append(Tucker.from_dense(site("w").matrix, AXES, Ranks(larger=True), factored=(0, 2)))
    made.append(SVD.from_dense(site("w").matrix, None, Ranks(given=5)))
    options = []
    for number, one in enumerate(made):
        where = site(f"w{number}")
        options.append(Option(where, Replacement(where, one), "int8", 0.1 / 3 + number, 1e-6 / 3, 1000 + number))
    options.append(Option(site("dense"), None, "fp16", 0.0, 2e-6, 1152))
    joint = Site((*site("q").parts, *site("k", 1).parts))
    shared = Replacement(joint, SVD.from_dense(joint.matrix, None, Ranks(given=3)))
    return Plan((*options, Option(joint, shared, "fp32", 0.2, 3e-6, 800)))


def sites() -> list[Site]:
    return [option.site for option in plan().options]


def test_every_format_comes_back(tmp_path: Path) -> None:
    kinds = {type(o.replacement.factorized) for o in plan().options if o.replacement is not None}
    assert kinds == {SVD, *FORMATS}
    save_plan(tmp_path / "a.plan", plan(), "mark")
    found = load_plan(tmp_path / "a.plan", sites(), "mark")
    assert found is not None and len(found.options) == len(plan().options)
    for one, two in zip(found.options, plan().options, strict=True):
        assert (one.bits, one.error, one.seconds, one.size) == (two.bits, two.error, two.seconds, two.size)
        assert one.site is two.site and one.label == two.label
        assert (one.replacement is None) == (two.replacement is None)
        if one.replacement is not None and two.replacement is not None:
            mine, theirs = one.replacement.factorized, two.replacement.factorized
            assert type(mine) is type(theirs) and mine.labels == theirs.labels
            assert (mine.axes, mine.bound, mine.notes) == (theirs.axes, theirs.bound, theirs.notes)
            for core, same in zip(mine.cores, theirs.cores, strict=True):
                np.testing.assert_array_equal(core, same)
    save_plan(tmp_path / "b.plan", found, "mark")
    assert load_plan(tmp_path / "b.plan", sites(), "mark") is not None


def test_more_than_ten_cores_keep_their_order(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    where = Site((Part("w", array, (0,), (1,)),))
    made = TensorTrain.from_dense(array, ((2,) * 6, (2,) * 6), Ranks(given=2))
    assert len(made.cores) == 12
    save_plan(tmp_path / "a.plan", Plan((Option(where, Replacement(where, made), "fp32", 0.1, 1.0, 10),)), "")
    found = load_plan(tmp_path / "a.plan", [where], "")
    assert found is not None and found.options[0].replacement is not None
    np.testing.assert_array_equal(found.options[0].replacement.factorized.dense(), made.dense())


def test_a_plan_without_cores(tmp_path: Path) -> None:
    dense = Plan((Option(site("w"), None, "int8", 0.1, 1e-6, 600),))
    save_plan(tmp_path / "a.plan", dense, "mark")
    found = load_plan(tmp_path / "a.plan", [site("w")], "mark")
    assert found is not None and [(o.site.name, o.label) for o in found.options] == [("w", "dense, int8")]


def test_no_file_is_no_plan(tmp_path: Path) -> None:
    assert load_plan(tmp_path / "none.plan", sites(), "mark") is None


def test_the_mark_is_of_weights_names_and_what_was_asked(tmp_path: Path) -> None:
    mark = fingerprint([site("w")], "error up to 0.01")
    assert mark == fingerprint([site("w")], "error up to 0.01")
    others = [fingerprint([site("w", 1)], "error up to 0.01"), fingerprint([site("v")], "error up to 0.01")]
    others.append(fingerprint([site("w")], "error up to 0.02"))
    assert len({mark, *others}) == 4
    save_plan(tmp_path / "a.plan", plan(), mark)
    for other in others:
        with pytest.raises(TNCompileError, match=r"a\.plan: healing of another model or budget"):
            load_plan(tmp_path / "a.plan", sites(), other)


def changed(path: Path, change: Callable[[dict[str, np.ndarray], list[dict[str, Any]]], None]) -> None:
    """Rewrite a plan's cores and records."""
    with safe_open(path, "np") as file:
        about = file.metadata()
        cores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    records = json.loads(about["plan"])
    change(cores, records)
    save_file(cores, path, {**about, "plan": json.dumps(records)})


DAMAGE: dict[str, Callable[[dict[str, np.ndarray], list[dict[str, Any]]], Any]] = {
    "a core is missing": lambda cores, records: cores.pop("0.1"),
    "a core is of another shape": lambda cores, records: cores.update({"0.0": cores["0.0"][:-1]}),
    "no such site": lambda cores, records: records[0].update(site="other"),
    "another site": lambda cores, records: records[0].update(site="q+k"),
    "no such format": lambda cores, records: records[0].update(format="Any"),
    "no such field": lambda cores, records: records[0]["fields"].update(other=1),
    "a field is missing": lambda cores, records: records[0]["fields"].pop("axes"),
    "no error": lambda cores, records: records[0].pop("error"),
    "no record": lambda cores, records: records.__setitem__(0, None),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_contents_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    save_plan(path, plan(), "mark")
    changed(path, DAMAGE[damage])
    with pytest.raises(TNCompileError, match=r"a\.plan: not a plan that healing left \(.+\); remove it"):
        load_plan(path, sites(), "mark")


@given(cut=st.floats(0, 0.999), flip=st.integers(0, 255))
def test_damaged_files_are_refused(cut: float, flip: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.plan"
    save_plan(path, plan(), "mark")
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(TNCompileError, match=r"a\.plan: not a plan"):
        load_plan(path, sites(), "mark")
    header = bytearray(data)
    header[flip % 8 + 2] ^= 0xFF  # the length of the header, or its first bytes
    path.write_bytes(header)
    with pytest.raises(TNCompileError, match=r"a\.plan: not a plan"):
        load_plan(path, sites(), "mark")


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(TNCompileError, match="another model or budget"):
        load_plan(tmp_path / "model.safetensors", sites(), "mark")
    with pytest.raises(TNCompileError, match="not a plan"):
        load_plan(tmp_path, sites(), "mark")
