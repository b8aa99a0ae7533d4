"""A task metric that the user names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tncompile.errors import TNCompileError
from tncompile.frontend.files.factory import importable_here, named
from tncompile.tensorizer.budget import Metric


def load_metric(reference: str) -> Metric:
    """The function that ``package.module:function`` names. LoadError where there is none."""
    with importable_here():
        return named(reference, "--metric")


def value_of(metric: Metric, run: Callable[..., Any]) -> float:
    """The metric of a model. TNCompileError, with the line of the user's code, where it fails or is no number."""
    name = getattr(metric, "__name__", "metric")
    try:
        with importable_here():
            value = float(metric(run))
    except TNCompileError:
        raise
    except Exception as error:  # whatever the user's code raises
        where = error.__traceback__
        while (
            where is not None
            and where.tb_next is not None
            and "tncompile" not in where.tb_next.tb_frame.f_code.co_filename
        ):
            where = where.tb_next
        line = f" at {where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else ""
        raise TNCompileError(f"the metric {name} fails{line}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise TNCompileError(f"the metric {name} gives {value}; it must be a number, higher is better")
    return value
