"""Normalisations: local over other dims than the sequence; else ranks join their statistics."""

from __future__ import annotations

import torch

from ascend_sp.graph import windows
from ascend_sp.graph.layout import REPLICATE, Shard
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    inputs_of,
    rule,
)
from ascend_sp.runtime.ops import split_group_norm

aten = torch.ops.aten


@rule(
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.rms_norm.default,
)
def layer_norm(call: Call) -> Answer:
    """``([b, s, c], [c], [c]) -> [b, s, c]`` and the statistics ``[b, s, 1]``."""
    x, *affine = call.operands
    if not isinstance(x.placement, Shard):
        return Reshard("the weight of a norm is sharded")
    normalized = len(call.argument("normalized_shape"))
    if x.shard.dim >= x.ndim - normalized:
        return Reshard("a norm runs over the sequence")
    outputs = tuple(x.shard if shape else REPLICATE for shape in call.outputs)
    return Local((x.shard, *(REPLICATE for _ in affine)), outputs)


@rule(aten.native_group_norm.default)
def group_norm(call: Call) -> Answer:
    """``([b, c, *s], [c], [c]) -> [b, c, *s]`` and the statistics ``[b, groups]``.

    Over `b` each rank by itself; over positions, `split_group_norm` joins the ranks' statistics.
    """
    x = call.operands[0]
    if not isinstance(x.placement, Shard):
        return Reshard("the weight of a norm is sharded")
    inputs = inputs_of(call, {x.index: x.shard})
    if x.shard.dim == 0:
        outputs = tuple(x.shard for _ in call.outputs)
        return Local(inputs, outputs, args={3: x.shard.local_size(call.world)})
    if x.shard.dim == 1:
        return Reshard("a group norm runs over channels that are split")
    if not windows.known(x.shard) or not all(isinstance(n, int) for n in x.shape):
        return Reshard("a group norm runs over positions whose number is a symbol, or merged")
    return Local(inputs, (x.shard, REPLICATE, REPLICATE), op=split_group_norm)
