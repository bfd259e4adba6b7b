"""The opaque attention becomes ops that the lowering target runs.

``sdpa`` is `F.scaled_dot_product_attention`, which picks the device's fused kernel; ``math`` is the
same spelled out in matrix products, for comparison, and for Ascend's graphs, which have no SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.sizes import divide
from ascend_sp.runtime.npu import DEVICE
from ascend_sp.runtime.ops import attention as attention_op

aten = torch.ops.aten


def lower_attention(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace every `ascend_sp::attention`."""
    emit = Emitter(gm, "lower_attention")
    spelled_out = ctx.attention == "math" or ctx.npu_graph
    for node in gm.graph.find_nodes(op="call_function", target=attention_op):
        given = Attention.of(node)
        if spelled_out and ctx.attention == "sdpa":
            ctx.note(
                NoteKind.ATTENTION,
                node,
                "decomposed into matmuls: Ascend's graphs have no SDPA",
            )
        ctx.runs_as(node, "matmuls" if spelled_out else "sdpa")
        with emit.at(node):
            emit.replace(node, _math(emit, given) if spelled_out else _sdpa(emit, given))
    return gm


def _sdpa(e: Emitter, a: Attention) -> fx.Node:
    out = e.call(
        aten.scaled_dot_product_attention.default,
        *(a.q, a.k, a.v, a.attn_mask, 0.0, a.is_causal),
        scale=a.scale,
        enable_gqa=a.enable_gqa,
    )
    if a.q.meta["val"].device.type == DEVICE and not all(
        isinstance(n, int) for x in (a.q, a.k) for n in as_shape_of(x)
    ):
        # For symbolic lengths nobody says in which order torch_npu's kernel writes.
        return e.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    return out


def _math(e: Emitter, a: Attention) -> fx.Node:
    """``softmax(q k^T * scale + mask) v`` as in PyTorch's `_scaled_dot_product_attention_math`.

    That is: the scale is shared between q and k, and half precision is computed in float32.
    """
    q, k, v, attn_mask, is_causal, scale, enable_gqa = a
    dtype = q.meta["val"].dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = (e.call(aten._to_copy.default, x, dtype=torch.float32) for x in (q, k, v))
    if enable_gqa:
        k, v = _each_group(e, k, q), _each_group(e, v, q)
    dims = as_shape_of(q)
    scale = scale if scale is not None else dims[-1] ** -0.5
    sign, root = (-1, (-scale) ** 0.5) if scale < 0 else (1, scale**0.5)
    last = len(dims) - 1
    turned = e.permute(k, [*range(last - 1), last, last - 1])
    scores = e.call(
        aten.matmul.default,
        e.call(aten.mul.Scalar, q, sign * root),
        e.call(aten.mul.Scalar, turned, root),
    )
    device = q.meta["val"].device
    if is_causal:
        ones = e.call(
            aten.ones.default,
            [dims[-2], as_shape_of(k)[-2]],
            dtype=torch.bool,
            device=device,
        )
        attn_mask = e.call(aten.tril.default, ones)
    hides: Any = attn_mask
    if hides is not None and hides.meta["val"].dtype == torch.bool:
        kind = q.meta["val"].dtype
        zero = e.call(aten.full.default, [], 0.0, dtype=kind, device=device)
        never = e.call(aten.full.default, [], float("-inf"), dtype=kind, device=device)
        hides = e.call(aten.where.self, hides, zero, never)
    if hides is not None:
        scores = e.call(aten.add.Tensor, scores, hides)
        # Rows in which nobody is seen become zeros, as in PyTorch.
        weights = e.call(aten._safe_softmax.default, scores, -1)
    else:
        weights = e.call(aten._softmax.default, scores, -1, False)
    out = e.call(aten.matmul.default, weights, v)
    same = out.meta["val"].dtype == dtype
    return out if same else e.call(aten._to_copy.default, out, dtype=dtype)


def _each_group(e: Emitter, x: fx.Node, q: fx.Node) -> fx.Node:
    """``[.., G, T, D] -> [.., H, T, D]``: heads of keys once for each query head they serve."""
    heads = len(as_shape_of(x)) - 3
    times = divide(as_shape_of(q)[-3], as_shape_of(x)[heads])
    assert times is not None  # PyTorch checks it when the model is traced
    return e.repeat_each(x, times, heads)
