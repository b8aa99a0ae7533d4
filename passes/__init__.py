"""The passes over a program, and the pipeline that runs them. See README.md for how to add one."""

if __name__ != "tncompile.passes":
    raise ImportError(f"import tncompile.passes, not {__name__}: a second copy would not be the one in use")

from tncompile.passes.base import Change, Context, Pass, PassReport
from tncompile.passes.blocks import Blocks
from tncompile.passes.clean import Clean
from tncompile.passes.dense import Dense
from tncompile.passes.fold import Fold
from tncompile.passes.join import Join
from tncompile.passes.layout import Layout
from tncompile.passes.limit import Limit
from tncompile.passes.merge_cores import MergeCores
from tncompile.passes.order import Order
from tncompile.passes.pipeline import DEFAULT, Pipeline, parse_passes
from tncompile.passes.trim import Trim

__all__ = [
    "DEFAULT",
    "Blocks",
    "Change",
    "Clean",
    "Context",
    "Dense",
    "Fold",
    "Join",
    "Layout",
    "Limit",
    "MergeCores",
    "Order",
    "Pass",
    "PassReport",
    "Pipeline",
    "Trim",
    "parse_passes",
]
