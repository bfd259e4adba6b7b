"""Convolutions. With one tap along the sequence, as 1 x 1 ones have, no position sees another."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import REPLICATE, Shard
from ascend_sp.passes.sharding.rules.base import Answer, Call, Local, Reshard, rule

aten = torch.ops.aten


@rule(aten.convolution.default)
def convolution(call: Call) -> Answer:
    """``([b, i, *x], [o, i, *taps], [o]) -> [b, o, *y]``: b, and each x that has one tap."""
    x, *others = call.operands
    if not isinstance(x.placement, Shard) or any(isinstance(w.placement, Shard) for w in others):
        return Reshard("the sequence is in the weights of a convolution")
    dim = x.placement.dim
    if dim == 1:
        return Reshard("the sequence is the channels of a convolution")
    if dim > 1:
        along = [
            _at(call.argument("stride"), dim - 2),
            _at(call.argument("padding"), dim - 2),
            _at(call.argument("output_padding"), dim - 2),
        ]
        if others[0].shape[dim] != 1 or along != [1, 0, 0]:
            return Reshard("a convolution mixes positions")
    return Local((x.placement, *(REPLICATE for _ in others)), (x.placement,))


def _at(values: list[int], i: int) -> int:
    """The value for the dim `i` of positions; one alone is for all of them."""
    return values[i] if len(values) > 1 else values[0]
