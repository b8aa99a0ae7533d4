"""What torch.save wrote: weights, or a whole module."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tncompile.errors import LoadError
from tncompile.frontend.files.archive import is_archive, open_archive
from tncompile.frontend.files.detect import detect, globals_of
from tncompile.frontend.files.factory import importable_here
from tncompile.frontend.files.layers import FUNCTIONS, LAYERS, Rebuild, Record, allowed
from tncompile.frontend.files.legacy import object_span, without_sources

SAFE = "or make a safe file where you trust it: tncompile.save(module, example_inputs, path)"
#: where training scripts keep a module inside a checkpoint, the best one first
_CHECKPOINT = ("ema", "model", "module", "net")


def read(path: Path) -> Any:
    """What is in the file, by torch's restricted unpickler; layers of torch.nn come as records.

    LoadError where the file would need anything else to be imported, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed()):
            warnings.simplefilter("ignore")
            source = path if is_archive(path) else io.BytesIO(without_sources(path.read_bytes()))
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LoadError) as error:
        raise LoadError(
            f"{path}: {_why(path, error)}; add --trust-pickle if you trust where it comes from, {SAFE}"
        ) from error
    except Exception as error:  # whatever a damaged archive makes torch's reader raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise LoadError(f"{path}: truncated or corrupted ({reason}); copy or save it again") from error


def contents(path: Path, trust: bool) -> Any:
    """The module in the file, alone or in a checkpoint, or else what is in it. LoadError where it cannot be had."""
    content = trusted(path) if trust else read(path)
    if isinstance(content, Mapping):
        modules = [content[key] for key in _CHECKPOINT if isinstance(content.get(key), (torch.nn.Module, Record))]
        content = modules[0] if modules else content
    return _layer(content, path) if isinstance(content, Record) else content


def _layer(record: Record, path: Path) -> torch.nn.Module:
    try:
        return Rebuild().layer(record)
    except LoadError as error:
        raise LoadError(f"{path}: {error}; add --trust-pickle if you trust where it comes from, {SAFE}") from error
    except Exception as error:  # whatever torch's layers raise for a state that is not theirs
        raise LoadError(
            f"{path}: its layers cannot be restored ({type(error).__name__}: {error}); save it again"
        ) from error


def trusted(path: Path) -> Any:
    """What is in the file, by pickle itself: runs whatever code the file asks for. LoadError where that fails."""
    try:
        with importable_here(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if detect(path) != "plain pickle":
                return torch.load(path, map_location="cpu", weights_only=False)
            with path.open("rb") as file:
                return pickle.load(file)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{path}: its classes are in the module {error.name}, which is not installed and not in the current "
            "directory; install it, or run from the folder that holds it"
        ) from error
    except AttributeError as error:
        reason = str(error).strip().split("\n")[0]
        where = (
            "it was defined in a script that ran as __main__; move it into a module of its own and save again"
            if "__main__" in reason
            else "the installed version is another than the one it was saved with"
        )
        raise LoadError(f"{path}: a class in it is not found ({reason}); {where}") from error
    except Exception as error:  # whatever the file's code raises
        reason = str(error).strip().split("\n")[0][:200]
        raise LoadError(f"{path}: unpickling it fails: {type(error).__name__}: {reason}") from error


def _why(path: Path, error: Exception) -> str:
    """What the file would import that is not torch's own."""
    foreign = sorted(
        {name for name in _globals(path) if name not in LAYERS and name not in FUNCTIONS and not _is_plain(name)}
    )
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        return (
            f"a pickle that uses {names}: code beside torch's own layers could run when it is opened, so it is refused"
        )
    if not is_archive(path) and object_span(path.read_bytes()) is None:
        return "a plain pickle, which could run code when it is opened, so it is refused"
    reason = str(error.__cause__ or error).strip().split("WeightsUnpickler error: ")[-1].split("\n")[0]
    return f"a pickle that could run code when it is opened, so it is refused ({reason[:160]})"


def _is_plain(name: str) -> bool:
    from torch import _weights_only_unpickler

    return name in _weights_only_unpickler._get_allowed_globals()


def _globals(path: Path) -> list[str]:
    try:
        if not is_archive(path):
            data = path.read_bytes()
            return [*globals_of(data[slice(*(object_span(data) or (0, len(data))))])]
        with open_archive(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            return [*globals_of(archive.read(name))]
    except Exception:  # no more is to be known of a damaged file
        return []
