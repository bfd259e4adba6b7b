"""Norms and rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cannsim import npu_ops
from cannsim.ge.registry import Call, ints, kernel


@kernel("LayerNormV4")
def layer_norm_v4(
    call: Call,
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Any:
    return torch.native_layer_norm(
        x, ints(normalized_shape), gamma, beta, call.attr("epsilon", 1e-5)
    )


@kernel("LayerNormV3")
def layer_norm_v3(call: Call, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    """Like LayerNormV4, over the dims from begin_norm_axis."""
    axis = call.attr("begin_norm_axis", 0) % x.dim()
    return torch.native_layer_norm(x, x.shape[axis:], gamma, beta, call.attr("epsilon", 1e-5))


@kernel("LayerNorm")
def layer_norm(call: Call, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    """The third output is the variance, where the newer ones have its reciprocal root."""
    axis = call.attr("begin_norm_axis", 0) % x.dim()
    epsilon = call.attr("epsilon", 1e-7)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[axis:], gamma, beta, epsilon)
    return y, mean, rstd.reciprocal().square() - epsilon


@kernel("GroupNorm", "GroupNormV2")
def group_norm(call: Call, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    # torchair leaves data_format alone and declares the input's own format, which GE goes by.
    layout = call.op.layout(0)
    if layout != "NCHW":
        raise NotImplementedError(f"format {layout!r} is not simulated")
    groups, eps = call.attr("num_groups"), call.attr("eps", 1e-5)
    grouped = x.float().reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(-1), grouped.var(-1, correction=0)
    third = variance if call.op.type == "GroupNorm" else torch.rsqrt(variance + eps)
    y = F.group_norm(x, groups, gamma, beta, eps)
    return y, mean.to(x.dtype), third.to(x.dtype)


@kernel("RmsNorm")
def rms_norm(call: Call, x: Tensor, gamma: Tensor) -> Any:
    return npu_ops.rms_norm(x, gamma, call.attr("epsilon", 1e-6))


@kernel("AddRmsNorm")
def add_rms_norm(call: Call, x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
    return npu_ops.add_rms_norm(x1, x2, gamma, call.attr("epsilon", 1e-6))


@kernel("AddLayerNorm")
def add_layer_norm(
    call: Call,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
) -> Any:
    if bias is not None:
        raise NotImplementedError("bias is not simulated")
    extra = bool(call.attr("additional_output", False))
    return npu_ops.add_layer_norm(x1, x2, gamma, beta, call.attr("epsilon", 1e-5), extra)


@kernel("RotaryMul")
def rotary_mul(call: Call, x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """Rotates by halves: the op has no mode, and torchair drops that of npu_rotary_mul."""
    return npu_ops.rotary_mul(x, r1, r2, "half")


@kernel("RotaryPositionEmbedding")
def rotary_position_embedding(
    call: Call, x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None = None
) -> Tensor:
    mode = call.attr("mode", 0)
    if mode not in (0, 1):
        raise NotImplementedError(f"mode {mode} is not simulated")
    return npu_ops.rotary_mul(x, cos, sin, ("half", "interleave")[mode], rotate)


@kernel("ApplyRotaryPosEmb")
def apply_rotary_pos_emb(
    call: Call, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """In place on both, which are copies that torchair makes."""
    if call.attr("layout", 1) != 1:
        raise NotImplementedError("layouts other than BSND (1) are not simulated")
    mode = call.attr("rotary_mode", "half")
    return (
        query.copy_(npu_ops.rotary(query, cos, sin, mode)),
        key.copy_(npu_ops.rotary(key, cos, sin, mode)),
    )


@kernel("InterleaveRope")
def interleave_rope(call: Call, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return npu_ops.interleave_rope(x, cos, sin)
