"""Device profiles: tables, the model on top of them, files, and which one is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tncompile.cost import devices
from tncompile.cost.profile import DeviceProfile
from tncompile.cost.table import Table
from tncompile.errors import LoadError

PROFILES = [devices.default_profile("cpu"), devices.default_profile("cuda"), devices.default_profile("cpu", 1)]
SIZE = st.integers(1, 5000)


def test_a_table_gives_its_points_back() -> None:
    for name in ("matmul", "batched", "swap", "read"):
        table = getattr(PROFILES[0], name)
        for sizes, seconds in table.points():
            assert table(*sizes) == pytest.approx(seconds, rel=1e-12)


def test_between_points_an_overhead_and_products_of_sizes_come_out_exactly() -> None:
    def law(m: float, n: float) -> float:
        return 1e-6 + 2e-9 * m + 3e-9 * n + 4e-9 * m * n

    axes = ((1, 8, 64), (1, 16, 256))
    table = Table(axes, tuple(law(m, n) for m in axes[0] for n in axes[1]))
    for m, n in ((1, 3), (5, 7), (40, 100), (64, 250)):
        assert table(m, n) == pytest.approx(law(m, n), rel=1e-12)
    assert table(128, 256) == pytest.approx(2 * law(64, 256), rel=1e-12)  # beyond, at a constant rate
    assert table.covers(64, 256) and not table.covers(65, 256)


@pytest.mark.parametrize(
    ("axes", "seconds"),
    [(((1, 2),), (1.0,)), (((2, 1),), (1.0, 2.0)), (((1, 2),), (1.0, 0.0)), (((1, 2),), (1.0, float("nan"))), ((), ())],
)
def test_a_table_is_checked(axes: tuple[tuple[int, ...], ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        Table(axes, seconds)


@pytest.mark.parametrize("profile", PROFILES, ids=["cpu", "cuda", "cpu-1"])
@settings(max_examples=100, deadline=None)
@given(sizes=st.tuples(SIZE, SIZE, SIZE, SIZE), axis=st.integers(0, 3), more=st.integers(2, 16), constant=st.booleans())
def test_more_work_is_not_much_cheaper(
    profile: DeviceProfile, sizes: tuple[int, ...], axis: int, more: int, constant: bool
) -> None:
    larger = tuple(size * more if k == axis else size for k, size in enumerate(sizes))
    if constant:  # the packed kernel, with batch 1
        sizes, larger = (1, *sizes[1:]), (1, *larger[1:])
    times = [profile.matmul_time(*s, 4, constant) for s in (sizes, larger)]  # type: ignore[arg-type, misc]
    assert 0 < times[0] <= times[1] * 1.001


@pytest.mark.parametrize("profile", PROFILES, ids=["cpu", "cuda", "cpu-1"])
@settings(max_examples=100, deadline=None)
@given(sizes=st.tuples(SIZE, SIZE, SIZE), axis=st.integers(0, 2), more=st.integers(2, 16))
def test_moving_more_is_not_much_cheaper(profile: DeviceProfile, sizes: tuple[int, ...], axis: int, more: int) -> None:
    outer, _, inner = sizes
    larger = tuple(size * more if k == axis else size for k, size in enumerate(sizes))
    if inner > 1:  # a last axis has a kernel of its own
        assert 0 < profile.reduce_time(*sizes, 4) <= profile.reduce_time(*larger, 4) * 1.001
    assert 0 < profile.multiply_time(outer, inner, 4) <= profile.multiply_time(outer * more, inner, 4) * 1.001
    assert 0 < profile.copy_time(outer, 4) <= profile.copy_time(outer * more, 4) * 1.001
    for single in (False, True):
        time = profile.permute_time(outer * 8, 8, 4, single)
        assert 0 < time <= profile.permute_time(outer * more * 8, 8, 4, single) * 1.001


def test_what_is_known_of_the_kernels() -> None:
    profile = PROFILES[0]
    assert profile.matmul_time(1, 256, 64, 17, 4) == profile.matmul_time(1, 256, 64, 32, 4)  # whole strips
    assert profile.matmul_time(1, 256, 256, 256, 8) > 1.9 * profile.matmul_time(1, 256, 256, 256, 4)
    assert profile.permute_time(1 << 16, 1, 4) > 2 * profile.permute_time(1 << 16, 64, 4)
    read = 4 * 4096 * 4096 / profile.matmul_time(1, 1, 4096, 4096, 4)  # 64 MB, from main memory
    assert read < profile.bandwidth


def test_what_the_caches_do_not_hold_is_waited_for() -> None:
    profile = PROFILES[0]
    assert profile.waits(1 << 12) == 0
    small, large = 1 << 11, 1 << 16  # rows of 64: 1 MB in all, and 32 MB
    for time in (
        lambda rows: profile.matmul_time(1, rows, 64, 64, 4),
        lambda rows: profile.permute_time(rows * 64, 1, 4, True, (rows, 64)),
        lambda rows: profile.copy_time(rows * 64, 4),
    ):
        assert time(large) > 1.2 * large / small * time(small)


def test_json_round_trip() -> None:
    for profile in PROFILES:
        again = DeviceProfile.from_json(profile.to_json())
        assert again.to_json() == profile.to_json()
        assert DeviceProfile.from_json(again.to_json()) == again
        assert hash(DeviceProfile.from_json(again.to_json())) == hash(again)
        assert again.matmul_time(1, 33, 77, 100, 4) == pytest.approx(profile.matmul_time(1, 33, 77, 100, 4), rel=1e-3)


def broken(text: str) -> list[tuple[str, str]]:
    data = json.loads(text)
    tables = data["matmul"]
    return [
        (text[: len(text) // 2], "damaged JSON"),
        ("[]", "no version"),
        (json.dumps({**data, "version": 999}), "of version 999"),
        (json.dumps({k: v for k, v in data.items() if k != "conv"}), "conv is missing"),
        (json.dumps({**data, "matmul": {**tables, "ns": tables["ns"][1:]}}), "not a table"),
        (json.dumps({**data, "matmul": {**tables, "ns": None}}), "not a table"),
        (json.dumps({**data, "matmul": data["copy"]}), "matmul has 1 axes"),
        (json.dumps({**data, "node": "fast"}), "node or device"),
        (json.dumps({**data, "strip": 0}), "strip"),
    ]


def test_a_file_that_is_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "profile.json"
    monkeypatch.setattr(devices, "stored_path", lambda device="cpu", threads=0: file)
    for text, reason in broken(PROFILES[0].to_json()):
        file.write_text(text)
        with pytest.raises(LoadError, match=reason):
            devices.choose(str(file))
        monkeypatch.setenv(devices.VARIABLE, str(file))
        with pytest.raises(LoadError, match=reason):
            devices.choose()
        monkeypatch.delenv(devices.VARIABLE)
        choice = devices.choose()  # what tncompile stored by itself must not stand in the way
        assert choice.profile == PROFILES[0] and reason in choice.origin
    with pytest.raises(LoadError, match="no such file"):
        devices.choose(str(tmp_path / "missing.json"))
    with pytest.raises(LoadError, match="not a readable"):
        devices.choose(str(tmp_path))


def test_which_profile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "stored_path", lambda device="cpu", threads=0: tmp_path / "stored.json")
    monkeypatch.delenv(devices.VARIABLE)
    assert devices.choose() == devices.ChosenProfile(PROFILES[0], devices.choose().origin)
    assert "shipped default" in devices.choose().origin
    for name in ("stored", "variable", "option"):
        (tmp_path / f"{name}.json").write_text(replace(PROFILES[0], device=name).to_json())
    assert devices.choose().profile.device == "stored"
    assert "measured on this machine" in devices.choose().origin
    monkeypatch.setenv(devices.VARIABLE, str(tmp_path / "variable.json"))
    assert devices.choose().profile.device == "variable"
    assert devices.choose(str(tmp_path / "option.json")).profile.device == "option"
    assert devices.choose("default").profile == PROFILES[0]
    assert devices.choose("default", threads=1).profile == PROFILES[2]


def test_a_stored_profile_belongs_to_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    first = devices.stored_path()
    monkeypatch.setattr(devices, "processor", lambda: "Another CPU @ 2.4 GHz / x")
    second = devices.stored_path()
    assert first != second and first.parent == second.parent
    assert "Another-CPU-2.4-GHz-x" in second.name and second.suffix == ".json"
    monkeypatch.setattr(devices, "cores", lambda: 4)
    every = devices.stored_path()
    assert devices.stored_path(threads=4) == every != devices.stored_path(threads=1)
