"""What several commands share: types of options for `argparse`, and how results are printed."""

from __future__ import annotations

from typing import Any


def sizes(text: str) -> tuple[int, ...]:
    """``"1,32"`` -> (1, 32). ValueError for anything but positive numbers."""
    numbers = tuple(int(part) for part in text.split(",") if part.strip())
    if not numbers or min(numbers) < 1:
        raise ValueError(text)
    return numbers


sizes.__name__ = "list of sizes"  # what argparse calls a wrong one


def console(file: Any) -> Any:
    """A rich console, as wide as the terminal, or of 140 columns elsewhere."""
    from rich.console import Console

    result = Console(file=file, highlight=False)
    return result if result.is_terminal else Console(file=file, highlight=False, width=140)
