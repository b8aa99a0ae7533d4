"""Files and paths that cannot be compiled: one clear message, exit 1, an existing output left as it was."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import tncompile
from tncompile.cli import main
from tncompile.errors import TNCompileError


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def exported(module: torch.nn.Module | None = None, dtype: torch.dtype = torch.float32) -> bytes:
    """A saved exported program."""
    module = module or torch.nn.Linear(4, 3)
    x = torch.ones(2, 4, dtype=dtype)
    program = torch.export.export(module.to(dtype).eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def refused(path: Path, capsys: pytest.CaptureFixture[str], *said: str, out: Path | None = None) -> None:
    """The one way to refuse: exit 1, one line that names the file, no traceback, the old output as it was."""
    out = out or path.parent / "out.onnx"
    if not out.exists() and out.parent.is_dir():
        out.write_bytes(b"old")
    before = out.read_bytes() if out.is_file() else None
    listing = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    assert main([str(path), "-o", str(out), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    message = printed.err.removeprefix("tncompile: ")
    assert len(message.strip().splitlines()) == 1, message
    for part in said:
        assert part in message
    assert (out.read_bytes() if out.is_file() else None) == before
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == listing  # nothing half-written


def write_state_dict(path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3).state_dict(), path)


def write_old_state_dict(path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3).state_dict(), path, _use_new_zipfile_serialization=False)


class Own(torch.nn.Module):
    """A module of somebody's own."""


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, factor: int) -> torch.Tensor:
        return x * factor


def write_module(path: Path) -> None:
    torch.save(Own(), path)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def write_torchscript(path: Path) -> None:
    with path.open("wb") as file:
        torch.jit.save(torch.jit.script(Scaled()), file)


def write_onnx(path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = ([info("x", 1, [2])], [info("y", 1, [2])])
    path.write_bytes(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", *values),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=10,
        ).SerializeToString()
    )


def write_safetensors(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)


def write_index(path: Path) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "one.safetensors"}}))


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.ones(3))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_state_dict, "a state_dict, weights without a model; add --model package.module:factory"),
        (write_old_state_dict, "a state_dict, weights without a model; add --model package.module:factory"),
        (write_module, "a pickle that uses tests.test_bad_input.Own: code beside torch's own layers could run"),
        (write_pickle, "a plain pickle, which could run code when it is opened, so it is refused; add --trust-pickle"),
        (write_torchscript, 'add --input "x:float32[batch,...]" --input factor=VALUE (its type is int)'),
        (write_safetensors, "a safetensors file, weights without a model; add --model package.module:factory"),
        (write_index, "an index of files of weights, weights without a model; add --model"),
        (write_npz, "numpy arrays, not a model"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("# a note\n"), "not a model that tncompile can read"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: None, "no such file"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    write: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some model.pt"
    write(path)
    hint = ["tncompile.save("] if said.startswith(("already", "numpy", "not a model", "a pickle", "a plain")) else []
    refused(path, capsys, str(path), said, *hint)


def test_truncated_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = exported()
    path = tmp_path / "model.pt"
    for cut in (3, 64, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, capsys, str(path))
    generator = np.random.default_rng(0)
    survived = 0
    for _ in range(25):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 8):
            damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        out = tmp_path / "out.onnx"
        out.write_bytes(b"old")
        code = main([str(path), "-o", str(out), "--quiet"])
        printed = capsys.readouterr()
        assert code in (0, 1) and "Traceback" not in printed.err
        survived += code == 0
        if code == 1:
            assert str(path) in printed.err and out.read_bytes() == b"old"
    assert survived < 10  # the checksums of the archive see most damage


