"""Elementwise ops with broadcasting, and others that keep a shape."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import REPLICATE, Placement, Shard, same
from ascend_sp.graph.sizes import equal
from ascend_sp.passes.sharding.rules.base import Answer, Call, Local, Operand, Reshard, rule

aten = torch.ops.aten


def pointwise(call: Call) -> Answer:
    """``([..., s, ...], [..., s | 1, ...]) -> [..., s, ...]``; the largest sharded operand leads.

    A replicated operand is cut to match, which costs nothing; one that is sharded in another way
    is resharded. Operands of size one in the split dim broadcast and stay whole.
    """
    out = call.outputs[0]
    leader = call.leader
    split = leader.shard
    dim = split.dim + len(out) - leader.ndim
    if not equal(out[dim], leader.shape[split.dim]):
        # A sharded dim of one token that broadcasts would spread padding rows.
        return Reshard("the sequence axis is broadcast against a longer one")
    inputs = tuple(_follow(x, out, split.moved(dim)) for x in call.operands)
    return Local(inputs, tuple(split.moved(dim) for _ in call.outputs))


def _follow(x: Operand, out: tuple, split: Shard) -> Placement:
    dim = split.dim - (len(out) - x.ndim)
    if dim < 0 or (equal(x.shape[dim], 1) and not equal(out[split.dim], 1)):
        return REPLICATE
    wanted = split.moved(dim)
    if same(x.shape, x.placement, wanted):
        return x.placement
    return wanted


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten._conj.default,
)
def same_layout(call: Call) -> Answer:
    """``[...] -> [...]``: what comes out has the shape and the placement of what goes in."""
    x = call.operands[0]
    return Local((x.placement,), (x.placement,))


@rule(
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
)
def creation(call: Call) -> Answer:
    """``[b, s, c] -> [m, n]``: only the dtype and the device of the operand matter."""
    return Local((call.operands[0].placement,), (REPLICATE,))


@rule(aten.copy.default)
def copy(call: Call) -> Answer:
    """``([b, s, c], [b, s | 1, c]) -> [b, s, c]``: the second operand broadcast to the first."""
    return pointwise(call)
