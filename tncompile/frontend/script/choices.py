"""What a TorchScript call decides by the values of its inputs, and where that shapes the graph that is traced.

A trace has one way of each branch, one count of each loop and one value of each number: it computes what the script
does for inputs that decide alike. `Choices` follows the numbers that were read out of the inputs through one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: operators that read numbers out of tensors: a number that cannot stay symbolic
QUESTIONS = {"Bool", "Int", "Float", "IntImplicit", "FloatImplicit", "ScalarImplicit", "ComplexImplicit", "Complex"}
QUESTIONS |= {"item", "equal", "is_nonzero", "tolist", "allclose", "__contains__", "_local_scalar_dense"}
#: what is known of a tensor without its values, and tensors that have its shape alone
_SHAPE_ONLY = {"size", "dim", "len", "dtype", "device", "layout", "requires_grad", "numel", "is_cuda", "sym_size"}
_SHAPE_ONLY |= {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_SHAPE_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full"}
#: of whose further arguments only the shape or the dtype counts
_FIRST_ONLY = {"expand_as", "view_as", "reshape_as", "type_as"}


@dataclass(frozen=True)
class Choice:
    """A decision by values of the inputs: what is asked there, and the line of the script as the file has it.

    Of an assertion the compiled model takes for granted that it holds.
    """

    what: str
    line: str = ""
    assertion: bool = False

    def __str__(self) -> str:
        return f"{self.what} at {self.line}" if self.line else self.what


@dataclass
class Choices:
    """What hangs on the values of the inputs in one call, and the choices that it makes by them.

    `tensors` are those of the inputs and what was computed from them, by their memory, which views share, kept
    alive; `numbers` are names of values in the graph, and paths of attributes, whose number was read out of them.
    """

    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)
    made: list[Choice] = field(default_factory=list)

    @classmethod
    def by(cls, inputs: Iterable[Any]) -> Choices:
        """Of a call on these inputs."""
        return cls({_memory(t): t for t in inputs if isinstance(t, torch.Tensor)})

    def hangs(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether any of these tensors hangs on the inputs' values."""
        return any(_memory(t) in self.tensors for t in tensors)

    def computed(self, name: str, read: list[torch.Tensor], results: Iterable[torch.Tensor]) -> None:
        """Note what an operator of this name made of the tensors it read, the first of which it may write to."""
        if name in _SHAPE_ONLY or not self.hangs(read[:1] if name in _FIRST_ONLY else read):
            return
        written = read[:1] if name.endswith("_") else []
        self.tensors.update({_memory(t): t for t in (*results, *written)})

    def passed_on(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Note that the targets, values or attributes, are made of the sources and of nothing else."""
        targets = set(targets)
        if self.numbers.isdisjoint(sources):
            self.numbers -= targets
        else:
            self.numbers |= targets

    def renamed(self, sources: Mapping[str, str]) -> None:
        """Note values that are others under new names, ``{new: old}``."""
        found = {new for new, old in sources.items() if old in self.numbers}
        self.numbers = self.numbers - {*sources} | found

    def returned(self, names: Iterable[str]) -> None:
        """Note a choice where a result of the call is such a number."""
        if not self.numbers.isdisjoint(names):
            self.made.append(Choice("a number that it returns"))

    def chosen(self, what: str, node: Any) -> None:
        """Note a choice that shapes the graph."""
        self.made.append(Choice(what, _line(node)))

    def number_used(self, node: Any, names: Iterable[str]) -> None:
        """Note a choice where an operator takes a number that hangs on the inputs: the trace has it as a constant."""
        if not self.numbers.isdisjoint(names) and node.kind() != "aten::warn":
            self.chosen("a number", node)

    def branch(self, node: Any, condition: str, taken: int) -> None:
        """Note what way a branch took. No choice where neither way does anything that is seen later."""
        if condition not in self.numbers:
            return
        blocks = [*node.blocks()]
        if _raises(blocks[1 - taken]):
            self.made.append(Choice("an assertion", _line(node), assertion=True))
        elif node.outputsSize() or any(map(acts, blocks)):
            self.chosen("a branch", node)


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a layout without memory of this kind
        return id(tensor)


def _raises(block: Any) -> bool:
    """Whether a block of the graph ends in an exception, whatever it decides itself."""
    return any(
        node.kind() == "prim::RaiseException" or (node.kind() == "prim::If" and all(map(_raises, node.blocks())))
        for node in block.nodes()
    )


def acts(block: Any) -> bool:
    """Whether a block of the graph changes anything but its results: attributes, or tensors and lists in place."""
    return any(
        node.kind() == "prim::SetAttr" or "!" in node.schema() or any(map(acts, node.blocks()))
        for node in block.nodes()
    )


def _line(node: Any) -> str:
    """``code/__torch__/m.py:12 (if bool(_0):)``, of the source in the file."""
    lines: list[str] = node.sourceRange().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    if not places:
        return ""
    file, _, number = places[-1].removeprefix("File ").rstrip(":").partition(", line ")
    marks = [k for k, line in enumerate(lines) if k and line.strip().startswith("~")]
    code = lines[marks[0] - 1].strip() if marks else ""
    return file.strip('"') + (f":{number}" if number else "") + (f" ({code})" if code else "")


__all__ = ["QUESTIONS", "Choice", "Choices", "acts"]
