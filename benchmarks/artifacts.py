"""The files that users of a case would have: ``python -m benchmarks.artifacts CASE FOLDER [KIND,...]``, in a
process of its own. FOLDER gets one model file of each kind, and artifacts.json, a list of what they are.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.models import CASES, Loaded
from tncompile.compiler import import_file, save
from tncompile.errors import TNCompileWarning
from tncompile.frontend.files.inputs import parse_input
from tncompile.frontend.load import LoadOptions
from tncompile.frontend.trace import whole_einsums
from tncompile.ir import Network, Opaque
from tncompile.runtime.files import write_file
from tncompile.runtime.rivals import quiet

PICKLED = ("tl_linear_tucker_facto", "tl_trl_cp", "ted_tk2_lenet5", "einconv_lenet")
"""Cases whose modules are also taken as ``torch.save`` writes them; the classes are those of installed packages."""

EXPORTED = ("tl_conv_tt_facto", "ted_tr_lenet5", "ts_monarch_mlp", "minilm_l6", "crepe_tiny", "silero_vad_16k")
"""Cases that are also taken as ONNX models, as ``torch.onnx.export`` writes them."""


@dataclass
class Artifact:
    """One model file: its kind, and the flags it needs.

    `networks` and `cores` count what is found in it: networks that have weights, and their cores, as traced.
    `warned` is what was said while it was made, `error` why there is no such file.
    """

    kind: str
    path: str
    flags: tuple[str, ...] = ()
    networks: int | None = None
    cores: int | None = None
    opaque: int | None = None
    warned: str = ""
    error: str = ""


def artifacts(name: str, folder: Path, kinds: Collection[str] = ()) -> Iterator[Artifact]:
    """Write each kind of file for a case; it is loaded anew for each, as tracing may change a module."""
    case = CASES[name]

    def wanted(kind: str) -> bool:
        return not kinds or kind in kinds

    def made(kind: str, write: Callable[[Loaded, Path], None], flags: tuple[str, ...] = ()) -> Artifact:
        path = folder / f"{kind.replace(' ', '_')}.model"
        result = Artifact(kind, str(path), flags)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TNCompileWarning)
            try:
                with quiet():
                    loaded = case.load()
                write(loaded, path)
            except Exception as error:  # of any library: it is one line of the table
                result.error = _first_line(error)
                return result
        result.warned = "; ".join(str(w.message) for w in caught if issubclass(w.category, TNCompileWarning))
        return _described(result)

    with quiet():
        shipped = case.load().shipped
    if shipped is not None:
        flags = (("TorchScript, fixed", shipped.fixed), ("TorchScript", shipped.dynamic))
        for kind, inputs in (each for each in flags if wanted(each[0])):
            yield _described(Artifact(kind, str(shipped.path), tuple(f"--input={i}" for i in inputs)))
        return
    if wanted("fixed"):
        yield made("fixed", lambda loaded, path: save(loaded.module, loaded.inputs, path, dynamic_shapes=None))
    if wanted("dynamic"):
        yield made(
            "dynamic", lambda loaded, path: save(loaded.module, loaded.inputs, path, dynamic_shapes=loaded.dynamic)
        )
    if name in PICKLED and wanted("pickle"):
        yield made("pickle", lambda loaded, path: torch.save(loaded.module, path), _pickle_flags(case.load()))
    if name in EXPORTED and wanted("ONNX"):
        yield made("ONNX", _export)


def _pickle_flags(loaded: Loaded) -> tuple[str, ...]:
    flags = ["--trust-pickle"]
    for x in loaded.inputs:
        sizes = ",".join(["batch", *map(str, x.shape[1:])])
        flags.append(f"--input={str(x.dtype).removeprefix('torch.')}[{sizes}]")
    return tuple(flags)


def _export(loaded: Loaded, path: Path) -> None:
    batch = torch.export.Dim.DYNAMIC
    with quiet(), whole_einsums():
        program = torch.onnx.export(
            loaded.module,
            loaded.inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in loaded.inputs),
        )
    assert program is not None
    write_file(path, program.model_proto.SerializeToString())


def _described(artifact: Artifact) -> Artifact:
    """With what is found in the file, as it is before any pass. Where it is refused, the command line says why."""
    inputs = tuple(parse_input(f.removeprefix("--input=")) for f in artifact.flags if f.startswith("--input="))
    options = LoadOptions(inputs, trust_pickle="--trust-pickle" in artifact.flags)
    try:
        with quiet():
            program = import_file(artifact.path, options).program
    except Exception:
        return artifact
    networks = [n for n in program.nodes if isinstance(n, Network) and any(c.indices for c in n.cores)]
    artifact.networks = len(networks)
    artifact.cores = sum(len(n.cores) for n in networks)
    artifact.opaque = sum(isinstance(n, Opaque) and n.output.dtype != "scalar" for n in program.nodes)
    return artifact


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return next((line.strip() for line in text.splitlines() if line.strip()), text)[:400]


def main(name: str, folder: Path, kinds: Collection[str] = ()) -> None:
    """Write the files and the list of them."""
    found = [asdict(artifact) for artifact in artifacts(name, folder, kinds)]
    write_file(folder / "artifacts.json", (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [kind for given in sys.argv[3:] for kind in given.split(",") if kind])
