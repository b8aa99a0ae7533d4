"""What is wrong with the paths that a command was given, told before any work is done."""

from __future__ import annotations

from pathlib import Path

from tncompile.errors import OutputError
from tncompile.runtime.files import check_not_the_model, check_writable, data_path


def check_paths(model: Path, output: Path, report: Path | None) -> None:
    """OutputError where an output cannot be written, or would overwrite the model, its weights or the other output."""
    for path in (output, report):
        if path is not None:
            check_writable(path)
    for path in (output, data_path(output), report):
        if path is not None:
            check_not_the_model(path, model)
    if data_path(output).is_file():
        from tncompile.frontend.onnx.load import external_files

        for file in external_files(model):
            check_not_the_model(data_path(output), file)
    if report is not None and report.absolute() == output.absolute():
        raise OutputError(f"{report}: the report would overwrite the output; give it another name")
