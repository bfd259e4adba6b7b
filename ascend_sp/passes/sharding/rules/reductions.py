"""Reductions and normalisations: local when they run over other dims than the sequence."""

from __future__ import annotations

import torch

from ascend_sp.passes.sharding.layout import PARTIAL, REPLICATE, Shard
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    can_zero_padding,
    normal_dim,
    normal_dims,
    rule,
)

aten = torch.ops.aten

UNSAFE_INDEX = "padding rows of an index, which may point anywhere, cannot be set to zero"


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
    vector_norm = call.op is aten.linalg_vector_norm.default
    dims = normal_dims(call.argument(2 if vector_norm else 1, "dim"), x.ndim)
    if split.dim in dims:
        if call.op is aten.sum.dim_IntList and can_zero_padding(split, call.world):
            return Local((split,), (PARTIAL,), mask_padding=True)
        return Reshard(f"{call.op} runs over the sequence")
    keep = len(call.outputs[0]) == x.ndim
    dim = split.dim if keep else split.dim - sum(d < split.dim for d in dims)
    return Local((split,), tuple(split.moved(dim) for _ in call.outputs))


@rule(aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default)
def softmax(call: Call) -> Answer:
    """``[b, s, c] -> [b, s, c]``, normalised over `c`."""
    x = call.operands[0]
    if normal_dim(call.argument(1, "dim"), x.ndim) == x.shard.dim:
        return Reshard("softmax runs over the sequence")
    return Local((x.shard,), (x.shard,))


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
    normalized = len(call.argument(1, "normalized_shape"))
    if x.shard.dim >= x.ndim - normalized:
        return Reshard("a norm runs over the sequence")
    outputs = tuple(x.shard if shape else REPLICATE for shape in call.outputs)
    return Local((x.shard, *(REPLICATE for _ in affine)), outputs)


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
    dim = normal_dim(call.argument(1, "dim"), x.ndim)
    if isinstance(x.placement, Shard):
        if x.shard.dim == dim:
            return Reshard("positions of the sequence are picked by an index")
        if isinstance(index.placement, Shard):
            return Reshard("both the table and the index of a pick are sharded")
        return Local((x.shard, REPLICATE), (x.shard,))
    if not can_zero_padding(index.shard, call.world):
        return Reshard(UNSAFE_INDEX)
    return Local((REPLICATE, index.shard), (index.shard.moved(dim),), mask_padding=True)


@rule(aten.topk.default, aten.sort.default, aten.glu.default)
def along_one_dim(call: Call) -> Answer:
    """``[b, s, c] -> [b, s, c']``: along `c`, each row by itself."""
    x = call.operands[0]
    dim = call.argument(2 if call.op is aten.topk.default else 1, "dim", -1)
    if normal_dim(dim, x.ndim) == x.shard.dim:
        return Reshard(f"{call.op} runs over the sequence")
    return Local((x.shard,), tuple(x.shard for _ in call.outputs))
