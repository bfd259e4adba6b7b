"""Ops of torch_npu, which models call themselves on Ascend. Known by name: torch_npu may be absent.

All of them work on each row by itself, along the last dim.
"""

from __future__ import annotations

from ascend_sp.passes.sharding.layout import REPLICATE, Placement, Shard
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    normal_dim,
    rule_by_name,
)
from ascend_sp.passes.sharding.rules.pointwise import pointwise


@rule_by_name("npu::npu_rms_norm")
def rms_norm(call: Call) -> Answer:
    """``([b, s, c], [c]) -> [b, s, c]`` and the statistics ``[b, s, 1]``."""
    x, gamma = call.operands
    if not isinstance(x.placement, Shard):
        return Reshard("the weight of a norm is sharded")
    if x.shard.dim >= x.ndim - gamma.ndim:
        return Reshard("a norm runs over the sequence")
    return Local((x.shard, REPLICATE), (x.shard, x.shard))


@rule_by_name("npu::npu_add_rms_norm")
def add_rms_norm(call: Call) -> Answer:
    """``([b, s, c], [b, s, c], [c]) -> [b, s, c]``, statistics, and the sum ``[b, s, c]``."""
    a, b, gamma = call.operands
    if isinstance(gamma.placement, Shard) or a.shape != b.shape:
        return Reshard("the weight of a norm is sharded")
    split = (a if isinstance(a.placement, Shard) else b).shard
    if split.dim >= a.ndim - gamma.ndim:
        return Reshard("a norm runs over the sequence")
    return Local((split, split, REPLICATE), (split, split, split))


@rule_by_name("npu::npu_swiglu", "npu::npu_geglu")
def gated(call: Call) -> Answer:
    """``[b, s, 2c] -> [b, s, c]``: one half of the channels gates the other."""
    x = call.operands[0]
    if normal_dim(call.argument(1, "dim", -1), x.ndim) == x.shard.dim:
        return Reshard("the halves of a gate lie along the sequence")
    return Local((x.shard,), tuple(x.shard for _ in call.outputs))


@rule_by_name(
    "npu::npu_fast_gelu",
    "npu::npu_gelu",
    "npu::npu_silu",
    "npu::npu_mish",
)
def activation(call: Call) -> Answer:
    """``[...] -> [...]``, element by element."""
    return pointwise(call)


@rule_by_name("npu::npu_rotary_mul")
def rotary(call: Call) -> Answer:
    """``([b, s, n, d], [1, s, 1, d], [1, s, 1, d]) -> [b, s, n, d]``: tables broadcast over rows.

    The channels are turned, so they must be whole; so must be a matrix that says how.
    """
    x, *tables = call.operands
    if not isinstance(x.placement, Shard) or x.shard.dim == x.ndim - 1:
        return Reshard("a rotary embedding turns the channels, and its rows lead")
    found = pointwise(Call(call.op, tuple(call.operands[:3]), {}, call.outputs, call.world))
    if not isinstance(found, Local):
        return found
    rotate: tuple[Placement, ...] = tuple(REPLICATE for _ in tables[2:])
    return Local((*found.inputs, *rotate), found.outputs)
