"""The package as others get it: what the wheel holds, that it works elsewhere, what it imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tncompile"

#: A module imports from its own layer's package, and from lower layers; never from a neighbour.
LAYERS = (
    ("errors",),
    ("ir",),
    ("frontend", "decomp", "cost"),
    ("passes",),
    ("emit",),
    ("runtime",),
    ("inspect",),
    ("compiler",),
    ("training",),
    ("tensorizer",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run with this Python, away from the clone's own sources; return what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", into)
    run("-m", "pip", "wheel", *options, source, cwd=into.parent)
    (wheel,) = into.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, links kept as links, so that nothing is built in the clone."""
    copy = tmp_path_factory.mktemp("source") / "tncompile"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("tncompile", "passes", "runtime"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--quiet", "--target", target, wheel, cwd=target)
    return target


def test_the_links_are_relative() -> None:
    for name in ("passes", "runtime"):
        assert os.readlink(PACKAGE / name) == f"../{name}"


def test_wheel_holds_every_module(wheel: Path) -> None:
    files = contents(wheel)
    for module in modules():
        assert f"tncompile/{module.relative_to(PACKAGE).as_posix()}" in files
    assert "tncompile/py.typed" in files
    assert "tncompile/cost/profiles/cpu.json" in files


def test_wheel_has_no_other_top_level(wheel: Path) -> None:
    top = {file.partition("/")[0] for file in contents(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tncompile"}


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run("-c", build, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert contents(build_wheel(sdist, tmp_path / "wheel")) == contents(wheel)


def test_wheel_imports_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    script = (
        "import tncompile, tncompile.passes, tncompile.runtime;"
        "print(*(m.__file__ for m in (tncompile, tncompile.passes, tncompile.runtime)), sep='\\n')"
    )
    files = run("-c", script, cwd=tmp_path, path=installed).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_wheel_answers_help(installed: Path, tmp_path: Path) -> None:
    assert "usage" in run("-m", "tncompile", "--help", cwd=tmp_path, path=installed).lower()


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_folders_do_not_import_by_their_bare_names(folder: str) -> None:
    script = (
        f"try: import {folder}\n"
        "except ImportError as error: print(error)\n"
        "else: raise SystemExit('imported a second copy')"
    )
    assert f"tncompile.{folder}" in run("-c", script, cwd=ROOT)


@pytest.mark.parametrize("module", ["tncompile", "tncompile.cli"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "onnx", "onnxruntime", "cotengra"}
    loaded = run("-c", f"import sys, {module}; print(*sys.modules)", cwd=ROOT).split()
    assert not heavy & set(loaded)


def modules() -> list[Path]:
    """Every module of the package, links followed."""
    linked = (PACKAGE / "passes", PACKAGE / "runtime")
    return sorted({*PACKAGE.rglob("*.py"), *(file for link in linked for file in link.rglob("*.py"))})


def imported(module: Path) -> Iterator[tuple[int, str]]:
    """The line and layer of each import of the package inside a module, lazy ones too."""
    package = ("tncompile", *module.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module])))
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            # The version is a constant of the root, and anyone may read it.
            if root == "tncompile" and rest != "__version__":
                part = rest.partition(".")[0]
                yield node.lineno, part if part in LEVEL else "__init__"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(module: Path) -> None:
    own = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in LAYERS"
    for line, layer in imported(module):
        allowed = layer == own or LEVEL[layer] < LEVEL[own]
        assert allowed, f"line {line}: {own} must not import {layer}"
