"""Reductions: local when they run over other dims than the sequence."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import PARTIAL
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    can_zero_padding,
    normal_dims,
    rule,
)

aten = torch.ops.aten


@rule(
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.prod.dim_int,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.all.dims,
    aten.argmax.default,
    aten.argmin.default,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.max.dim,
    aten.min.dim,
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
)
def reduce(call: Call) -> Answer:
    """``[b, s, c] -> [b, s]``; a sum over `s` itself becomes the sum of the ranks' terms."""
    x = call.operands[0]
    split = x.shard
    dims = normal_dims(call.argument("dim"), x.ndim)
    if split.dim in dims:
        if call.op is aten.sum.dim_IntList and can_zero_padding(split, call.world):
            return Local((split,), (PARTIAL,), mask_padding=True)
        return Reshard(f"{call.op} runs over the sequence")
    keep = len(call.outputs[0]) == x.ndim
    dim = split.dim if keep else split.dim - sum(d < split.dim for d in dims)
    return Local((split,), tuple(split.moved(dim) for _ in call.outputs))
