"""One small whole file of every kind that the command line reads, and the arguments that read it."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import tncompile
from tncompile.cost.devices import default_profile

FACTORY = "tests.robustness.seeds:network"
INPUT = "input:float32[batch,6]"


@dataclass(frozen=True)
class Seed:
    """Files by name; the one called `target` is damaged, and `arguments` make the command line read it.

    `format` says what the target is made of: ``zip``, ``pickle``, ``json``, ``protobuf``, ``safetensors`` or ``bytes``.
    """

    files: Mapping[str, bytes]
    target: str
    format: str
    arguments: tuple[str, ...]


class Train(torch.nn.Module):
    """A layer as a tensor train of two cores: a network and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(2, 2, 3))
        self.second = torch.nn.Parameter(torch.randn(3, 3, 2))
        self.bias = torch.nn.Parameter(torch.randn(4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        cores = torch.einsum("zab,apr,rbq->zpq", input.reshape(-1, 2, 3), self.first, self.second)
        return cores.reshape(-1, 4) + self.bias


def network() -> torch.nn.Module:
    """What weights go into."""
    return Train().eval()


def layers() -> torch.nn.Module:
    """Layers of torch's own, as pickled modules may hold."""
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).eval()


def seeds() -> dict[str, Seed]:
    """Every kind by name. The same bytes each time, up to what torch's writers vary."""
    torch.manual_seed(0)
    exported = _exported(network())
    state = network().state_dict()
    first, second = {"first": state["first"]}, {"second": state["second"], "bias": state["bias"]}
    weights = ("--model", FACTORY)
    index = json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": {"first": "1.st", "second": "2.bin", "bias": "2.bin"}}
    ).encode()
    shards = {"index.json": index, "1.st": _safetensors(first), "2.bin": _saved(second)}
    external = _external()
    profile = default_profile().to_json().encode()
    compiled = tncompile.compile(network(), (torch.randn(2, 6),)).onnx
    example = _npz(input=np.ones((2, 6), np.float32))
    given = {"model.pt": exported}
    both = {"model.pt": exported, "out.onnx": compiled}
    return {
        "exported program": _compiled({"model.pt": exported}, "zip"),
        "exported with opaque nodes": _compiled({"model.pt": _exported(layers())}, "zip"),
        "module": _compiled({"model.pt": _saved(layers())}, "zip"),
        "old module": _compiled({"model.pt": _saved(layers(), False)}, "pickle"),
        "state_dict": _compiled({"model.pt": _saved(state)}, "zip", *weights, "--input", INPUT),
        "old state_dict": _compiled({"model.pt": _saved(state, False)}, "pickle", *weights, "--input", INPUT),
        "safetensors": _compiled({"model.st": _safetensors(state)}, "safetensors", *weights, "--input", INPUT),
        "index of shards": _compiled(shards, "json", *weights, "--input", INPUT),
        "shard": Seed(shards, "1.st", "safetensors", ("index.json", *weights, "--input", INPUT)),
        "TorchScript": _compiled({"model.pt": _scripted()}, "zip", "--input", INPUT),
        "ONNX": _compiled({"model.onnx": _onnx().SerializeToString()}, "protobuf"),
        "ONNX with external data": _compiled(external, "protobuf"),
        "external data": Seed(external, "weights.bin", "bytes", ("model.onnx",)),
        "compiled file": _compiled({"model.onnx": compiled}, "protobuf"),
        "inspect": Seed({"model.onnx": compiled}, "model.onnx", "protobuf", ("inspect", "model.onnx")),
        "verify": Seed(both, "out.onnx", "protobuf", ("verify", "model.pt", "out.onnx", "--batch", "2")),
        "example": Seed({**given, "example.npz": example}, "example.npz", "zip", (*given, "--example", "example.npz")),
        "device profile": Seed(
            {**given, "profile.json": profile}, "profile.json", "json", (*given, "--profile", "profile.json")
        ),
    }


def _compiled(files: Mapping[str, bytes], format: str, *arguments: str) -> Seed:
    target = next(iter(files))
    return Seed(files, target, format, (target, *arguments))


def _exported(module: torch.nn.Module) -> bytes:
    return _written(lambda path: tncompile.save(module, (torch.randn(2, 6),), path))


def _saved(content: object, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def _scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layers()), buffer)
    return buffer.getvalue()


def _safetensors(weights: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in weights.items()})


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _onnx() -> onnx.ModelProto:
    """Layers of each sort: a matmul, a convolution, a graph inside a node, attributes of several types."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)

    def branch(name: str, op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [result])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Gemm", ["r", "m", "b"], ["g"], alpha=0.5, transB=1),
        helper.make_node("Softmax", ["g"], ["a"], axis=-1),
        helper.make_node("ReduceSum", ["a"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg")),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [
            weight("w", 2, 2, 3, 3),
            weight("m", 4, 18),
            weight("b", 4),
            weight("zero"),
            numpy_helper.from_array(np.array([-1, 18]), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _external() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save_model(_onnx(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def _written(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()
