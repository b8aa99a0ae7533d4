"""The parser of a program's text; `tncompile.ir.text` describes the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tncompile.errors import ParseError
from tncompile.ir.core import Array, Index, Network, Node, Program, Slice, Step, Switch, Tensor, Term, Window
from tncompile.ir.cursor import NAME, Cursor
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Arg, Opaque, Value
from tncompile.ir.tree import Tree


def parse(text: str, arrays: Mapping[str, Array] | None = None) -> Program:
    """The program of a text that `dump` wrote.

    `arrays` gives the numbers of weights and cores by name (`Program.arrays` has them); without it, each is a
    read-only array of zeros that takes no memory. ParseError says where the text is wrong, and how.
    """
    return _Parser(text, arrays).program()


def _shape(shape: tuple[Dim, ...] | None) -> str:
    return "none" if shape is None else f"[{', '.join(map(str, shape))}]"


class _Parser:
    """Reads a program line by line; the first word of a line says what it is."""

    def __init__(self, text: str, arrays: Mapping[str, Array] | None) -> None:
        lines = [Cursor(number, line.rstrip()) for number, line in enumerate(text.split("\n"), start=1)]
        self.lines = [line for line in lines if line.at < len(line.text) and line.text[line.at] != "#"]
        self.position = 0
        self.given = arrays
        self.arrays: dict[str, Array] = {}

    def line(self, *keywords: str) -> tuple[str, Cursor] | None:
        """The next line if it starts with one of `keywords`."""
        if self.position < len(self.lines):
            line = self.lines[self.position]
            keyword = line.keyword(*keywords)
            if keyword is not None:
                self.position += 1
                return keyword, line
        return None

    def missing(self, what: str) -> ParseError:
        """A ParseError for a line that is not what it should be, or not there."""
        if self.position < len(self.lines):
            return self.lines[self.position].expected(what)
        last = self.lines[-1] if self.lines else Cursor(1, "")
        last.at = len(last.text)
        return last.error(f"expected {what}, found the end of the text")

    def program(self) -> Program:
        header = self.line("program")
        if header is None:
            raise self.missing("'program'")
        header[1].end()
        inputs: list[Value] = []
        nodes: list[Node] = []
        outputs: list[tuple[str, str]] = []
        weights: dict[str, Array] = {}
        while found := self.line("input", "weight", "network", "opaque", "switch", "output"):
            keyword, line = found
            if keyword == "input":
                inputs.append(line.value())
                line.end()
            elif keyword == "weight":
                at, value = line.at, line.value()
                line.end()
                if value.name in weights:
                    raise line.error(f"weight {value.name} is there twice", at)
                weights[value.name] = self.array(value.name, value.dtype, value.shape, line, at)
            elif keyword == "output":
                public = line.name("a name")
                line.expect("=")
                outputs.append((public, line.name("the name of a value")))
                line.end()
            else:
                nodes.append(self.node(keyword, line))
        if self.position < len(self.lines):
            raise self.missing("'input', 'weight', 'network', 'opaque', 'switch' or 'output'")
        return Program(tuple(inputs), tuple(nodes), tuple(outputs), weights)

    def array(self, name: str, dtype: str, shape: tuple[Dim, ...] | None, line: Cursor, at: int) -> Array:
        """The numbers of a weight or a core: those given, or zeros without memory; one array for one name."""
        sizes = [s for s in shape or () if isinstance(s, int) and s >= 0]
        if shape is None or len(sizes) < len(shape):
            raise line.error(f"{name} needs a shape of numbers, not {_shape(shape)}", at)
        try:
            wanted = np.dtype(dtype)
        except TypeError:
            raise line.error(f"{dtype} is not a dtype of numpy", at) from None
        if name not in self.arrays:
            if self.given is None:
                self.arrays[name] = np.broadcast_to(np.zeros((), wanted), sizes)
            elif name in self.given:
                self.arrays[name] = self.given[name]
            else:
                raise line.error(f"no array is given for {name}", at)
        array = self.arrays[name]
        if array.dtype != wanted or array.shape != tuple(sizes):
            found = f"{array.dtype}{_shape(array.shape)}"
            raise line.error(f"the array {name} is {found}, not {dtype}{_shape(shape)}", at)
        return array

    def opaque(self, line: Cursor) -> Opaque:
        value, name = self.header(line)
        line.expect("=")
        target = line.name("the name of an operation")
        line.expect("(")
        kwargs: list[tuple[str, Arg]] = []

        def argument() -> Iterable[Arg]:
            at = line.at
            key = line.string() if line.text.startswith('"', at) else line.match(NAME)
            if key is not None and line.accept("="):
                kwargs.append((key, line.arg()))
                return ()
            line.at = at
            if kwargs:
                raise line.expected("a keyword argument")
            return (line.arg(),)

        args = tuple(a for found in line.items(")", argument) for a in found)
        return Opaque(name, target, args, tuple(kwargs), value, line.end())

    def node(self, keyword: str, line: Cursor) -> Node:
        if keyword == "network":
            return self.network(line)
        return self.opaque(line) if keyword == "opaque" else self.switch(line)

    def switch(self, header: Cursor) -> Switch:
        symbol = header.name("a symbolic size")
        header.expect("<=")
        limits = [header.integer("a size")]
        while header.accept(","):
            at = header.at
            limits.append(header.integer("a size"))
            if limits[-1] <= limits[-2]:
                raise header.error("the limits of a switch increase", at)
        header.end()
        cases = []
        for _ in range(len(limits) + 1):
            found = self.line("network")
            if found is None:
                raise self.missing("'network', a case of the switch")
            cases.append(self.network(found[1]))
        return Switch(symbol, tuple(limits), tuple(cases))

    def header(self, line: Cursor) -> tuple[Value, str]:
        value = line.value()
        if not line.accept(","):
            return value, ""
        if line.keyword("layer") is None:
            raise line.expected("'layer'")
        return value, line.name("a layer's name")

    def network(self, header: Cursor) -> Network:
        at = header.at
        value, name = self.header(header)
        source = header.end()
        indices = self.indices()
        terms = []
        while found := self.line("term"):
            found[1].end()
            terms.append(self.term(value.dtype, indices))
        found = self.line("->")
        if found is None:
            raise self.missing("'term' or '->'" if not terms else "a tensor, 'order', 'steps', 'term' or '->'")
        output = self.tensor(found[1], indices, None)
        if output.name != value.name or output.shape != value.shape:
            axes = f"{output.name} of shape {_shape(output.shape)}"
            raise header.error(f"{value.name} has shape {_shape(value.shape)}, the line '->' says {axes}", at)
        return Network(name, tuple(terms), output, value.dtype, source)

    def indices(self) -> dict[str, Index]:
        found = self.line("indices")
        if found is None:
            return {}
        line = found[1]
        indices: dict[str, Index] = {}
        while True:
            at = line.at
            name = line.name("an index")
            line.expect("=")
            if name in indices:
                raise line.error(f"index {name} is there twice", at)
            indices[name] = Index(name, line.dim())
            if not line.accept(","):
                line.end()
                return indices

    def tensor(self, line: Cursor, indices: Mapping[str, Index], core_dtype: str | None) -> Tensor:
        """A tensor with its axes, and with its numbers if it is a core."""
        at = line.at
        name = line.name("a tensor's name")
        line.expect("[")
        tensor = Tensor(name, line.items("]", lambda: line.axis(indices)))
        line.end()
        if core_dtype is None:
            return tensor
        return Tensor(name, tensor.axes, self.array(name, core_dtype, tensor.shape, line, at))

    def term(self, dtype: str, indices: Mapping[str, Index]) -> Term:
        tensors: list[Tensor] = []
        while (line := self.numbered(len(tensors))) is not None:
            kind = line.keyword("core", "operand")
            if kind is None:
                raise line.expected("'core' or 'operand'")
            tensors.append(self.tensor(line, indices, dtype if kind == "core" else None))
        windows: list[Window] = []
        while found := self.line("window"):
            windows.append(self.window(found[1]))
        order: Tree = ()
        if found := self.line("order"):
            order = found[1].tree()
            found[1].end()
        slices = self.slices()
        steps: list[Step] | None = None
        if found := self.line("steps"):
            found[1].end()
            steps = []
            while (line := self.numbered(len(tensors) + len(steps))) is not None:
                steps.append(self.step(line))
        return Term(tuple(tensors), order, None if steps is None else tuple(steps), slices, tuple(windows))

    def window(self, line: Cursor) -> Window:
        axis = line.name("an index of the operand")
        line.expect(",")
        kernel = line.name("an index of a kernel")
        line.expect("->")
        out = line.name("an index of the output")
        numbers: list[int] = []
        for name, count in (("stride", 1), ("dilation", 1), ("padding", 2)):
            line.expect(",")
            line.expect(name)
            line.expect("=")
            numbers += [line.integer("a number") for _ in range(count)]
        line.end()
        stride, dilation, before, after = numbers
        return Window(axis, kernel, out, stride, dilation, (before, after))

    def slices(self) -> tuple[Slice, ...]:
        """The line ``slices``, if it is there."""
        found = self.line("slices")
        slices: list[Slice] = []
        while found is not None:
            name = found[1].name("an index")
            found[1].expect("=")
            slices.append(Slice(name, found[1].integer("a count")))
            if not found[1].accept(","):
                found[1].end()
                break
        return tuple(slices)

    def numbered(self, number: int) -> Cursor | None:
        """The next line if it starts with a number, which has to be `number`."""
        line = self.lines[self.position] if self.position < len(self.lines) else None
        if line is None or not line.text[line.at].isdigit():
            return None
        at = line.at
        if line.integer("a number") != number:
            raise line.error(f"expected the number {number}", at)
        self.position += 1
        return line

    def step(self, line: Cursor) -> Step:
        line.expect("=")
        form = line.name("the form of a step")
        line.expect("(")
        left = line.integer("a number")
        line.expect(",")
        right = line.integer("a number")
        line.expect(")")
        line.expect("->")
        line.expect("[")
        order = line.items("]", lambda: line.name("an index"))
        line.end()
        return Step(left, right, form, order)
