"""Files that want to run code: none of it runs, and each is refused in one line."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tncompile.cli import main
from tncompile.errors import TNCompileError
from tncompile.frontend.files.inputs import parse_input
from tncompile.frontend.load import LoadOptions, load

STATE = {"training": False, "_parameters": {}, "_buffers": {}, "_modules": {}}


class Bomb:
    """Leaves a mark when it is unpickled, by a call of `os.system`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch '{self.mark}'",)


class BuiltBomb:
    """The same by way of an object's state."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), {"x": Bomb(self.mark)}


def archive(path: Path, pickled: bytes, **parts: bytes) -> None:
    """A torch archive with this pickle as its object."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **parts}.items():
            file.writestr(f"archive/{name}", data)


def refused(path: Path, mark: Path, options: LoadOptions | None = None) -> str:
    """The one line that refuses a file; nothing has run."""
    with pytest.raises(TNCompileError) as error:
        load(path, options)
    assert not mark.exists(), "code from the file ran"
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def command(mark: Path) -> bytes:
    return f"touch '{mark}'".encode()


def unicode(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "GLOBAL and REDUCE": lambda m: b"\x80\x02cos\nsystem\n" + unicode(command(m)) + b"\x85R.",
    "posix": lambda m: b"\x80\x02cposix\nsystem\n" + unicode(command(m)) + b"\x85R.",
    "STACK_GLOBAL": lambda m: b"\x80\x04\x8c\x02os\x8c\x06system\x93" + unicode(command(m)) + b"\x85R.",
    "INST": lambda m: b"\x80\x02(" + unicode(command(m)) + b"ios\nsystem\n.",
    "OBJ": lambda m: b"\x80\x02(cos\nsystem\n" + unicode(command(m)) + b"o.",
    "EXT1": lambda m: b"\x80\x02\x82\x01.",
    "builtins.eval": lambda m: b"\x80\x02cbuiltins\neval\n" + unicode(f"open({str(m)!r},'w')".encode()) + b"\x85R.",
    "__builtin__.exec": lambda m: (
        b"\x80\x02c__builtin__\nexec\n" + unicode(f"open({str(m)!r},'w')".encode()) + b"\x85R."
    ),
    "BUILD": lambda m: pickle.dumps(BuiltBomb(m), 2),
    "a call of a layer": lambda m: b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x02K\x02\x86R.",
    "a call of a function of torch": lambda m: b"\x80\x02ctorch.nn.functional\nrelu\nK\x02\x85R.",
    "state of a function": lambda m: b"\x80\x02ctorch.nn.functional\nrelu\n}b.",
    "a function of a file": lambda m: b"\x80\x02ctorch\nsave\nK\x02" + unicode(str(m).encode()) + b"\x86R.",
    "torch.load": lambda m: b"\x80\x02ctorch.serialization\nload\n" + unicode(str(m).encode()) + b"\x85R.",
    "persistent id": lambda m: b"\x80\x02" + unicode(b"module") + b"cos\nsystem\nNN(tQ.",
    "protocol 4": lambda m: pickle.dumps(Bomb(m), 4),
    "protocol 5": lambda m: pickle.dumps(Bomb(m), 5),
    "in a dict": lambda m: pickle.dumps({"weight": Bomb(m)}, 2),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_run_nothing(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    pickled = PICKLES[name](mark)
    path.write_bytes(pickled)
    assert "pickle" in refused(path, mark)
    archive(path, pickled)
    refused(path, mark)
    refused(path, mark, LoadOptions(model=lambda: torch.nn.Linear(2, 2)))
    # as the fourth pickle of an old file
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    head = buffer.getvalue()[: buffer.getvalue().index(b"\x80\x02}q\x00.")]
    path.write_bytes(head + pickled + b"\x80\x02]q\x00.")
    refused(path, mark)


def test_old_files_run_nothing_through_persistent_ids(tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"

    class Evil(torch.nn.Linear):
        def __reduce__(self) -> Any:
            return Bomb(mark).__reduce__()

    torch.save(torch.nn.Sequential(Evil(2, 2)), path, _use_new_zipfile_serialization=False)
    assert "posix.system" in refused(path, mark)


def modules(mark: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """Modules of torch's layers alone but for one thing, and what the refusal calls it."""

    def hooked() -> Any:
        layer = torch.nn.Linear(2, 2)
        layer._forward_hooks[0] = torch.nn.functional.relu
        return layer

    def attribute(name: str, value: Any) -> Callable[[], Any]:
        def make() -> Any:
            layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
            layer[0].__dict__[name] = value
            return layer

        return make

    def nested(value: Any) -> Callable[[], Any]:
        def make() -> Any:
            layer = torch.nn.Linear(2, 2)
            layer.weight.evil = value
            return layer

        return make

    relu = torch.nn.functional.relu
    return {
        "a hook": (hooked, "_forward_hooks"),
        "a forward": (attribute("forward", relu), "0.forward"),
        "a __call__": (attribute("__call__", relu), "0.__call__"),
        "an eval": (attribute("eval", relu), "0.eval"),
        "a foreign object": (attribute("scale", Bomb(mark)), "posix.system"),
        "a class": (attribute("activation", collections.OrderedDict), "0.activation"),
        "an attribute of a parameter": (nested(Bomb(mark)), "posix.system"),
        "a layer beside the layers": (attribute("extra", torch.nn.ReLU()), "0.extra"),
        "a lazy layer": (lambda: torch.nn.LazyLinear(3), "lazy"),
    }


@pytest.mark.parametrize("name", modules(Path()))
def test_modules_with_something_foreign_in_them(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    make, said = modules(mark)[name]
    torch.save(make(), path)
    message = refused(path, mark)
    assert said.lower() in message.lower()
    assert "--trust-pickle" in message and "tncompile.save(module, example_inputs, path)" in message


def test_a_method_of_torch_cannot_be_put_into_a_layer(tmp_path: Path) -> None:
    """A record's state is looked at before any class of torch sees it."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    for key in ("forward", "__class__", "_call_impl", "register_forward_hook", "state_dict", "__setstate__"):
        state = b"}" + unicode(b"_modules") + b"}s" + unicode(key.encode()) + b"ctorch.nn.functional\nrelu\ns"
        archive(path, b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81" + state + b"b.")
        assert key in refused(path, tmp_path / "never")


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    head = b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x00}"
    archive(path, head + unicode(b"_modules") + b"}" + unicode(b"0") + b"h\x00ssb.")
    assert "contains itself" in refused(path, tmp_path / "never")


def test_weights_run_nothing(tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "weights.pt"
    torch.save({**torch.nn.Linear(2, 2).state_dict(), "x": Bomb(mark)}, path)
    options = LoadOptions(model=lambda: torch.nn.Linear(2, 2))
    assert "posix.system" in refused(path, mark, options)
    (tmp_path / "shard.bin").write_bytes(path.read_bytes())
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"weight": "shard.bin"}}')
    refused_shard = pytest.raises(TNCompileError)
    with refused_shard:
        load(index, options)
    index.write_text('{"weight_map": {"weight": "../weights.pt"}}')
    assert "outside its folder" in refused(index, mark, options)
    assert not mark.exists()


# ------------------------------------------------------------------------------------ TorchScript


def scripted(path: Path, source: str) -> None:
    """A TorchScript archive of a linear layer whose code has been replaced."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(".py") and b"def forward" in data:
                head = data[: data.index(b"  def forward")].decode()
                data = (head + source).encode()
            new.writestr(name, data)


X = LoadOptions((parse_input("input:float32[batch,2]"),))
SCRIPTS = {
    "forward": "  def forward(self, input: Tensor) -> Tensor:\n    torch.save(input, 'MARK')\n    return input\n",
    "a method": "  def forward(self, input: Tensor) -> Tensor:\n    input.save('MARK')\n    return input\n",
    "from_file": "  def forward(self, input: Tensor) -> Tensor:\n    return torch.from_file('MARK', True, 4)\n",
    "__setstate__": "  def __getstate__(self) -> int:\n    return 1\n"
    "  def __setstate__(self, state: int) -> NoneType:\n    torch.save(state, 'MARK')\n    return None\n"
    "  def forward(self, input: Tensor) -> Tensor:\n    return input\n",
    "__len__": "  def __len__(self) -> int:\n    torch.save(1, 'MARK')\n    return 1\n"
    "  def forward(self, input: Tensor) -> Tensor:\n    return input\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_torchscript_touches_no_file(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    scripted(path, SCRIPTS[name].replace("MARK", str(mark)))
    assert "so it is refused; add --trust-pickle" in refused(path, mark, X)


def test_even_a_trusted_torchscript_file_is_not_compiled_with_files_in_it(tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    scripted(path, SCRIPTS["forward"].replace("MARK", str(mark)))
    assert "calls aten::save" in refused(path, mark, LoadOptions(X.inputs, trust_pickle=True))


@pytest.mark.parametrize("part", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize("name", ["GLOBAL and REDUCE", "builtins.eval", "INST", "BUILD"])
def test_pickles_inside_torchscript(part: str, name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            hostile = member.endswith(f"/{part}")
            new.writestr(member, PICKLES[name](mark) if hostile else old.read(member))
    refused(path, mark, X)


def test_parts_of_torchscript_that_differ_by_case_only(tmp_path: Path) -> None:
    """torch's reader finds parts whatever their case: what is checked must be what is read."""
    path = tmp_path / "model.pt"
    scripted(path, "  def forward(self, input: Tensor) -> Tensor:\n    return input\n")
    with zipfile.ZipFile(path, "a") as file:
        root = file.namelist()[0].partition("/")[0]
        file.writestr(f"{root}/DATA.PKL", b"\x80\x02N.")
    assert "a part that it should not have" in refused(path, tmp_path / "never", X)


def test_classes_of_cpp_are_not_made(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            data = b"\x80\x02c__torch__.torch\nclasses.c10d.FileStore\n)\x81}b."
            new.writestr(member, data if member.endswith("/data.pkl") else old.read(member))
    assert "a class of C++" in refused(path, tmp_path / "never", X)


# -------------------------------------------------------------------------------------- the user


def test_trust_runs_the_code_and_nothing_else_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag, through the command line: without it nothing runs, with it the pickle does."""
    mark, path = tmp_path / "it ran", tmp_path / "model.pt"
    torch.save(Bomb(mark), path)
    for arguments in (
        ["-o", str(tmp_path / "o.onnx"), "-q"],
        ["--input", "x:float32[batch,2]", "-o", str(tmp_path / "o.onnx")],
    ):
        assert main([str(path), *arguments]) == 1
        assert "--trust-pickle" in capsys.readouterr().err and not mark.exists()
    for command_name in ("inspect", "bench"):
        assert main([command_name, str(path)]) == 1
        assert "--trust-pickle" in capsys.readouterr().err and not mark.exists()
    assert main([str(path), "-o", str(tmp_path / "o.onnx"), "--trust-pickle", "-q"]) == 1
    assert "holds int, not a module" in capsys.readouterr().err and mark.exists()
