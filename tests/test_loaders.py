"""Model files of every kind that is taken: loaded, they compute what the module computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import tncompile
from tncompile.cli import main
from tncompile.errors import TNCompileError, TNCompileWarning
from tncompile.frontend.files.inputs import InputSpec, parse_input
from tncompile.frontend.load import LoadOptions, detect, load

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

    def forward(self, x, scale=None):
        y = self.second(torch.relu(self.first(x)))
        return y if scale is None else y * scale

def number():
    return 3

def broken():
    raise RuntimeError("no such file: weights.bin")
"""


def options(*inputs: str, **others: Any) -> LoadOptions:
    return LoadOptions(tuple(map(parse_input, inputs)), **others)


def agrees(path: Path, module: nn.Module, inputs: Sequence[torch.Tensor], given: LoadOptions | None = None) -> Any:
    """The loaded program computes what the module does, at twice the batch too; returns it."""
    program = load(path, given)
    loaded = program.module()
    for args in (inputs, [torch.cat([x, x.flip(0)]) for x in inputs]):
        with torch.no_grad():
            result, expected = loaded(*args), module.eval()(*args)
        for a, b in zip(
            torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return program


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's own in the current directory."""
    (tmp_path / "user_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "user_net", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    import user_net

    yield user_net
    sys.modules.pop("user_net", None)


# ------------------------------------------------------------------------------- pickled modules

PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, list[str]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Dropout(), nn.Linear(5, 2)), (3, 6), []),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            nn.Linear(16, 5),
        ),
        (2, 3, 8, 8),
        ["image:float32[batch,3,8,8]"],
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2),
        (2, 5, 8),
        [],
    ),
    "relu transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=torch.nn.functional.relu, batch_first=True),
        (2, 5, 8),
        [],
    ),
    "lstm": (lambda: nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True), (2, 5, 6), ["image:float32[batch,5,6]"]),
    "gru": (lambda: nn.GRU(6, 4, batch_first=True), (2, 5, 6), ["image:[batch,5,6]"]),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), None, []),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_pickled_modules_of_torchs_own_layers(name: str, zipped: bool, tmp_path: Path) -> None:
    make, shape, inputs = PLAIN[name]
    torch.manual_seed(0)
    module, path = make(), tmp_path / "model.bin"
    torch.save(module, path, _use_new_zipfile_serialization=zipped)
    x = torch.randint(0, 11, (2, 5)) if shape is None else torch.randn(shape)
    program = agrees(path, module, [x], options(*inputs))
    assert program.range_constraints  # a dynamic batch
    if inputs:
        assert program.graph_signature.user_inputs == ("image",)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    torch.save(module, tmp_path / "m.pt")
    state = agrees(tmp_path / "m.pt", module, [torch.randn(2, 4)]).state_dict
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_a_checkpoint_with_a_module_in_it(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 2))
    torch.save({"epoch": 3, "model": module}, tmp_path / "m.pt")
    agrees(tmp_path / "m.pt", module, [torch.randn(2, 4)])


def test_a_class_of_the_users_own_needs_trust(package: Any, tmp_path: Path) -> None:
    module, path = package.Net(), tmp_path / "net.pt"
    torch.save(module, path)
    with pytest.raises(TNCompileError, match=r"a pickle that uses user_net\.Net: .*--trust-pickle .*tncompile\.save\("):
        load(path)
    agrees(path, module, [torch.randn(2, 6)], options(trust_pickle=True))


