"""Ops of torch_npu, which models call themselves on Ascend. Known by name: torch_npu may be absent.

All of them work on each row by itself. What reads whole images (``npu_group_norm_silu``), writes to
its operands (``npu_apply_rotary_pos_emb``, by CANN's document of its kernel) or may hide a mask of
positions (``npu_scaled_masked_softmax``) has no rule, and runs on whole tensors.
"""

from __future__ import annotations

from ascend_sp.graph.layout import Shard
from ascend_sp.graph.sizes import same_shape
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Reshard,
    inputs_of,
    named,
    normal_dim,
    rows,
    rule,
)
from ascend_sp.passes.sharding.rules.norms import layer_norm
from ascend_sp.passes.sharding.rules.pointwise import pointwise

WEIGHT = "the weight of a norm is sharded"
ROWS = "a norm runs over the sequence"


@rule("npu::npu_rms_norm", "npu::npu_gemma_rms_norm")
def rms_norm(call: Call) -> Answer:
    """``([b, s, c], [c]) -> [b, s, c]`` and the statistics ``[b, s, 1]``."""
    x, gamma = named(call, "input", "gamma")
    if not isinstance(x.placement, Shard):
        return Reshard(WEIGHT)
    if x.shard.dim >= x.ndim - gamma.ndim:
        return Reshard(ROWS)
    return rows(call, x.shard, x)


@rule("npu::npu_add_rms_norm", "npu::npu_add_rms_norm_cast", "npu::npu_add_layer_norm")
def add_norm(call: Call) -> Answer:
    """``([b, s, c], [b, s, c], [c]) -> [b, s, c]``, statistics ``[b, s, 1]``, the sum."""
    a, b, gamma = named(call, "x1", "x2", "gamma")
    whole = [x for x in (a, b) if isinstance(x.placement, Shard)]
    if not whole:
        return Reshard(WEIGHT)
    if not same_shape(a.shape, b.shape):
        return Reshard("a norm of a sum whose terms broadcast")
    split = whole[0].shard
    if split.dim >= a.ndim - gamma.ndim:
        return Reshard(ROWS)
    return rows(call, split, a, b)


@rule("npu::npu_layer_norm_eval")
def layer_norm_eval(call: Call) -> Answer:
    """``([b, s, c], [c], [c]) -> [b, s, c]``."""
    return layer_norm(call)


@rule("npu::npu_swiglu", "npu::npu_geglu", "npu::npu_gelu_mul")
def gated(call: Call) -> Answer:
    """``[b, s, 2c] -> [b, s, c]``: one half of the channels gates the other."""
    x = call.operands[0]
    along = call.argument("dim") if call.has("dim") else -1
    if normal_dim(along, x.ndim) == x.shard.dim:
        return Reshard("the halves of a gate lie along the sequence")
    return rows(call, x.shard, x)


@rule(
    "npu::fast_gelu",
    "npu::npu_fast_gelu",
    "npu::npu_gelu",
    "npu::npu_silu",
    "npu::npu_mish",
)
def activation(call: Call) -> Answer:
    """``[...] -> [...]``, element by element."""
    return pointwise(call)


@rule("npu::npu_linear")
def linear(call: Call) -> Answer:
    """``([s, k], [n, k], [n]) -> [s, n]``."""
    (x,) = named(call, "input")
    if not isinstance(x.placement, Shard) or x.shard.dim == x.ndim - 1:
        return Reshard("a weight, or the channels that it multiplies, are sharded")
    return rows(call, x.shard, x)


@rule("npu::npu_rotary_mul", "npu::npu_interleave_rope")
def rotary(call: Call) -> Answer:
    """``([b, s, n, d], [1, s, 1, d], [1, s, 1, d]) -> [b, s, n, d]``: tables broadcast over rows.

    Channels are rotated, so they must be whole; so must a rotation that is given as a matrix.
    """
    x, *tables = named(call, *[a.name for a in call.op._schema.arguments[:3]])
    if not isinstance(x.placement, Shard) or x.shard.dim == x.ndim - 1:
        return Reshard(
            "the tables of a rotary embedding, or the channels that it rotates, are sharded"
        )
    found = pointwise(Call(call.op, (x, *tables), {}, call.outputs, call.world))
    if not isinstance(found, Local):
        return found
    wanted = dict(zip((t.index for t in (x, *tables)), found.inputs, strict=True))
    return Local(inputs_of(call, wanted), found.outputs)
