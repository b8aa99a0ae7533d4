"""Run a TorchScript graph node by node: what it does to tensors are torch's own operators, the rest is Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tncompile.errors import UnsupportedError
from tncompile.frontend.script.choices import QUESTIONS, Choices
from tncompile.frontend.script.numbers import CHANGE_CONTAINERS, OF_CONTAINERS, ON_NUMBERS

#: operators of torch itself that read or write files
TOUCHES_FILES = {"aten::from_file", "aten::save"}
_NAMESPACES = ("aten", "prim", "prims")


@dataclass
class Answers:
    """What numbers were read out of tensors in one run with real numbers, in the order of the questions.

    A trace is given the same ones. `choices` follows those that hang on the inputs while they are recorded.
    """

    choices: Choices = field(default_factory=Choices)
    given: list[Any] = field(default_factory=list)
    next: int = 0
    recording: bool = True


class Graph:
    """The graph of a method with all that it calls put in its place, and its constants."""

    def __init__(self, method: Any) -> None:
        self.graph = method.graph.copy()
        torch._C._jit_pass_inline(self.graph)
        self.constants: dict[str, Any] = {}
        self._collect(self.graph)
        #: those that are one number, by the id of their tensor
        self.numbers = {id(t): t.item() for t in self.constants.values() if isinstance(t, torch.Tensor) and t.ndim == 0}

    def _collect(self, block: Any) -> None:
        for node in block.nodes():
            if node.kind() == "prim::Constant":
                self.constants[node.output().debugName()] = node.output().toIValue()
            for inner in node.blocks():
                self._collect(inner)


class Runner:
    """One call of a module's method.

    `attribute(path)` gives the initial value of an attribute; what the call itself sets is kept here and is gone
    after it. So a call computes what the module computes in the state it was saved in.
    """

    def __init__(self, graph: Graph, attribute: Callable[[str], Any], answers: Answers) -> None:
        self.graph = graph
        self.attribute = attribute
        self.answers = answers
        self.choices = answers.choices if answers.recording else None
        self.state: dict[str, Any] = {}

    def call(self, args: Iterable[Any]) -> Any:
        """The graph's result on all its inputs but the first, which is the module itself."""
        env = dict(self.graph.constants)
        for value, arg in zip(self.graph.graph.inputs(), (Path(""), *args), strict=True):
            env[value.debugName()] = arg
        results = self._block(self.graph.graph, env)
        if self.choices is not None:
            self.choices.returned(_names(self.graph.graph.outputs()))
        return results[0] if len(results) == 1 else tuple(results)

    def _block(self, block: Any, env: dict[str, Any]) -> list[Any]:
        for node in block.nodes():
            results = self._node(node, env)
            env.update(zip(_names(node.outputs()), results, strict=True))
        return [env[name] for name in _names(block.outputs())]

    def _node(self, node: Any, env: dict[str, Any]) -> list[Any]:
        kind = node.kind()
        if kind == "prim::Constant":
            return [env[node.output().debugName()]]
        if kind == "prim::If":
            return self._branch(node, env)
        if kind == "prim::Loop":
            return self._loop(node, env)
        inputs = _names(node.inputs())
        args = [env[name] for name in inputs]
        if kind == "prim::GetAttr":
            return [self._get(args[0], node.s("name"), _names(node.outputs()))]
        if kind == "prim::SetAttr":
            path = args[0].join(node.s("name"))
            self.state[path] = args[1]
            self._passed_on(inputs[1:], [_attribute(path)])
            return []
        if kind in _STRUCTURE:
            self._passed_on(inputs, _names(node.outputs()))
            result = _STRUCTURE[kind](node, args)
            return [*result] if kind in ("prim::TupleUnpack", "prim::ListUnpack", "prim::ConstantChunk") else [result]
        if kind == "prim::RaiseException":
            raise UnsupportedError(f"the model refuses these inputs: {args[0] or 'it raises an error'}")
        result = self._operator(node, kind, args)
        return [] if node.outputsSize() == 0 else [*result] if node.outputsSize() > 1 else [result]

    def _branch(self, node: Any, env: dict[str, Any]) -> list[Any]:
        (condition,) = _names(node.inputs())
        blocks = [*node.blocks()]
        taken = 0 if env[condition] else 1
        if self.choices is not None:
            self.choices.branch(node, condition, taken)
        results = self._block(blocks[taken], env)
        self._each_passed_on(_names(blocks[taken].outputs()), _names(node.outputs()))
        return results

    def _loop(self, node: Any, env: dict[str, Any]) -> list[Any]:
        trips_name, going_name, *names = _names(node.inputs())
        trips, going, *carried = (env[name] for name in (trips_name, going_name, *names))
        (block,) = node.blocks()
        index_name, *carried_names = _names(block.inputs())
        step = 0
        while True:
            if self.choices is not None and not self.choices.numbers.isdisjoint((trips_name, going_name)):
                self.choices.chosen("a loop", node)
            if not (going and step < trips):
                break
            env[index_name] = step
            env.update(zip(carried_names, carried, strict=True))
            self._each_passed_on(names, carried_names)
            going, *carried = self._block(block, env)
            going_name, *names = _names(block.outputs())
            step += 1
        self._each_passed_on(names, _names(node.outputs()))
        return carried

    def _passed_on(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        if self.choices is not None:
            self.choices.passed_on(sources, targets)

    def _each_passed_on(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        if self.choices is not None:
            self.choices.renamed(dict(zip(targets, sources, strict=True)))

    def _get(self, owner: Any, name: str, outputs: Sequence[str]) -> Any:
        if not isinstance(owner, Path):
            raise UnsupportedError("the TorchScript file holds a class that is not a module; export the model instead")
        path = owner.join(name)
        self._passed_on([_attribute(path)], outputs)
        if path not in self.state:
            self.state[path] = self.attribute(path)
        return self.state[path]

    # -------------------------------------------------------------------------------- operators

    def _operator(self, node: Any, kind: str, args: list[Any]) -> Any:
        name = kind.partition("::")[2]
        inputs, outputs = _names(node.inputs()), _names(node.outputs())
        plain = self._numbers(name, args) if name in ON_NUMBERS else None
        if self.choices is not None and (plain is None or name in CHANGE_CONTAINERS):
            self.choices.number_used(node, inputs)
        if plain is not None:
            self._passed_on(inputs, outputs)
            return ON_NUMBERS[name](*plain)
        self._passed_on([], outputs)
        tensors = [*_tensors(args)]
        if name in QUESTIONS and tensors:
            return self._ask(node, kind, args, tensors)
        result = _call(node, kind, args)
        if self.choices is not None:
            self.choices.computed(name, tensors, _tensors([result]))
        return result

    def _numbers(self, name: str, args: list[Any]) -> list[Any] | None:
        """The arguments where Python computes with them; None where torch must."""
        if name in OF_CONTAINERS and (name in ("__is__", "__isnot__") or isinstance(args[0], (list, tuple, dict))):
            return args
        # a trace wraps the sizes that it computes with in tensors: a constant of one element is a number there
        plain = [self.graph.numbers.get(id(a), a) if isinstance(a, torch.Tensor) else a for a in args]
        if args and all(isinstance(a, torch.Tensor) for a in args):
            return None
        plain = plain[: _ARITHMETIC.get(name)]
        return None if [*_tensors(plain)] else plain

    def _ask(self, node: Any, kind: str, args: list[Any], tensors: list[torch.Tensor]) -> Any:
        """A number that hangs on values: noted in the run with real numbers, and taken from there while tracing."""
        answers = self.answers
        if not answers.recording:
            answers.next += 1
            return answers.given[answers.next - 1]
        value = _call(node, kind, args)
        answers.given.append(value)
        if answers.choices.hangs(tensors):
            answers.choices.numbers.update(_names(node.outputs()))
        return value


@dataclass(frozen=True)
class Path:
    """A submodule, by its dotted path; ``""`` is the module itself."""

    name: str

    def join(self, attribute: str) -> str:
        """The path of an attribute."""
        return f"{self.name}.{attribute}" if self.name else attribute


def _tensors(values: Any) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _names(values: Iterable[Any]) -> list[str]:
    """Names of values of the graph, each once in it."""
    return [value.debugName() for value in values]


def _attribute(path: str) -> str:
    """What an attribute is called among the values of the graph."""
    return f"self.{path}"


def _call(node: Any, kind: str, args: list[Any]) -> Any:
    """One of torch's own operators, in the overload that the graph names."""
    namespace, _, name = kind.partition("::")
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(*args)
    schema = node.schema()
    if namespace not in _NAMESPACES or schema == "(no schema)" or kind in TOUCHES_FILES:
        raise UnsupportedError(f"the TorchScript file calls {kind}, which cannot be compiled; export the model instead")
    overload = schema.partition("(")[0].partition("::")[2].partition(".")[2] or "default"
    try:
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError:
        raise UnsupportedError(
            f"the TorchScript file calls {schema.partition('(')[0]}, which this torch does not have"
        ) from None
    arguments = operator._schema.arguments
    values = [
        _as_tensor(value) if "Tensor" in str(argument.type) else value
        for argument, value in zip(arguments, args, strict=True)
    ]
    positional = [v for a, v in zip(arguments, values, strict=True) if not a.kwarg_only]
    named = {a.name: v for a, v in zip(arguments, values, strict=True) if a.kwarg_only}
    return operator(*positional, **named)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def _as_tensor(value: Any) -> Any:
    if not _is_number(value):
        return value
    return torch.scalar_tensor(value, dtype=torch.int64 if isinstance(value, (int, torch.SymInt)) else None)


def _tensor(data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
    return data.clone() if isinstance(data, torch.Tensor) else torch.tensor(data, dtype=_DTYPES.get(dtype, dtype))


def _chunk(node: Any, args: list[Any]) -> Any:
    return torch.chunk(args[0], node.i("chunks"), node.i("dim"))


def _dictionary(_: Any, args: list[Any]) -> dict[Any, Any]:
    return dict(zip(args[::2], args[1::2], strict=True))


#: how many operands count where a number is computed with: the scale of an addition does not
_ARITHMETIC = {"add": 2, "sub": 2, "add_": 2}

_STRUCTURE: Mapping[str, Callable[[Any, list[Any]], Any]] = {
    "prim::TupleConstruct": lambda _, args: tuple(args),
    "prim::ListConstruct": lambda _, args: [*args],
    "prim::DictConstruct": _dictionary,
    "prim::TupleUnpack": lambda _, args: args[0],
    "prim::ListUnpack": lambda _, args: args[0],
    "prim::TupleIndex": lambda _, args: args[0][args[1]],
    "prim::Uninitialized": lambda node, args: None,
    "prim::unchecked_cast": lambda _, args: args[0],
    "prim::unchecked_unwrap_optional": lambda _, args: args[0],
    "prim::NumToTensor": lambda _, args: args[0],
    "prim::ConstantChunk": _chunk,
    "prim::Print": lambda node, args: None,
}

_DTYPES: Mapping[Any, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}

_SPECIAL: Mapping[str, Callable[..., Any]] = {
    "aten::size": lambda x, *dim: x.shape[dim[0]] if dim else [*x.shape],
    "aten::is_autocast_enabled": lambda: False,
    "aten::dim": lambda x: x.ndim,
    "aten::len": len,
    "aten::numel": lambda x: x.numel(),
    "aten::tensor": _tensor,
    # what a trace records of every convolution; all behind the groups is about cuDNN
    "aten::_convolution": lambda *args: torch.ops.aten.convolution.default(*args[:9]),
    "aten::warn": lambda *_: None,
    "aten::is_floating_point": lambda x: x.is_floating_point(),
    "prim::dtype": lambda x: x.dtype,
    "prim::device": lambda x: x.device,
    "prim::layout": lambda x: x.layout,
    "prim::data": lambda x: x.detach(),
    # as when a module is traced: torch's fused layers are for inference alone, and have no ONNX operator
    "prim::requires_grad": lambda x: True,
    "aten::is_grad_enabled": lambda: True,
    "prim::is_cuda": lambda x: False,
    "prim::shape": lambda x: [*x.shape],
}
