"""Exported programs: checked part by part before torch reads them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompile.errors import LoadError, UnsupportedError, first_line
from tncompile.frontend.files.archive import open_archive, parts
from tncompile.frontend.files.inputs import InputSpec
from tncompile.frontend.files.treespecs import without_classes
from tncompile.frontend.mapped import PART, STAND_IN, MappedWeights
from tncompile.frontend.sizes import name_sizes, named_sizes
from tncompile.frontend.structure import make_plain
from tncompile.frontend.trace import silence

if TYPE_CHECKING:
    import torch

# what the functions in a size expression may be called; anything else in its place could be code
_SIZE_FUNCTIONS = {"Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "Pow"}
_SIZE_FUNCTIONS |= {"Symbol", "Integer", "Rational", "Float", "Add", "Mul"}
_SIZE_FUNCTIONS |= {"Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not"}
_SIZE_FUNCTIONS |= {"ModularIndexing", "Where", "PowByNatural", "CeilToInt", "FloorToInt", "TruncToInt", "ToFloat"}


def load_exported(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Load a file written by `torch.export.save`.

    Raises LoadError, with the file's name and what to do, where it is damaged or holds code. No code from the file
    runs: pickled parts go through torch's restricted unpickler, and sizes are checked before they are parsed.
    """
    import torch

    path = Path(path)

    try:
        clean, weights, names = _checked_copy(path)
        with _quiet_and_safe():
            exported = torch.export.load(clean)
            weights.put_into(exported)
            name_sizes(exported, names)
            return exported
    except LoadError:
        raise
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path}: truncated or corrupted ({error}); copy or export it again") from error
    except Exception as error:  # whatever a damaged archive makes torch's reader raise
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise LoadError(
            f"{path}: torch {torch.__version__} cannot read this exported program ({reason[:200]}); it is damaged, "
            f"or was saved by another version of torch: export it again"
        ) from error


def dump_exported(exported: torch.export.ExportedProgram) -> bytes:
    """The file of a program, which `load_exported` and `torch.export.load` read; its structures become plain ones.

    UnsupportedError where torch cannot write it.
    """
    import torch

    make_plain(exported)
    buffer = io.BytesIO()
    names = json.dumps(named_sizes(exported))
    with warnings.catch_warnings(), silence():
        warnings.simplefilter("ignore")
        try:
            torch.export.save(exported, buffer, extra_files={_SIZES.removeprefix("extra/"): names})
        except Exception as error:  # whatever torch's writer raises for what a model may hold
            raise UnsupportedError(f"torch cannot write this model to a file: {first_line(error)}") from error
    return buffer.getvalue()


def check_inputs(program: torch.export.ExportedProgram, inputs: Sequence[InputSpec]) -> None:
    """LoadError where what the user says of the inputs is not what the program says itself."""
    import torch

    nodes = {n.name: n.meta.get("val") for n in program.graph_module.graph.nodes if n.op == "placeholder"}
    own = {s.arg.name: nodes[s.arg.name] for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    own = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    unnamed = iter(own)
    for spec in inputs:
        name = spec.name or next(unnamed, "")
        if name not in own:
            raise LoadError(f"the model has no input {spec.name or 'that many'}; its inputs are {', '.join(own)}")
        value = own[name]
        dtype = str(value.dtype).removeprefix("torch.")
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        fits = len(sizes) == len(spec.dims) and all(
            size is None or size == dim for size, dim in zip(sizes, spec.dims, strict=True)
        )
        if spec.fixed or dtype != spec.dtype or not fits:
            shown = ",".join("dynamic" if size is None else str(size) for size in sizes)
            raise LoadError(f"its input {name} is {dtype}[{shown}], not {spec}; leave out --input")


_SIZES = "extra/tncompile_sizes.json"
"""What the user calls torch's symbols."""

# the parts of an exported program that hold no code; compiled or pickled parts are not among them
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    rf"|{re.escape(_SIZES)}|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
)
# what a node of the graph may call: operators, arithmetic of sizes, what torch.vmap is traced as, no reading of files
_TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order)\.(?!from_file)\w+(\.\w+)?"
    r"|torch\._functorch\.predispatch\.(lazy_load_decompositions|_vmap_(in|de)crement_nesting|_(add|remove)_batch_dim)"
    r"|(_operator|operator|math|builtins)\.\w+|torch\.(_?sym_\w+|_check\w*)|\w+"
)