def rewrite(archive: bytes, path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """An exported program with some of its parts changed."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_pickles_inside_an_exported_program_do_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "it ran"
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)
    bomb = buffer.getvalue()

    def as_weight(name: str, data: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
                b'"use_pickle":false', b'"use_pickle":true'
            )
        return bomb if "/weights/weight_" in name else data

    rewrite(exported(), path, as_weight)
    refused(path, capsys, str(path))

    def as_example(name: str, data: bytes) -> bytes:
        return bomb if "sample_inputs" in name else data

    rewrite(exported(), path, as_example)
    assert main([str(path), "-o", str(tmp_path / "b.onnx"), "-q"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err

    def as_constant(name: str, data: bytes) -> bytes:
        if name.endswith("constants_config.json"):
            payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"thing": payload}}).encode()
        return data

    rewrite(exported(), path, as_constant)
    refused(path, capsys, "holds a pickled object (opaque_obj_0)")
    assert not mark.exists()


@pytest.mark.parametrize(
    "code",
    ["__import__('pathlib').Path('MARK').touch()", "exec('1')", "(1).__class__", "Symbol.mro()", "open('MARK','w')"],
)
def test_sizes_that_are_code_are_refused(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "it ran"
    path = tmp_path / "model.pt"

    def hostile(name: str, data: bytes) -> bytes:
        if "/models/" not in name:
            return data
        model = json.loads(data)

        def visit(node: Any) -> None:
            if isinstance(node, dict):
                if "expr_str" in node:
                    node["expr_str"] = code.replace("MARK", str(mark))
                for value in node.values():
                    visit(value)
            elif isinstance(node, list):
                for value in node:
                    visit(value)

        visit(model)
        return json.dumps(model).encode()

    rewrite(exported(), path, hostile)
    refused(path, capsys, "a size in it is not arithmetic")
    assert not mark.exists()


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(exported())
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(path, capsys, str(folder), "is a directory", out=folder)
    missing = tmp_path / "nowhere" / "out.onnx"
    refused(path, capsys, str(missing), "does not exist; make it first", out=missing)
    refused(path, capsys, str(path), "is the model itself", out=path)
    assert main([str(path), "-o", str(tmp_path / "a"), "--report", str(tmp_path / "a"), "-q"]) == 1
    assert "the report would overwrite the output" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_unsupported_operations_on_complex_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(exported(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.complex64))
    refused(path, capsys, str(path), "aten.tanh.default on complex numbers is not supported")


def test_bad_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(exported())
    out = tmp_path / "out.onnx"
    for name, content, said in (
        ("missing.npz", None, "no such file"),
        ("text.npz", b"hello", "not a readable .npz file"),
        ("object.npz", pickle.dumps(1), "not a readable .npz file"),
    ):
        example = tmp_path / name
        if content is not None:
            example.write_bytes(content)
        assert main([str(path), "-o", str(out), "--example", str(example), "-q"]) == 1
        message = capsys.readouterr().err
        assert str(example) in message and said in message and not out.exists()


def test_inspect_and_verify_refuse_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.onnx"
    write_onnx(foreign)
    assert main(["inspect", str(foreign)]) == 0
    assert "opaque y: float32[2] = onnx.Relu(%x)" in capsys.readouterr().out
    model = tmp_path / "model.pt"
    model.write_bytes(exported())
    assert main(["inspect", str(model), "--after", "nonsense"]) == 1
    assert "--after nonsense: no such pass is run" in capsys.readouterr().err
    assert main(["verify", str(model), str(model)]) == 1
    assert "not an ONNX file; give the model first" in capsys.readouterr().err
    assert main(["verify", str(model), str(foreign)]) == 1
    assert "the model has input and output" in capsys.readouterr().err


def test_from_a_shell_there_is_no_traceback_either(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tncompile", "nothing.pt", "-o", "out.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "tncompile: nothing.pt: no such file\n"
    assert list(tmp_path.iterdir()) == []


def test_a_script_in_memory_is_told_to_come_as_a_file() -> None:
    script = torch.jit.script(torch.nn.Linear(4, 4).eval())
    with pytest.raises(TNCompileError, match="comes in as a file"):
        tncompile.compile(script, (torch.randn(2, 4),))
