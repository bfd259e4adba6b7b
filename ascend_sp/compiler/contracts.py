"""What passes require of a graph and ensure for all that come later, as predicates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.layout import PLACEMENTS
from ascend_sp.passes.sharding.plan import Plan
from ascend_sp.runtime.ops import attention, split_attention, split_group_norm


@dataclass(frozen=True)
class Fact:
    """Something that holds of a graph from some pass on."""

    text: str
    fails: Callable[[fx.GraphModule, PassContext], str]
    """What contradicts it, in words; empty if it holds."""


def _unplanned(_: fx.GraphModule, ctx: PassContext) -> str:
    return "" if ctx.results.get(Plan) is not None else "there is no plan"


def _unplaced(gm: fx.GraphModule, _: PassContext) -> str:
    inputs = gm.graph.find_nodes(op="placeholder")
    tensors = (n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor))
    without = (n.name for n in tensors if PLACEMENTS not in n.meta)
    return next((f"input {name} has no placement" for name in without), "")


def _lacks(op: Any) -> Callable[[fx.GraphModule, PassContext], str]:
    def fails(gm: fx.GraphModule, _: PassContext) -> str:
        left = gm.graph.find_nodes(op="call_function", target=op)
        return next((f"{n.name} is left" for n in left), "")

    return fails


PLANNED = Fact("there is a plan of placements", _unplanned)
PLACED = Fact("inputs have placements, so the graph is one rank's program", _unplaced)
EXCHANGED = Fact("no attention needs rows of other ranks any more", _lacks(split_attention))
JOINED = Fact("no norm needs statistics of other ranks any more", _lacks(split_group_norm))
LOWERED = Fact("no attention is opaque any more", _lacks(attention))
