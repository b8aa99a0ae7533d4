"""What is wrong with the paths that a command was given, told before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tncompile.errors import OutputError
from tncompile.runtime.files import check_not_the_model, check_writable, data_path


def check_paths(model: Path, outputs: Sequence[Path], report: Path | None) -> None:
    """OutputError where an output cannot be written, or would overwrite the model, its weights or another output."""
    reports = [] if report is None else [report]
    for path in (*outputs, *reports):
        check_writable(path)
    for path in reports:
        if path.absolute() in {output.absolute() for output in outputs}:
            raise OutputError(f"{path}: the report would overwrite the output; give it another name")
    # os.path's answer where the name of the data would be too long, for which Path has an error
    written = [path for path in (*outputs, *map(data_path, outputs), *reports) if os.path.exists(path)]
    for path in written:
        check_not_the_model(path, model)
    if written:
        from tncompile.frontend.load import files_of

        for file in files_of(model):
            for path in written:
                check_not_the_model(path, file)
