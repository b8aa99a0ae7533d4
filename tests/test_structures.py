"""What a model returns: classes of all kinds, through a file and without one, and what their fields are called."""

from __future__ import annotations

import dataclasses
import io
import json
import typing
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import tncompile
from tncompile.frontend.load import load

Named = namedtuple("Named", "y z")


class Typed(typing.NamedTuple):
    y: torch.Tensor
    z: Any = None


@dataclasses.dataclass
class Fields:
    y: Any
    z: Any = None


class Output(OrderedDict):  # type: ignore[type-arg]
    """A class of keys that is registered with torch, as those of transformers are: by its keys that are set."""


class Returns(nn.Module):
    def __init__(self, result: Callable[[torch.Tensor], Any], opaque: bool = True) -> None:
        super().__init__()
        self.layer, self.result, self.opaque = nn.Linear(4, 4), result, opaque

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return self.result(torch.erf(y) if self.opaque else y)


RESULTS: dict[str, tuple[Callable[[torch.Tensor], Any], list[str]]] = {
    "namedtuple": (lambda y: Named(y, y * 2), ["y", "z"]),
    "namedtuple with None": (lambda y: Named(y, None), ["y"]),
    "typing.NamedTuple": (lambda y: Typed(y, y * 2), ["y", "z"]),
    "dataclass": (lambda y: Fields(y, y * 2), ["y", "z"]),
    "dataclass with None": (lambda y: Fields(y), ["y"]),
    "dataclass in a dataclass": (lambda y: Fields(y, [Fields(y * 2), y * 3]), ["y", "z.0.y", "z.1"]),
    "max": (lambda y: y.max(-1), ["values", "indices"]),
    "a key in a tuple": (lambda y: [y, (y * 2, None, {"n": y.sum()})], ["output_0", "output_1", "n"]),
    "one without a key": (lambda y: (y, {"n": y.sum()}), ["output", "n"]),
    "keys twice": (lambda y: (y, {"n": y * 2}, {"n": y * 3}), ["output_0", "output_1.n", "output_2.n"]),
    "None in a tuple": (lambda y: (None, y, None, y * 2), ["output_0", "output_1"]),
    "all but one None": (lambda y: (None, y), ["output"]),
}


@pytest.mark.parametrize(
    ("name", "opaque"), [*((name, True) for name in RESULTS), ("dataclass with None", False), ("max", False)]
)
def test_what_is_returned_goes_through_a_file(name: str, opaque: bool, tmp_path: Path) -> None:
    """By `tncompile.save` and a compile of that; where `opaque`, an operation goes through torch's exporter."""
    result, names = RESULTS[name]
    torch.manual_seed(0)
    model, x = Returns(result, opaque).eval(), torch.randn(3, 4)
    tncompile.save(model, (x,), tmp_path / "m.pt")
    compiled = tncompile.compile_file(tmp_path / "m.pt", batch=(1, 4))
    assert [public for public, _ in compiled.program.outputs] == names
    expected = pytree.tree_leaves(pytree.tree_map(lambda v: vars(v) if isinstance(v, Fields) else v, model(x)))
    found = compiled.run(x)
    if name != "dataclass in a dataclass":
        arrays = [*found.values()] if isinstance(found, dict) else [found]
        expected = [v.detach().numpy() for v in expected if v is not None]
        for array, wanted in zip(arrays, expected, strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_file_the_names_are_the_same() -> None:
    compiled = tncompile.compile(Returns(lambda y: Fields(y, None)).eval(), (torch.randn(3, 4),), batch=1)
    assert [public for public, _ in compiled.program.outputs] == ["y"]


def test_inputs_that_are_namedtuples_are_saved(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def forward(self, pair: Named) -> torch.Tensor:
            return pair.y * 2 + pair.z

    tncompile.save(Takes(), (Named(torch.ones(2, 3), torch.ones(2, 3)),), tmp_path / "m.pt")
    assert len(load(tmp_path / "m.pt").graph_signature.user_inputs) == 2


def test_torchs_own_file_is_read_without_its_classes(tmp_path: Path) -> None:
    """torch.export.save writes the names of classes; where nobody has registered them the fields remain."""
    pytree.register_pytree_node(
        Output,
        lambda o: (list(o.values()), list(o.keys())),
        lambda values, keys: Output(zip(keys, values, strict=True)),
        serialized_type_name="somewhere.Output",
    )
    try:
        model = Returns(lambda y: Output(logits=y, hidden=[y * 2])).eval()
        torch.export.save(torch.export.export(model, (torch.randn(3, 4),)), tmp_path / "m.pt2")
    finally:
        pytree._deregister_pytree_node(Output)
    assert "somewhere.Output" not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    compiled = tncompile.compile_file(tmp_path / "m.pt2", batch=1)
    assert [public for public, _ in compiled.program.outputs] == ["logits", "hidden.0"]


def test_torchs_own_file_of_a_namedtuple(tmp_path: Path) -> None:
    """Registered when it was written and not when it is read: its fields are in the file."""
    pytree._register_namedtuple(Named, serialized_type_name="somewhere.Named")
    try:
        exported = torch.export.export(Returns(lambda y: Named(y, y * 2)).eval(), (torch.randn(3, 4),))
        torch.export.save(exported, tmp_path / "m.pt2")
    finally:
        pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.pop("somewhere.Named")
        pytree.SUPPORTED_SERIALIZED_TYPES.pop(Named)
    compiled = tncompile.compile_file(tmp_path / "m.pt2", batch=1)
    assert [public for public, _ in compiled.program.outputs] == ["y", "z"]


def test_guards_in_a_file_are_not_run(tmp_path: Path) -> None:
    """torch executes them as Python when a program is made a module."""
    exported = torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),))
    torch.export.save(exported, tmp_path / "m.pt2")
    touched, copy = tmp_path / "touched", io.BytesIO()
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive, zipfile.ZipFile(copy, "w") as changed:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("models/model.json"):
                content = json.loads(data)
                content["guards_code"] = [f"__import__('pathlib').Path({str(touched)!r}).touch() or True"]
                data = json.dumps(content).encode()
            changed.writestr(name, data)
    (tmp_path / "m.pt2").write_bytes(copy.getvalue())
    load(tmp_path / "m.pt2").module()
    assert not touched.exists()
