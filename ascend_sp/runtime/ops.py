"""Ops that stand in programs beside the model's own: attention and functional collectives.

Attention is one opaque op from capture until lowering. After AOTAutograd,
`F.scaled_dot_product_attention` would be a kernel of one device, with that kernel's own layout and
outputs. The opaque op keeps the call as the user made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_sp.runtime.npu import DEVICE

NAMESPACE = "ascend_sp"

_c10d = torch.ops._c10d_functional
ALL_TO_ALL = _c10d.all_to_all_single.default
ALL_GATHER = _c10d.all_gather_into_tensor.default
ALL_REDUCE = _c10d.all_reduce.default
WAIT = _c10d.wait_tensor.default
STARTS = (ALL_TO_ALL, ALL_GATHER, ALL_REDUCE)


def communicates(target: Any) -> bool:
    """Whether what a node calls is one of PyTorch's functional collectives, or a wait for one."""
    return getattr(target, "namespace", "").startswith("_c10d_functional")


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False) -> Tensor"
)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _by_heads(q: Tensor, v: Tensor, batch: int, heads: int) -> Tensor:
    """A result that lies as ``[B, S, H, E]``."""
    return q.new_empty(batch, q.shape[2], heads, v.shape[3]).transpose(1, 2)


def _stands_for_communication(name: str) -> Callable[..., Any]:
    """The implementation of an op that has none."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} stands for communication; a pass must expand it")

    return refuse


_attention = torch.library.custom_op(
    f"{NAMESPACE}::attention", _sdpa, mutates_args=(), schema=SCHEMA
)
_split_attention = torch.library.custom_op(
    f"{NAMESPACE}::split_attention",
    _stands_for_communication("split_attention"),
    mutates_args=(),
    schema=SCHEMA,
)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if q.device.type == DEVICE and q.dim() == 4:
        # In the order in which Ascend's fused attention writes, so that what users write behind
        # it (transpose, then merge the heads) is traced as a view.
        b, h = torch.broadcast_shapes(q.shape[:2], *(() if enable_gqa else (k.shape[:2],)))
        return _by_heads(q, v, b, h)
    # Elsewhere the strides are those of the kernel that will run.
    return _sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa)


@_split_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _by_heads(q, v, *q.shape[:2])


attention = torch.ops.ascend_sp.attention.default
"""``attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False) -> Tensor``.

q is ``[B, H, S, D]``, k ``[B, G, T, D]``, v ``[B, G, T, E]``, the result ``[B, H, S, E]``, with the
meaning of `torch.nn.functional.scaled_dot_product_attention` at dropout 0.
"""

split_attention = torch.ops.ascend_sp.split_attention.default
"""`attention` with shards of the sequences: q ``[B, H, s, D]``, k ``[B, G, t, D]``, v likewise.

It has a shape but no implementation, so that a program in which it is left over cannot run. The
mask is whole, ``[..., S, T]``.
"""


_split_group_norm = torch.library.custom_op(
    f"{NAMESPACE}::split_group_norm",
    _stands_for_communication("split_group_norm"),
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, SymInt n, SymInt c, SymInt positions, "
    "SymInt groups, float eps) -> (Tensor, Tensor, Tensor)",
)


@_split_group_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)


split_group_norm = torch.ops.ascend_sp.split_group_norm.default
"""`aten.native_group_norm` of a shard ``[n, c, ...]`` by the statistics of all shards.

It has a shape but no implementation, as `split_attention`. `positions` counts those of all ranks.
"""
