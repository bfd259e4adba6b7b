"""PyTorch's own compiler, for CPUs and CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ascend_sp.compiler import _inductor
from ascend_sp.compiler._pytorch import profiling
from ascend_sp.compiler.report.ranges import Calls
from ascend_sp.compiler.targets.base import Runnable, Target


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Compile with Inductor."""
    calls = Calls(gm)
    run = _inductor.inductor(gm, inputs, static_inputs)

    def call(args: list[Any]) -> Sequence[Any]:
        if not profiling():
            return run(args)
        with calls:
            return run(args)

    return call


INDUCTOR = Target("inductor", lower)
