"""The reference: ATen ops one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ascend_sp.compiler.targets.base import Runnable, Target


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Run the ATen ops one by one."""

    def run(args: list[Any]) -> Sequence[Any]:
        values = tuple(args)
        args.clear()
        return gm(*values)

    return run


EAGER = Target("eager", lower)
