"""Programs of text, compiled and compared with numpy."""

from __future__ import annotations

from collections import Counter

from tests.helpers import Compiled, assert_exact, compile_program, feeds_for, nodes_of, program_of, reference
from tncompile.passes import Clean, Context, Order

RUNS = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 5}, {"batch": 4, "seq": 2})
ROUNDINGS = 64


def emit(text: str, passes: tuple[Clean | Order, ...] | None = None, **fill: float) -> Compiled:
    """Compile a program and compare it with numpy at three sizes."""
    program = program_of(text, **fill)
    context = Context(batches=(1, 7), sizes={"seq": 5})
    compiled = compile_program(program, context) if passes is None else compile_program(program, context, passes)
    for symbols in RUNS:
        feeds = feeds_for(program, symbols)
        found = compiled.run(feeds)
        expected, magnitude = (reference(program, feeds, symbols, absolute) for absolute in (False, True))
        for (_, name), (public, array) in zip(program.outputs, found.items(), strict=True):
            dtype = program.values[name].dtype
            what = f"{public} at {symbols}"
            assert_exact(array, expected[name], magnitude[name], dtype, roundings=ROUNDINGS, what=what)
    return compiled


def count(compiled: Compiled) -> Counter[str]:
    """How often each operator is in the file."""
    return Counter(node.op_type for node in nodes_of(compiled.model.graph))


def network(body: str, shape: str, inputs: str = "x: float32[batch, 6]", dtype: str = "float32") -> str:
    """The text of a program of one network ``y``; `inputs` are separated by semicolons."""
    lines = [f"  input {i.strip()}" for i in inputs.split(";")]
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return "\n".join(["program", *lines, f"  network y: {dtype}[{shape}], layer fc", indented, "  output out = y"])


TWO = "x: float32[batch, seq, 6]"

LINEAR = """\
indices b=batch, o=4, i=6
term
  0 operand x[b, i]
  1 core fc.weight[o, i]
term
  0 core fc.bias[o]
-> y[b, o]
"""

SEQUENCE = """\
indices b=batch, s=seq, o=4, i=6
term
  0 operand x[b, s, i]
  1 core fc.weight[o, i]
term
  0 core fc.bias[o]
-> y[b, s, o]
"""

TT = """\
indices b=batch, o0=4, o1=3, o2=2, i0=2, i1=3, i2=4, r=2, s=2
term
  0 operand x[b, (i0 i1 i2)]
  1 core A[i0, o0, r]
  2 core B[r, i1, o1, s]
  3 core C[s, i2, o2]
-> y[b, (o0 o1 o2)]
"""
