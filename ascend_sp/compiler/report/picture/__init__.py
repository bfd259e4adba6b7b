"""A picture of one rank's program: thousands of nodes condensed to what fits a screen."""

from __future__ import annotations

from torch import fx

from ascend_sp.compiler.report.facts import Report
from ascend_sp.compiler.report.picture.condense import fold, stages_of
from ascend_sp.compiler.report.picture.draw import draw
from ascend_sp.passes.overlap.timeline import Timelines


def picture(gm: fx.GraphModule, r: Report, lines: Timelines | None) -> str:
    """The SVG of a finished program."""
    return draw(fold(stages_of(gm, r, lines)), r)
