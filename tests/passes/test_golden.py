"""Programs before and after a pass: one file in golden/ for each, rewritten by ``pytest --update-golden``.

A file says what it shows, names the pass with its options, the tolerance of the numbers (see
`tests.helpers.apply_pass`), which cores are not random (``fill: ones=1``), and the limit of memory in bytes
(``max_memory: 1000``). Then follow the program that goes in,
the one that comes out, and what the pass reports: ``+`` done, ``-`` declined.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import apply_pass, program_of
from tncompile.ir import text as ir_text
from tncompile.passes import Change, Context, Pass, parse_passes
from tncompile.passes.pipeline import PASSES

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(FOLDER.glob("*.txt"))


@dataclass(frozen=True)
class Case:
    """One golden file, its parts as they stand in it."""

    about: str
    options: dict[str, str]
    before: str
    after: str
    report: str

    @classmethod
    def read(cls, path: Path) -> Case:
        """Parse a golden file; the parts that a pass writes may be missing."""
        parts = path.read_text().split("\n=== ")
        sections = {name: body.strip("\n") for name, _, body in (part.partition("\n") for part in parts[1:])}
        about, _, options = parts[0].rpartition("\n\n")
        pairs = (line.split(":", 1) for line in options.strip().splitlines())
        return cls(
            about.strip(),
            {key.strip(): value.strip() for key, value in pairs},
            sections["before"],
            sections.get("after", ""),
            sections.get("report", ""),
        )

    def write(self, path: Path, after: str, report: str) -> None:
        """The file with other expectations."""
        options = "\n".join(f"{key}: {value}" for key, value in self.options.items())
        path.write_text(
            f"{self.about}\n\n{options}\n\n=== before\n{self.before}\n\n=== after\n{after}\n\n=== report\n{report}\n"
        )

    @property
    def step(self) -> Pass:
        """The pass with its options."""
        name = self.options["pass"].partition("{")[0]
        return next(p for p in parse_passes(self.options["pass"]) if p.name() == name)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path: Path, update_golden: bool) -> None:
    case = Case.read(path)
    fill = dict(pair.split("=") for pair in case.options.get("fill", "").split())
    program = program_of(case.before, **{name: float(value) for name, value in fill.items()})
    context = Context(max_memory=int(limit)) if (limit := case.options.get("max_memory")) else Context()
    after, changes = apply_pass(case.step, program, tolerance=float(case.options["tolerance"]), context=context)
    text = ir_text.dump(after).strip()
    report = "\n".join(_line(c, why=case.step.name() not in ("order", "layout", "join")) for c in changes)
    if update_golden:
        case.write(path, text, report)
    assert text == (Case.read(path) if update_golden else case).after
    assert report == (Case.read(path) if update_golden else case).report


def _line(change: Change, why: bool) -> str:
    """A line of the report; the reasons of `order`, `layout` and `join` are predicted times: the cost model's."""
    sign = "-" if change.declined else "+"
    return f"{sign} {change.network}: {change.what}{f' ({change.why})' if change.why and why else ''}"


def test_every_pass_has_golden_files() -> None:
    assert {path.stem.partition("-")[0] for path in CASES} == {*PASSES}
