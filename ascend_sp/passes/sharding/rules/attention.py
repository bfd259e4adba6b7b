"""Attention: every rank's queries see all keys, by an exchange where keys are split, too.

With `s` split and `t` whole, every rank attends with its own queries. With both split, the op
becomes `split_attention`, and the Ulysses pass trades the split of the sequence for one of heads.
Where tokens are the rows of a picture, keys and values are gathered instead.
"""

from __future__ import annotations

from ascend_sp.graph.layout import REPLICATE, Placement, Sequence, Shard, at_dim
from ascend_sp.graph.sizes import Size, equal
from ascend_sp.passes.sharding.rules.base import Answer, Call, Local, Operand, Unsupported, rule
from ascend_sp.runtime.ops import attention as attention_op
from ascend_sp.runtime.ops import split_attention

BATCH, HEADS, SEQ, DIM = range(4)


@rule(attention_op)
def attention(call: Call) -> Answer:
    """``(q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], mask) -> [b, h, s, e]``, also over `b`.

    Ulysses for self and joint attention, no communication for cross attention.
    """
    q, k, v = call.args[:3]
    mask = call.argument("attn_mask")
    causal = call.argument("is_causal")
    if (q.ndim, k.ndim, v.ndim) != (4, 4, 4):
        return Unsupported(f"attention over {q.ndim}-D tensors; only [B, H, S, D] is sharded")
    by_batch = _over_batch(q, k, v, mask)
    if by_batch is not None:
        return by_batch
    if not isinstance(q.placement, Shard):
        # Every rank computes all queries, so it needs all keys too.
        return Local(tuple(REPLICATE for _ in call.operands), (REPLICATE,))
    split = at_dim(q.shape, q.placement, SEQ)
    if split is None:
        return _rows_of_a_picture(call, q, mask, causal)
    keys = _keys(k, v, causal)
    if keys is None:
        return Unsupported("keys and values are split in different ways")
    inputs: list[Placement] = [split, keys, keys]
    if isinstance(mask, Operand):
        inputs.append(_mask(mask, split, keys))
    if isinstance(keys, Shard) and any(_grows(q.shape[d], k.shape[d]) for d in (BATCH, HEADS)):
        return Unsupported("queries are broadcast over the batch or the heads of the keys")
    travels = split_attention if isinstance(keys, Shard) else None
    return Local(tuple(inputs), (split,), op=travels)


def _rows_of_a_picture(call: Call, q: Operand, mask: Operand | None, causal: bool) -> Answer:
    """Tokens that are rows or columns of a picture: each rank's own attend to the keys of all."""
    split = q.shard
    if split.dim != SEQ or causal:
        return Unsupported(f"queries are split as {q.placement}, not along their sequence dim")
    inputs: list[Placement] = [split, REPLICATE, REPLICATE]
    if isinstance(mask, Operand):
        inputs.append(_mask(mask, split, REPLICATE))
    return Local(tuple(inputs), (split,))


def _keys(k: Operand, v: Operand, causal: bool) -> Placement | None:
    found = [at_dim(x.shape, x.placement, SEQ) for x in (k, v) if isinstance(x.placement, Shard)]
    if not found:
        # Causal attention of a few queries needs their position; let Ulysses bring all together.
        return Shard(SEQ, Sequence((k.shape[SEQ],))) if causal else REPLICATE
    if any(f is None or f != found[0] for f in found):
        return None
    return found[0]


def _mask(mask: Operand, split: Shard, keys: Placement) -> Placement:
    """Ulysses wants the whole mask; local queries want their rows of it."""
    dim = mask.ndim - 2
    if isinstance(keys, Shard) or dim < 0 or equal(mask.shape[dim], 1):
        return REPLICATE
    return split.moved(dim)


def _over_batch(q: Operand, k: Operand, v: Operand, mask: Operand | None) -> Answer | None:
    """Attention within groups of tokens (space or time): the split axis is a batch dim."""
    lead = next((x for x in (q, k, v) if isinstance(x.placement, Shard)), None)
    if lead is None or lead.shard.dim != BATCH or not _same_batch(q, k, v):
        return None
    if at_dim(lead.shape, lead.shard, SEQ) is not None:
        return None  # one token: it is the sequence
    inputs: list[Placement] = [lead.shard] * 3
    if isinstance(mask, Operand):
        whole = mask.ndim < 4 or equal(mask.shape[BATCH], 1)
        inputs.append(REPLICATE if whole else lead.shard)
    return Local(tuple(inputs), (lead.shard,))


def _grows(mine: Size, other: Size) -> bool:
    return equal(mine, 1) and not equal(other, 1)


def _same_batch(*xs: Operand) -> bool:
    return all(equal(x.shape[BATCH], xs[0].shape[BATCH]) for x in xs)
