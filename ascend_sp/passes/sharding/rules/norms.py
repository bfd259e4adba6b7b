"""Normalisations: local when they run over other dims than the sequence."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import REPLICATE, Shard
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    rule,
)

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
