"""Which device profile to plan with: one chosen by the user, the one measured on this machine, or the shipped."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from tncompile.cost.datasheet import from_datasheet
from tncompile.cost.profile import DeviceProfile
from tncompile.errors import LoadError, OutputError

VARIABLE = "TNCOMPILE_PROFILE"
DEFAULT = "default"


@dataclass(frozen=True)
class ChosenProfile:
    """A profile and, in words, where it comes from."""

    profile: DeviceProfile
    origin: str


@cache
def default_profile(device: str = "cpu", threads: int = 0) -> DeviceProfile:
    """The profile that ships with tncompile: of ``cpu`` as measured, on one thread or two; of ``cuda`` as a
    datasheet has it."""
    if device == "cuda":
        return from_datasheet("cuda, by the datasheet of an A100", 19.5e12, 1.55e12, launch=4e-6, tile=32)
    name = f"{device}-1.json" if threads == 1 else f"{device}.json"
    return DeviceProfile.from_json((files("tncompile.cost") / "profiles" / name).read_text("utf-8"))


def choose(choice: str | None = None, device: str = "cpu", threads: int = 0) -> ChosenProfile:
    """The profile to plan with, for a session of so many threads (0: one a core).

    `choice` is a file or ``default``; without, the environment variable TNCOMPILE_PROFILE says the same; without
    that, it is the stored profile of this machine where there is one, else the shipped default. LoadError for a
    chosen file that cannot be used; a stored one is passed over, which `origin` says.
    """
    chosen = choice or os.environ.get(VARIABLE)
    if chosen == DEFAULT:
        return ChosenProfile(default_profile(device, threads), "shipped default")
    if chosen:
        profile = load(Path(chosen))
        if _is_of_another(profile, device):
            raise LoadError(f"{chosen}: is a profile of {profile.device}, not of {device}")
        return ChosenProfile(profile, f"{chosen}")
    path = stored_path(device, threads)
    if not path.exists():
        return ChosenProfile(
            default_profile(device, threads), "shipped default; `tncompile tune --device` measures this machine"
        )
    try:
        return ChosenProfile(load(path), f"measured on this machine, {path}")
    except LoadError as error:
        return ChosenProfile(
            default_profile(device, threads), f"shipped default, as the stored profile cannot be used ({error})"
        )


def load(path: Path) -> DeviceProfile:
    """The profile in a file. LoadError where it cannot be read, is damaged or outdated."""
    try:
        return DeviceProfile.from_json(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file; `tncompile tune --device --output {path}` writes it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: not a readable device profile ({error})") from error
    except LoadError as error:
        raise LoadError(f"{path}: {error}; run `tncompile tune --device` again") from error


def output_path(device: str = "cpu", threads: int = 0) -> Path:
    """Where a measured profile is to be written: the file that `choose` will read.

    OutputError where that is a profile of another kind of device.
    """
    chosen = os.environ.get(VARIABLE)
    if not chosen or chosen == DEFAULT:
        return stored_path(device, threads)
    path = Path(chosen)
    with contextlib.suppress(LoadError):  # none yet, or of no use
        present = load(path)
        if _is_of_another(present, device):
            raise OutputError(
                f"{path}: is a profile of {present.device}, which one of {device} must not overwrite; choose another "
                f"place with --output, or unset {VARIABLE}"
            )
    return path


def _is_of_another(profile: DeviceProfile, device: str) -> bool:
    """Whether a profile is of the other kind of device; those made by hand may be called anything."""
    return not profile.device.startswith(device) and profile.device.startswith(("cpu", "cuda"))


def stored_path(device: str = "cpu", threads: int = 0) -> Path:
    """The file of this machine's profile, which need not exist: another processor, count of cores or threads, or
    ONNX Runtime has another."""
    from platformdirs import user_data_path

    name = re.sub(r"[^A-Za-z0-9.]+", "-", machine(device, threads)).strip("-")
    return user_data_path("tncompile", appauthor=False) / "profiles" / f"{name}.json"


def machine(device: str = "cpu", threads: int = 0) -> str:
    """What a profile belongs to: ``cpu, AMD EPYC, 2 cores, onnxruntime 1.31.1``, on fewer threads than cores
    ``cpu, AMD EPYC, 1 of 2 cores, ...``."""
    used = f"{threads} of " if 0 < threads < cores() else ""
    place = f"{processor()}, {used}{cores()} cores" if device == "cpu" else _gpu()
    return f"{device}, {place}, onnxruntime {_runtime()}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    """The first GPU by the driver's own list, or ``GPU`` where that is not to be had."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text("utf-8", "replace").splitlines():
            if line.startswith("Model"):
                return line.partition(":")[2].strip()
    return "GPU"


def _runtime() -> str:
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
