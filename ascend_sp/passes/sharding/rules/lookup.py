"""Rows picked from a table by an index: local when either is whole."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import REPLICATE, Shard
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    can_zero_padding,
    normal_dim,
    rule,
)

aten = torch.ops.aten

UNSAFE_INDEX = "padding rows of an index, which may point anywhere, cannot be set to zero"


@rule(aten.embedding.default)
def embedding(call: Call) -> Answer:
    """``([v, c], [b, s]) -> [b, s, c]``."""
    table, index = call.operands
    if isinstance(table.placement, Shard):
        return Reshard("the table of an embedding is sharded")
    if not can_zero_padding(index.shard, call.world):
        return Reshard(UNSAFE_INDEX)
    return Local((REPLICATE, index.shard), (index.shard,), mask_padding=True)


@rule(aten.index_select.default)
def index_select(call: Call) -> Answer:
    """``([v, c], [s]) -> [s, c]`` by a sharded index, or a pick along another dim."""
    x, index = call.operands
    dim = normal_dim(call.argument("dim"), x.ndim)
    if isinstance(x.placement, Shard):
        if x.shard.dim == dim:
            return Reshard("positions of the sequence are picked by an index")
        if isinstance(index.placement, Shard):
            return Reshard("both the table and the index of a pick are sharded")
        return Local((x.shard, REPLICATE), (x.shard,))
    if not can_zero_padding(index.shard, call.world):
        return Reshard(UNSAFE_INDEX)
    return Local((REPLICATE, index.shard), (index.shard.moved(dim),), mask_padding=True)