def test_trusted_but_not_importable(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    torch.save(package.Net(), path)
    sys.modules.pop("user_net")
    (tmp_path / "user_net.py").unlink()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    with pytest.raises(TNCompileError, match="in the module user_net, which is not installed"):
        load(path, options(trust_pickle=True))


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", ["zip", "old", "checkpoint", "parallel", "half", "safetensors", "folder"])
def test_weights_with_a_factory(kind: str, package: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, path = package.Net(), tmp_path / "weights.anything"
    state = module.state_dict()
    if kind == "half":  # stored in another dtype than the model computes in
        state = {k: v.half() for k, v in state.items()}
        module.load_state_dict(state)
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        files = {name: f"model-{k % 2}.safetensors" for k, name in enumerate(state)}
        for file in {*files.values()}:
            save_file({n: state[n] for n in files if files[n] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        content = {
            "checkpoint": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
            "parallel": {f"module.{k}": v for k, v in state.items()},
        }.get(kind, state)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    agrees(path, module, [torch.randn(2, 6)], options(model="user_net:Net"))
    with pytest.raises(TNCompileError, match=r"weights without a model; add --model package\.module:factory"):
        load(path)


def test_weights_that_do_not_fit_are_named(package: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"first.weight": torch.ones(5, 7), "first.bias": torch.ones(5), "extra": torch.ones(1)}, path)
    with pytest.raises(TNCompileError) as error:
        load(path, options(model="user_net:Net"))
    for part in (
        "missing in the file: second.weight, second.bias",
        "not in the model: extra",
        "first.weight is [5, 7] in the file and [5, 6] in the model",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("user_net", "write package.module:function"),
        ("nowhere_at_all:make", "no module nowhere_at_all"),
        ("user_net:Nat", "user_net has no Nat; it has Net, number, broken"),
        ("user_net:number", "gives int, not a torch.nn.Module"),
        ("user_net:broken", "calling it without arguments fails: RuntimeError: no such file"),
    ],
)
def test_factories_that_are_none(factory: str, said: str, package: Any, tmp_path: Path) -> None:
    torch.save(package.Net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(TNCompileError, match=said) as error:
        load(tmp_path / "w.pt", options(model=factory))
    assert "--model" in str(error.value)


def test_a_model_needs_no_factory(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(TNCompileError, match="leave out --model"):
        load(tmp_path / "m.pt", options(model="user_net:Net"))


# ------------------------------------------------------------------------------------ TorchScript


class Branches(nn.Module):
    """Loops, lists, dictionaries, branches on shapes and on numbers, and a state that calls change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.register_buffer("seen", torch.zeros(4))
        self.calls = 0
        self.memory = torch.zeros(0)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        kept = {"x": x}
        outputs = []
        for k, layer in enumerate(self.layers):
            kept[str(k)] = layer(kept["x"])
            if k % 2 == 0:
                outputs.append(torch.relu(kept[str(k)]))
        if len(self.memory) == 0:
            self.memory = torch.zeros([x.size(0), 4])
        self.memory = self.memory + x
        self.seen.add_(1)
        self.calls += 1
        return torch.cat(outputs, 1) * scale * self.calls + self.memory.repeat(1, 2) + self.seen.sum()


def script(module: nn.Module, path: Path, *example: torch.Tensor, freeze: bool = False) -> None:
    module.eval()
    made = torch.jit.trace(module, example, check_trace=False) if example else torch.jit.script(module)
    torch.jit.save(torch.jit.freeze(made) if freeze else made, path)


def test_torchscript_is_a_function_of_its_inputs_from_its_saved_state(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    script(Branches(), path)
    program = load(path)
    x = torch.randn(3, 4)
    for args in (x, torch.cat([x, x])):
        expected = torch.jit.load(path)(args)  # a fresh one: this call changes its state
        for _ in range(2):
            torch.testing.assert_close(program.module()(args), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["script", "trace", "frozen"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "lstm"])
def test_torchscript_of_usual_layers(name: str, way: str, tmp_path: Path) -> None:
    make, shape, _ = PLAIN[name]
    assert shape is not None
    module, path, x = make(), tmp_path / "m.pt", torch.randn(shape)
    if name == "lstm" and way != "trace":
        pytest.skip("torch.jit.script gives a bare LSTM two methods in place of forward")
    script(module, path, *([x] if way == "trace" else []), freeze=way == "frozen")
    shapes = ",".join(["batch", *map(str, shape[1:])])
    assert agrees(path, module, [x], options(f"image:float32[{shapes}]")).range_constraints


def test_torchscript_that_refuses_its_inputs(tmp_path: Path) -> None:
    class Strict(nn.Module):
        def forward(self, x: torch.Tensor, rate: int) -> torch.Tensor:
            if x.shape[1] != 512:
                raise ValueError("512 samples, please")
            return x * rate

    path = tmp_path / "m.pt"
    script(Strict(), path)
    with pytest.raises(TNCompileError, match=r"refuses these inputs: 512 samples, please \(traced with --input"):
        load(path, options("x:[batch,500]", "rate=3"))
    with pytest.raises(TNCompileError, match=r"needs further inputs; add --input rate=VALUE \(its type is int\)"):
        load(path, options("x:[batch,512]"))
    program = load(path, options("x:[batch,512]", "rate=3"))
    torch.testing.assert_close(program.module()(torch.ones(5, 512)), torch.full((5, 512), 3.0))


# ----------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x:float32[batch,3,224]", InputSpec("x", "float32", ("batch", 3, 224))),
        ("x[batch, 3]", InputSpec("x", "float32", ("batch", 3))),
        ("int64[batch]<10", InputSpec("", "int64", ("batch",), limit=10)),
        ("[2,2]", InputSpec("", "float32", (2, 2))),
        ("x:[]", InputSpec("x", "float32", ())),
        ("x:half[b,h=64]", InputSpec("x", "float16", ("b", "h"), (("h", 64),))),
        ("rate=16000", InputSpec("rate", fixed=True, value=16000)),
        ("mask=None", InputSpec("mask", fixed=True, value=None)),
        ("p=0.5", InputSpec("p", fixed=True, value=0.5)),
    ],
)
def test_inputs_are_read(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    "text", ["x", "x:float32", "x:[a,]", "x:[-1]", "x:[0]", "x:float31[2]", "x:[2]<3", "x:[2", "", "x:[?]"]
)
def test_inputs_that_cannot_be_read(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TNCompileError, match="input"):
        parse_input(text)
    with pytest.raises(SystemExit) as usage:
        main(["model.pt", "-o", "out.onnx", "--input", text])
    assert usage.value.code == 2
    assert "argument --input" in capsys.readouterr().err


words = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda w: w not in ("float", "double", "half", "long", "int", "bool")
)


@given(name=words, dims=st.lists(st.integers(1, 999) | words, max_size=5), dtype=st.sampled_from(["float32", "int64"]))
def test_inputs_print_as_they_are_read(name: str, dims: list[int | str], dtype: str) -> None:
    spec = InputSpec(name, dtype, tuple(dims))
    assert parse_input(str(spec)) == spec


def test_inputs_of_a_module_by_name_by_place_and_wrong(package: Any, tmp_path: Path) -> None:
    torch.save(package.Net().state_dict(), tmp_path / "w.pt")
    two = load(tmp_path / "w.pt", options("x:[batch,6]", "scale:[batch,3]", model="user_net:Net"))
    assert two.graph_signature.user_inputs == ("x", "scale")
    placed = load(tmp_path / "w.pt", options("[batch,6]", "[batch,3]", model="user_net:Net"))
    assert placed.graph_signature.user_inputs == ("x", "scale")
    for inputs, said in (
        (["y:[batch,6]", "x:[batch,6]"], "no input y; its inputs are x, scale"),
        (["x:[batch,6]", "x:[batch,6]"], "given twice"),
        (["[batch,6]"] * 3, "3 inputs are given; the model has 2: x, scale"),
        (["scale:[batch,3]"], 'needs further inputs; add --input "x:float32'),
        (["x:[n=3,6]", "scale:[n=4,3]"], "the dynamic size n is given as 3 and as 4"),
        (["x:[batch,7]"], r"\(traced with --input"),
    ):
        with pytest.raises(TNCompileError, match=said):
            load(tmp_path / "w.pt", options(*inputs, model="user_net:Net"))


def test_shapes_that_cannot_be_told_name_the_flag(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv1d(4, 2, 3, groups=2)), tmp_path / "m.pt")
    with pytest.raises(
        TNCompileError, match=r'Conv1d, .*add --input "input:float32\[batch,4,LENGTH\]" with your sizes'
    ):
        load(tmp_path / "m.pt")


def test_layers_behind_the_first_tell_what_an_input_is(tmp_path: Path) -> None:
    """A linear layer takes any number of axes; one sequence is what an LSTM takes as well, and is no batch."""
    torch.save(nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3, batch_first=True)), tmp_path / "lstm.pt")
    with pytest.raises(TNCompileError, match=r'add --input "input:float32\[batch,SEQ,6\]"'):
        load(tmp_path / "lstm.pt")
    torch.save(nn.Sequential(nn.Linear(6, 4), nn.AvgPool2d((2, 1))), tmp_path / "pooled.pt")
    (spec,) = load(tmp_path / "pooled.pt").graph.find_nodes(op="placeholder", target="input")
    assert spec.meta["val"].ndim == 3


MANY = """
from dataclasses import dataclass
from collections import OrderedDict
import torch

class Ids(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cores, self.last = torch.nn.Parameter(torch.ones(9, 4)), torch.nn.Linear(4, 2)

    def forward(self, ids):
        return self.last(self.cores[ids])

class Text(torch.nn.Module):
    main_input_name = "input_ids"

    def __init__(self, size=7):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(size, 4), torch.nn.Embedding(5, 4)

    def forward(self, mask=None, input_ids=None):
        return self.words(input_ids)

def sized(size):
    return Text(size)

def whole():
    return Text()

def branching():
    return Branching()

class Branching(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x
"""


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with several models."""
    (tmp_path / "many_nets.py").write_text(MANY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import many_nets

    yield many_nets
    sys.modules.pop("many_nets", None)


def test_ids_are_not_guessed_from_a_later_layer(many: Any, tmp_path: Path) -> None:
    torch.save(many.Ids(), tmp_path / "m.pt")
    with pytest.raises(TNCompileError, match=r'add --input "ids:int64\[batch,seq\]<ROWS" with your sizes'):
        load(tmp_path / "m.pt", options(trust_pickle=True))


def test_the_flag_for_a_model_that_may_be_given_much(many: Any, tmp_path: Path) -> None:
    """As transformers' models: every argument has a default, and the class says which one it is of."""
    torch.save(many.Text(), tmp_path / "m.pt")
    said = r'add --input "input_ids:int64\[batch,seq\]<7" with your sizes \(it also takes mask\)'
    with pytest.raises(TNCompileError, match=said):
        load(tmp_path / "m.pt", options(trust_pickle=True))


def test_the_makers_of_a_module_come_before_what_it_imports(many: Any, tmp_path: Path) -> None:
    torch.save(many.Text().state_dict(), tmp_path / "w.pt")
    said = "has no nope; it has Ids, Text, whole, branching, Branching, sized, dataclass, OrderedDict"
    with pytest.raises(TNCompileError, match=said):
        load(tmp_path / "w.pt", options(model="many_nets:nope"))


def test_a_branch_on_computed_numbers_is_told_with_its_line(
    many: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(many.Branching(), tmp_path / "m.pt")
    with pytest.raises(
        TNCompileError, match=r"(?s)hangs on numbers .*torch\.where.*many_nets\.py:\d+.*if x\.sum"
    ) as raised:
        load(tmp_path / "m.pt", options("x:[batch,3]", trust_pickle=True))
    assert "--input" not in str(raised.value)
    with pytest.raises(TNCompileError, match=r"many_nets\.py"):
        tncompile.save(many.Branching(), (torch.randn(3, 3),), tmp_path / "n.pt")
    assert capfd.readouterr() == ("", "")


def test_a_told_size_that_the_model_fixes_must_be_given(tmp_path: Path) -> None:
    torch.save(nn.LSTM(6, 4, batch_first=True), tmp_path / "m.pt")
    with pytest.raises(
        TNCompileError, match=r'fixes seq when it is traced; add --input "input:float32\[batch,SEQ,6\]"'
    ):
        load(tmp_path / "m.pt")


def test_a_size_that_the_model_fixes_is_said(tmp_path: Path) -> None:
    torch.save(nn.LSTM(6, 4, batch_first=True), tmp_path / "m.pt")
    with pytest.warns(TNCompileWarning, match="the model fixes seq to 5: it cannot be traced otherwise"):
        load(tmp_path / "m.pt", options("x:[batch,seq=5,6]"))


def test_a_file_that_has_its_shapes_is_only_checked(tmp_path: Path) -> None:
    tncompile.save(nn.Linear(4, 2).eval(), torch.ones(1, 4), tmp_path / "m.pt")
    assert detect(tmp_path / "m.pt") == "exported program"
    load(tmp_path / "m.pt", options("input:float32[batch,4]"))
    for text in ("input:float32[batch,5]", "input:int64[batch,4]", "input:[4]", "input=3"):
        with pytest.raises(TNCompileError, match=r"its input input is float32\[dynamic,4\], not .*leave out --input"):
            load(tmp_path / "m.pt", options(text))
    with pytest.raises(TNCompileError, match="no input y; its inputs are input"):
        load(tmp_path / "m.pt", options("y:[batch,4]"))


def test_save_writes_whole_files_that_compile(tmp_path: Path) -> None:
    with pytest.raises(TNCompileError, match="does not exist; make it first"):
        tncompile.save(nn.Linear(4, 2), torch.ones(1, 4), tmp_path / "nowhere" / "m.pt")
    module = nn.Sequential(nn.Linear(4, 2)).eval()
    tncompile.save(module, (torch.ones(2, 4),), tmp_path / "m.pt")
    x = torch.randn(5, 4)
    result = tncompile.compile_file(tmp_path / "m.pt", batch=4).run(x)
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_every_command_takes_the_same_flags(package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(package.Net().state_dict(), tmp_path / "w.pt")
    flags = ["--model", "user_net:Net", "--input", "x:float32[batch,6]"]
    outputs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for out in outputs:
        assert main([str(tmp_path / "w.pt"), "-o", str(out), "--batch", "1,4", "-q", *flags]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert main(["inspect", str(tmp_path / "w.pt"), *flags]) == 0
    assert "first.weight" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "w.pt"), str(outputs[0]), *flags]) == 0
    assert "passed" in capsys.readouterr().out
