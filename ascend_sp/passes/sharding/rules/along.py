"""Ops that work along dims they name, each row of these alone: softmax, sort, cumsum, roll."""

from __future__ import annotations

import torch

from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    normal_dim,
    rule,
)

aten = torch.ops.aten


@rule(aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default)
def softmax(call: Call) -> Answer:
    """``[b, s, c] -> [b, s, c]``, normalised over `c`."""
    x = call.operands[0]
    if normal_dim(call.argument("dim"), x.ndim) == x.shard.dim:
        return Reshard("softmax runs over the sequence")
    return Local((x.shard,), (x.shard,))


@rule(aten.topk.default, aten.sort.default, aten.glu.default)
def along_one_dim(call: Call) -> Answer:
    """``[b, s, c] -> [b, s, c']``: along `c`, each row by itself."""
    x = call.operands[0]
    dim = call.argument("dim")
    if normal_dim(dim, x.ndim) == x.shard.dim:
        return Reshard(f"{call.op} runs over the sequence")
    return Local((x.shard,), tuple(x.shard for _ in call.outputs))


@rule(aten.cumsum.default, aten.flip.default, aten.roll.default)
def along_dims(call: Call) -> Answer:
    """``[b, s, c] -> [b, s, c]``: positions are mixed along the named dims only, not along `s`."""
    x = call.operands[0]
    split = x.shard
    dims = call.argument("dim" if call.op is aten.cumsum.default else "dims")
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:  # roll without dims flattens first
        return Reshard("it runs over the flattened tensor")
    if split.dim in [d % x.ndim for d in dims]:
        return Reshard("it mixes positions along the sequence")
    return Local((split,), (split,))