def _checked_copy(path: Path) -> tuple[io.BytesIO, MappedWeights, dict[str, str]]:
    """The archive, read once, checked, and written anew: torch then reads what was checked and nothing else.

    Also gives its weights, and the names of sizes in it.

    torch's own reader takes compiled libraries and pickled objects from further parts; so only known ones pass.
    Weights are not copied: in their place stands one number each, until they are put into what torch has made of the
    rest.
    """

    def refusal(name: str) -> LoadError:
        return LoadError(f"{path}: holds a part that could run code ({name}); export a model of tensors only")

    copy, weights, names = io.BytesIO(), MappedWeights(path), {}
    with open_archive(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        for name, part in parts(archive, _PARTS, refusal):
            if PART.fullmatch(part):
                weights.add(part, archive, archive.getinfo(name))
                checked.writestr(name, STAND_IN)
                continue
            data = archive.read(name)  # checks the checksum
            if part == _SIZES:
                names = {str(symbol): str(given) for symbol, given in json.loads(data).items()}
                continue
            if part.endswith(".json"):
                content = json.loads(data)
                _check_json(content, part, path)
                if part.endswith("_config.json"):
                    content = weights.stand_in(part, content)
                else:
                    without_classes(content["graph_module"])
                    content["guards_code"] = []  # torch would run it; shapes are checked by the graph itself
                data = json.dumps(content).encode()
            checked.writestr(name, data)
    copy.seek(0)
    return copy, weights, names


def _check_json(content: Any, part: str, path: Path) -> None:
    """Refuse pickled payloads, sizes that are not arithmetic, and calls of anything but operators."""
    if part.endswith("_config.json"):
        for payload in content.get("config", {}).values():
            if not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
                raise LoadError(
                    f"{path}: holds a pickled object ({payload.get('path_name')}), which could run code; "
                    "export a model of tensors only"
                )
    for key, value in _strings(content):
        if key == "expr_str" and not _is_arithmetic(value):
            raise LoadError(f"{path}: a size in it is not arithmetic ({value[:60]!r}); refused")
        if key == "target" and not _TARGETS.fullmatch(value):
            raise LoadError(f"{path}: calls {value[:60]!r}, which is not an operator of torch; refused")


def _strings(node: Any) -> Iterator[tuple[str, str]]:
    """Every size (``expr_str``) and every node's ``target`` in the JSON of an exported program."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr_str" or (key == "target" and "inputs" in node):
                yield key, str(value)
            yield from _strings(value)
    elif isinstance(node, list):
        for item in node:
            yield from _strings(item)


def _is_arithmetic(expression: str) -> bool:
    """Whether a size holds nothing but numbers, symbols and known functions: ``Mul(Integer(2), Symbol('s0'))``."""
    bare = re.sub(r"'\w+'", "", expression)
    if not re.fullmatch(r"[\w\s+\-*/(),.<>=]*", bare) or "__" in expression:
        return False
    # a dot only inside a number: no attribute can be reached
    attribute = re.search(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_]", bare)
    return attribute is None and {*re.findall(r"(\w+)\s*\(", bare)} <= _SIZE_FUNCTIONS


@contextlib.contextmanager
def _quiet_and_safe() -> Iterator[None]:
    """Make every torch.load inside use the restricted unpickler, and keep torch's reader from logging."""
    key, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[key] = "1"
    try:
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
