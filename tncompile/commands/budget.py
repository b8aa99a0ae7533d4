"""The options of a budget: what a tensorized model may cost, and what to measure that on."""

from __future__ import annotations

import argparse

from tncompile.commands.options import count, memory, names, positive
from tncompile.tensorizer.budget import FORMATS, Budget

BITS = ("fp32", "fp16", "int8-weights", "int8", "int8-static", "int4-weights", "int4")
"""Those of `tncompile.runtime.quantize`, which takes too long to import for ``--help``."""


def budget_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group(
        "tensorizing", "replace dense weights by tensor formats of lower rank and fewer bits, within a budget"
    )
    group.add_argument(
        "--max-error",
        type=positive,
        metavar="E",
        help="relative error of the outputs on the calibration data, like 0.01",
    )
    group.add_argument(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="a task metric on held-out data, higher is better: a function of your own that takes the model as a "
        "callable (tensors in, tensors out) and gives a number",
    )
    group.add_argument(
        "--max-drop",
        type=positive,
        metavar="D",
        help="how far the metric may fall, in its own units (default 0.01: a point of an accuracy)",
    )
    group.add_argument(
        "--max-size", type=size, metavar="SIZE", help="of the file: 5MB, or 25%% of the dense float32 file"
    )
    group.add_argument("--min-speedup", type=positive, metavar="X", help="over the dense float32 file in ONNX Runtime")
    group.add_argument(
        "--calibrate",
        metavar="DATA",
        help="inputs of the kind the model will see: an .npz of arrays by input name (first axis: samples), or a "
        "folder of such files; without them errors are those of the weights",
    )
    group.add_argument(
        "--prefer",
        choices=("both", "speed", "size"),
        help="what to minimize within the budget (default both: time times size)",
    )
    group.add_argument("--formats", type=names(FORMATS), metavar="NAME,...", help=f"among {', '.join(FORMATS)}")
    group.add_argument("--bits", type=names(BITS), metavar="NAME,...", help=f"among {', '.join(BITS)}")
    group.add_argument(
        "--threads", type=count, metavar="N", help="threads that it will run in, and is measured with (one a core)"
    )
    group.add_argument(
        "--heal",
        type=positive,
        metavar="SECONDS",
        help="train the cores to give what the dense layers gave on the calibration data, part by part, for so long",
    )
    group.add_argument(
        "--end-to-end", action="store_true", help="in what is left of that time, train all of them together"
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="where healing is kept; the same command resumes from there"
    )


def is_asked(options: argparse.Namespace) -> bool:
    """Whether any option of a budget, or one that only makes sense with it, was given."""
    limits = ("max_error", "metric", "max_drop", "max_size", "min_speedup")
    others = ("calibrate", "prefer", "formats", "bits", "heal", "checkpoint")
    return options.end_to_end or any(getattr(options, name) is not None for name in (*limits, *others))


def has_budget(options: argparse.Namespace) -> bool:
    """Whether a limit was given."""
    return any(getattr(options, name) is not None for name in ("max_error", "metric", "max_size", "min_speedup"))


def budget_of(options: argparse.Namespace) -> Budget:
    """The budget that the options say. TNCompileError where they make none, LoadError where there is no such metric."""
    from tncompile.tensorizer.metric import load_metric

    metric = None if options.metric is None else load_metric(options.metric)
    limits = (options.max_error, metric, options.max_drop, options.max_size, options.min_speedup)
    return Budget(*limits, options.prefer or "both")


def size(text: str) -> float:
    """``"5MB"`` -> 5e6 bytes; ``"25%"`` -> 0.25, a share; refuses anything else, as `argparse` wants it."""
    if not text.strip().endswith("%"):
        return memory(text)
    share = positive(text.strip()[:-1]) / 100
    if share >= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share below 100%, or a size like 5MB")
    return share
