"""Blocks that are compiled one by one, and so each gather what they return.

`compile_repeated_blocks` of diffusers compiles the code of a block once and calls it with the
weights of each. For one device that is what compiles fastest; here the sequence is then whole again
between any two blocks. A graph cannot know that it is such a block, but its calls show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch

from ascend_sp.compiler.report.page import duration, size
from ascend_sp.compiler.targets.base import Runnable
from ascend_sp.graph.context import PassContext
from ascend_sp.passes.overlap.saving import Saving
from ascend_sp.runtime.unsplit import Unsplit

SEVERAL = 3
"""Sets of weights from which a graph is one of repeated blocks; two may be two models."""


def watched(run: Runnable, name: str, static: Sequence[int], ctx: PassContext) -> Runnable:
    """`run`, which tells once if it is called with the weights of several blocks.

    Args:
        run: one rank's program.
        name: of the model.
        static: which inputs are parameters or buffers.
        ctx: what the passes left.
    """
    saving = ctx.results.get(Saving)
    if saving is None or not saving.gathered or not static:
        return run
    seen: list[ref[torch.Tensor]] = []
    over = False

    def call(args: list[Any]) -> Sequence[Any]:
        nonlocal over
        if not over:
            weight = args[static[0]]
            known = [r() for r in seen]
            # A call with the first weights again ends the step in which all blocks were called.
            over = bool(known) and known[0] is weight
            if not any(k is weight for k in known):
                seen.append(ref(weight))
            if len(seen) >= SEVERAL:
                over = True
                told = _unsplit(name, saving, ctx)
                told.tell(error=ctx.on_unsharded == "error")
        return run(args)

    return call


def _unsplit(name: str, saving: Saving, ctx: PassContext) -> Unsplit:
    return Unsplit(
        [f"repeated blocks: {name}"],
        f"{name} is compiled by itself and called with the weights of several blocks "
        "(compile_repeated_blocks does so). Each call gathers what it returns: by estimate for "
        f"{ctx.estimator().device.name}, {size(saving.gathered)} from each of "
        f"{ctx.topology.size} ranks, {duration(saving.gathers)} of a block's "
        f"{duration(saving.step)}. "
        "Compile the model that holds the blocks, which gathers once: "
        '`pipe.transformer = torch.compile(pipe.transformer, backend="ascend_sp")`.',
    )
