"""A cursor over one line of a program's text: the words, names, sizes and arguments that stand in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from tncompile.errors import ParseError, SourceRef
from tncompile.ir.core import Axis, Index
from tncompile.ir.dims import Dim
from tncompile.ir.opaque import Arg, Constant, Ref, Value
from tncompile.ir.tree import Tree

T = TypeVar("T")

NAME = re.compile(r"(?:[A-Za-z0-9_./*+-]|::)+")
INTEGER = re.compile(r"[+-]?[0-9]+")
FLOAT = re.compile(r"[+-]?(?:inf|nan|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")
SPELLING = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
WORD = re.compile(r"[A-Za-z0-9_.+-]+")
KEYWORD = re.compile(r"[A-Za-z]+(?![^\s#])|->")
LITERALS: dict[str, Arg] = {"None": None, "True": True, "False": False}
RESERVED = {*LITERALS, "inf", "nan", "constant"}
SOURCE = re.compile(r"(?:(?P<module>[^,:]*), )?(?P<file>.+?):(?P<line>[0-9]+)(?:: (?P<code>.*))?")


def is_plain_dim(text: str) -> bool:
    """Whether a symbolic size can stand without quotes."""
    plain = re.fullmatch(r"[A-Za-z0-9_*+/%(), -]+", text) and not INTEGER.fullmatch(text) and text == text.strip()
    return bool(plain) and _dim_end(text, 0) == len(text) and text.count("(") == text.count(")")


def _dim_end(text: str, start: int) -> int:
    """Where a size that starts at `start` ends: at a comma or bracket outside its own parentheses."""
    depth = 0
    for position in range(start, len(text)):
        char = text[position]
        depth += (char == "(") - (char == ")")
        if depth < 0 or char in '[]#"' or (char == "," and depth == 0):
            return position
    return len(text)


class Cursor:
    """A cursor over one line; what does not match raises a ParseError that points at it."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.text = text
        self.at = 0
        self._skip()

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def error(self, message: str, at: int | None = None) -> ParseError:
        """A ParseError at a column, by default the cursor's."""
        column = self.at if at is None else at
        return ParseError(f"line {self.number}, column {column + 1}: {message}\n{self.text}\n{' ' * column}^")

    def expected(self, what: str) -> ParseError:
        """A ParseError that says what should stand at the cursor, and what does."""
        found = re.match(r'"[^"]*"?|[A-Za-z0-9_.]+|->|.', self.text[self.at :])
        return self.error(f"expected {what}, found {found.group() if found else 'the end of the line'}")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """Take what matches at the cursor, if anything does."""
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        self._skip()
        return found.group()

    def accept(self, literal: str) -> bool:
        """Take `literal` if it stands at the cursor."""
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        self._skip()
        return True

    def expect(self, literal: str, what: str = "") -> None:
        if not self.accept(literal):
            raise self.expected(what or f"'{literal}'")

    def keyword(self, *choices: str) -> str | None:
        """Take the first word of the line if it is one of `choices`."""
        start = self.at
        word = self.match(KEYWORD)
        if word in choices:
            return word
        self.at = start
        return None

    def string(self) -> str | None:
        if not self.text.startswith('"', self.at):
            return None
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise self.error(f"not a JSON string: {error.msg}") from None
        self._skip()
        return str(value)

    def name(self, what: str) -> str:
        found = self.string()
        found = self.match(NAME) if found is None else found
        if found is None:
            raise self.expected(what)
        return found

    def integer(self, what: str) -> int:
        found = self.match(INTEGER)
        if found is None:
            raise self.expected(what)
        return int(found)

    def dim(self) -> Dim:
        quoted = self.string()
        if quoted is not None:
            return quoted
        start, end = self.at, _dim_end(self.text, self.at)
        found = self.text[start:end].strip()
        if not found:
            raise self.expected("a size")
        if not INTEGER.fullmatch(found) and not is_plain_dim(found):
            raise self.error(f"{found} is not a size")
        self.at = end
        return int(found) if INTEGER.fullmatch(found) else found

    def items(self, close: str, item: Callable[[], T]) -> tuple[T, ...]:
        """Items with commas between them, up to `close`."""
        if self.accept(close):
            return ()
        found = [item()]
        while not self.accept(close):
            self.expect(",", f"',' or '{close}'")
            found.append(item())
        return tuple(found)

    def value(self) -> Value:
        name = self.name("a name")
        self.expect(":")
        dtype = self.name("a dtype")
        return Value(name, dtype, self.items("]", self.dim) if self.accept("[") else None)

    def axis(self, indices: Mapping[str, Index]) -> Axis:
        def index() -> Index:
            at = self.at
            name = self.name("an index, or a group of them in parentheses")
            if name not in indices:
                raise self.error(f"index {name} is not in the line 'indices' of this network", at)
            return indices[name]

        if not self.accept("("):
            return (index(),)
        group = []
        while not self.accept(")"):
            group.append(index())
        return tuple(group)

    def tree(self) -> Tree:
        if not self.accept("("):
            return self.integer("a tensor's number or '('")
        branches = []
        while not self.accept(")"):
            branches.append(self.tree())
        return tuple(branches)

    def arg(self) -> Arg:
        if self.accept("%"):
            return Ref(self.name("the name of a value or a weight"))
        if self.accept("["):
            return self.items("]", self.arg)
        string = self.string()
        if string is not None:
            return string
        at = self.at
        word = self.match(WORD)
        if word is None:
            raise self.expected("an argument")
        if word == "constant":
            string = self.string()
            if string is None:
                raise self.expected("the constant's spelling as a string")
            return Constant(string)
        if word in LITERALS:
            return LITERALS[word]
        if INTEGER.fullmatch(word):
            return int(word)
        if FLOAT.fullmatch(word):
            # one NaN object, so that programs that have it compare equal
            return math.nan if word.endswith("nan") else float(word)
        if SPELLING.fullmatch(word):
            return Constant(word)
        raise self.error(f"{word} is not a number, a name or a string", at)

    def end(self) -> SourceRef:
        """Nothing but a comment may follow; the source that it names."""
        if not self.accept("#"):
            if self.at < len(self.text):
                raise self.expected("the end of the line")
            return SourceRef()
        comment = self.text[self.at :].strip()
        found = SOURCE.fullmatch(comment)
        if found is None:
            return SourceRef(module=comment)
        return SourceRef(found["module"] or "", found["file"], int(found["line"]), found["code"] or "")
