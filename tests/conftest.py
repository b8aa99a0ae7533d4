"""Options and fixtures of the whole suite."""

from __future__ import annotations

import copy
import functools
import os
import signal
from typing import Any

import pytest
from hypothesis import settings

# `make test` and CI draw the same examples each time, `make test-all` new ones: a find is nobody's broken change.
settings.register_profile("same", derandomize=True, database=None)

# Plans must not depend on what the user has measured; set here so that child processes have it too.
os.environ["TNCOMPILE_PROFILE"] = "default"

# A shell starts what it runs in the background deaf to Ctrl-C; tests and their child processes are to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected part of tests/passes/golden")


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> None:
    """torch's exporter builds its table of some 500 functions anew for each model, which is most of a small export."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):  # another torch: it takes its time
        return

    def copied(*args: Any, **options: Any) -> Any:
        registry = copy.copy(made(*args, **options))
        registry.functions = {name: [*functions] for name, functions in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign, assignment]


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected texts are to be rewritten, not compared."""
    return bool(request.config.getoption("--update-golden"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many random networks were compared: none may be left out in silence."""
    counts: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name.startswith("networks ") and getattr(report, "when", "") == "call":
                    counts[name] = counts.get(name, 0) + int(value)
    if counts:
        line = ", ".join(f"{value} {name.removeprefix('networks ')}" for name, value in counts.items())
        terminalreporter.write_line(f"random networks: {line}")
