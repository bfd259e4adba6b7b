"""How far off rounding alone brings the results of a graph, on given inputs.

A deep model in half precision can turn the last bit of an early value into percents of its result.
No fixed tolerance tells that from a fault; so the graph runs once more with every value off by at
most the width of its last bit, which is more than another order of summation, or another fusion,
mostly does to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ascend_sp.compiler.numerics.lockstep import wide_dtype
from ascend_sp.graph._pytorch import tree_map
from ascend_sp.graph.cost.estimate import is_free
from ascend_sp.graph.families import MOVES


class Rounded(fx.Interpreter):
    """Runs a graph; every float that it computes is a last bit up, down, or as it is."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._nodes = 0

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, rounded otherwise; what only moves values keeps them."""
        value = super().run_node(n)
        if n.op != "call_function" or is_free(n) or n.target in MOVES:
            return value
        self._nodes += 1
        return tree_map(lambda x: _rounded(x, self._nodes), value)


def _rounded(x: Any, seed: int) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    # The same on every rank and device, and without PyTorch's generators, which the model may use.
    draw = torch.arange(x.numel(), device=x.device).add_(seed * 7919).mul_(2654435761)
    sign = draw.bitwise_right_shift_(17).remainder_(3).sub_(1).view(x.shape)
    wide = x.to(wide_dtype(x))
    range_ = torch.finfo(x.dtype)
    off = wide * (1 + sign.to(wide.dtype) * range_.eps)
    # The most negative number, in masks, must not become an infinity.
    off = off.clamp_(range_.min, range_.max).where(wide.isfinite(), wide)
    # Of memory like the value's, since the graph's views count on its strides.
    return torch.empty_like(x).copy_(off)
