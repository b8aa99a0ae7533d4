"""The user's line of Python in a stack trace that an exporter kept."""

from __future__ import annotations

import re

from tncompile.errors import SourceRef


def innermost_line(stack_trace: str, layer: str) -> SourceRef:
    """The innermost line outside installed packages, or at least outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n(?:\s+([^\n]*))?', stack_trace)
    for package in ("/site-packages/", "/torch/"):
        outside = [f for f in frames if package not in f[0].replace("\\", "/")]
        if outside:
            break
    else:
        outside = []
    file, line, code = (outside or frames or [("", 0, "")])[-1]
    return SourceRef(layer, file, int(line), code)
