"""The reference: ATen ops one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ascend_sp.compiler._pytorch import profiling
from ascend_sp.compiler.report.ranges import Interpreter, names
from ascend_sp.compiler.strides import keep_strides
from ascend_sp.compiler.targets.base import Runnable, Target


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Run the ATen ops one by one."""
    keep_strides(gm)
    named = names(gm)

    def run(args: list[Any]) -> Sequence[Any]:
        values = tuple(args)
        args.clear()
        # Called as a module, a graph prints what fails in it, and may drop the traceback.
        return Interpreter(gm, named).run(*values) if profiling() else gm.forward(*values)

    return run


EAGER = Target("eager", lower)
