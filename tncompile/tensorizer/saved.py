"""A plan on disk, so that healing which was killed goes on with the same cores: a search takes times, and may choose
others.

A safetensors file: the cores, and in its metadata what they are and which model and budget they are for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tncompile import decomp
from tncompile.decomp import Factorized
from tncompile.errors import TNCompileError, first_line
from tncompile.runtime.files import write_file
from tncompile.tensorizer.search import Option, Plan
from tncompile.tensorizer.sites import Replacement, Site

_FORMATS = {
    kind.__name__: kind
    for kind in vars(decomp).values()
    if isinstance(kind, type) and issubclass(kind, Factorized) and kind is not Factorized
}


def fingerprint(sites: Sequence[Site], asked: str) -> str:
    """What a plan belongs to: the weights of a model, and what was asked for."""
    digest = hashlib.sha256(asked.encode())
    for site in sites:
        digest.update(site.name.encode())
        for part in site.parts:
            digest.update(np.ascontiguousarray(part.array).tobytes())
    return digest.hexdigest()


def save_plan(path: Path, plan: Plan, mark: str) -> None:
    """Write a plan, whole or not at all. OutputError where that cannot be done."""
    from safetensors.numpy import save

    cores: dict[str, Any] = {}
    records = []
    for number, option in enumerate(plan.options):
        made = None if option.replacement is None else option.replacement.factorized
        record = {"site": option.site.name, "bits": option.bits, "error": option.error}
        record |= {"seconds": option.seconds, "size": option.size}
        if made is not None:
            own = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "cores"}
            record |= {"format": type(made).__name__, "fields": own}
            cores |= {f"{number}.{k}": np.ascontiguousarray(core) for k, core in enumerate(made.cores)}
        records.append(record)
    write_file(path, save(cores or {"none": np.zeros(1)}, {"mark": mark, "plan": json.dumps(records)}))


def load_plan(path: Path, sites: Sequence[Site], mark: str) -> Plan | None:
    """The plan in a file, None where there is no file. TNCompileError where it is damaged or for something else."""
    from safetensors import safe_open

    if not path.exists():
        return None
    known = {site.name: site for site in sites}
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            records = json.loads(about["plan"]) if about.get("mark") == mark else None
            options = []
            for number, record in enumerate(records or ()):
                site, replacement = known[record["site"]], None
                if "format" in record:
                    own = {name: _tuples(value) for name, value in record["fields"].items()}
                    names = sorted((n for n in list(file.keys()) if n.split(".")[0] == str(number)), key=_place)
                    cores = tuple(file.get_tensor(n) for n in names)
                    replacement = Replacement(site, _FORMATS[record["format"]](cores=cores, **own))
                numbers = (record["error"], record["seconds"], record["size"])
                options.append(Option(site, replacement, record["bits"], *numbers))
    except Exception as error:  # whatever a damaged file makes safetensors, json or a format raise
        raise TNCompileError(f"{path}: not a plan that healing left ({first_line(error)}); remove it") from error
    if records is None:
        raise TNCompileError(f"{path}: healing of another model or budget; remove it, or name another --checkpoint")
    return Plan(tuple(options))


def _place(name: str) -> int:
    return int(name.split(".")[1])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
