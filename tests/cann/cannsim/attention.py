"""CPU references of Ascend's fused attention ops, and what is legal to ask of them.

One function for each op; eager mode and GE share them, so there is one truth for each. The rules
are those of the op-plugin's documents. A call that breaks one raises `IllegalCallError`: the device
would fail, or worse, compute something else.

Masks: true (1) means masked out. Sums are made in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOKENS = 2147483647
COMPRESSED = (2048, 2048)  # the mask that sparse modes 2, 3 and 4 want
_MAX_LENGTH = 20 * 1024 * 1024

_UNALIGNED = 128  # largest head size that prompt_flash_attention takes unaligned


class IllegalCallError(RuntimeError):
    """The op's documents forbid this call."""


@dataclass(frozen=True)
class Scores:
    """Attention, and what its softmax was made of, in BNSD."""

    out: Tensor
    largest: Tensor
    total: Tensor

    @property
    def lse(self) -> Tensor:
        return self.largest + self.total.log()


def _require(op: str, ok: bool, why: str) -> None:
    if not ok:
        raise IllegalCallError(f"{op}: {why}")


# ---- layouts ----


def _to_bnsd(op: str, t: Tensor, layout: str, heads: int, what: str) -> Tensor:
    if layout in ("BSH", "SBH"):
        _require(op, t.dim() == 3, f"{what} must have 3 dims for layout {layout}")
        _require(op, t.shape[2] % heads == 0, f"{what}: H={t.shape[2]} is not {heads} heads")
        t = t if layout == "BSH" else t.transpose(0, 1)
        return t.unflatten(2, (heads, -1)).transpose(1, 2)
    _require(op, t.dim() == 4, f"{what} must have 4 dims for layout {layout}")
    t = t.transpose(1, 2) if layout == "BSND" else t
    _require(op, t.shape[1] == heads, f"{what} has {t.shape[1]} heads, and {heads} are declared")
    return t


def _from_bnsd(t: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return t.contiguous()
    if layout == "BSND":
        return t.transpose(1, 2).contiguous()
    if layout == "NBSD":
        return t.transpose(0, 1).contiguous()
    t = t.transpose(1, 2).flatten(2)
    return t.contiguous() if layout == "BSH" else t.transpose(0, 1).contiguous()


def _layouts(op: str, layout: str, known: Sequence[str]) -> tuple[str, str]:
    """Layout of the inputs and of the output."""
    if layout not in known:
        raise NotImplementedError(f"{op}: layout {layout!r} is not simulated, only {list(known)}")
    of_input, _, of_output = layout.partition("_")
    return of_input, of_output or of_input


def _dtypes(op: str, q: Tensor, k: Tensor, v: Tensor, *, half_only: bool) -> None:
    _require(op, q.dtype == k.dtype == v.dtype, f"dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}")
    strict = half_only and os.environ.get("CANNSIM_STRICT_DTYPES") == "1"
    allowed = (torch.float16, torch.bfloat16) if strict else (
        torch.float16, torch.bfloat16, torch.float32)  # fmt: skip
    _require(op, q.dtype in allowed, f"{q.dtype} is not supported, only {list(allowed)}")


def _sizes(op: str, q: Tensor, k: Tensor, v: Tensor, max_heads: int = 256) -> None:
    """Sizes of BNSD operands that belong together."""
    _require(op, q.shape[0] == k.shape[0] == v.shape[0], "batch sizes differ")
    _require(op, k.shape[1:3] == v.shape[1:3], "key and value differ in heads or length")
    _require(op, q.shape[3] == k.shape[3], "head sizes of query and key differ")
    _require(op, q.shape[1] <= max_heads, f"{q.shape[1]} heads, at most {max_heads}")
    groups = k.shape[1] and q.shape[1] % k.shape[1] == 0
    _require(op, bool(groups), f"{q.shape[1]} heads cannot share {k.shape[1]} key heads")


# ---- masks ----


def _band(q: int, k: int, before: int, after: int) -> Tensor:
    """True where key j is outside [i - before, i + after] of query i."""
    distance = torch.arange(k)[None, :] - torch.arange(q)[:, None]
    return (distance > after) | (distance < -before)


def _sparse_mask(
    op: str,
    mask: Tensor | None,
    sizes: tuple[int, int],
    sparse_mode: int,
    before: int,
    after: int,
    shapes: Sequence[tuple[int, ...]],
) -> Tensor | None:
    """The full mask, broadcastable to BNSS.

    Args:
        op: its name, for errors.
        mask: as given.
        sizes: query and key length.
        sparse_mode: 0, 1: `mask` is whole; 2, 3: it is the compressed causal one.
        before: pre_tokens.
        after: next_tokens.
        shapes: legal shapes of a whole mask.
    """
    q, k = sizes
    if mask is not None:
        ok = mask.dtype in (torch.bool, torch.uint8, torch.int8)
        _require(op, ok, f"atten_mask must be bool, int8 or uint8, not {mask.dtype}")
    if sparse_mode in (2, 3):
        given = None if mask is None else tuple(mask.shape[-2:])
        _require(
            op,
            given == COMPRESSED,
            f"sparse_mode {sparse_mode} needs the compressed causal mask {COMPRESSED}, not "
            f"{'none' if mask is None else tuple(mask.shape)}",
        )
        return _band(q, k, MAX_TOKENS, 0 if sparse_mode == 2 else k - q)
    if sparse_mode not in (0, 1):
        raise NotImplementedError(f"{op}: sparse_mode {sparse_mode} is not simulated")
    if mask is None:
        # Without a mask the documents have pre_tokens and next_tokens ignored.
        _require(op, sparse_mode == 0, "sparse_mode 1 needs an atten_mask")
        return None
    _require(
        op,
        tuple(mask.shape) in set(shapes),
        f"atten_mask of shape {tuple(mask.shape)}; legal here are {sorted(set(shapes))}",
    )
    mask = mask.bool()
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if sparse_mode == 0 and (after < k or before < q):
        mask = mask | _band(q, k, before, after)
    return mask


def _lengths(op: str, lengths: Sequence[int] | None, batch: int, size: int, what: str) -> Tensor:
    """True at positions behind each sample's length: [B, size]."""
    if lengths is None or len(lengths) == 0:
        return torch.zeros(batch, size, dtype=torch.bool)
    given = list(lengths)
    _require(op, len(given) in (1, batch), f"{what} has {len(given)} entries for batch {batch}")
    _require(op, all(0 <= n <= size for n in given), f"{what}={given} does not fit length {size}")
    given = given * batch if len(given) == 1 else given
    return torch.arange(size)[None, :] >= torch.tensor(given)[:, None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None = None
) -> Scores:
    """Attention in BNSD; a row with everything masked is NaN."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.float()
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return Scores(((weights / total) @ v.float()).to(q.dtype), largest, total)


# ---- the ops ----


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = MAX_TOKENS,
    next_tokens: int = MAX_TOKENS,
    sparse_mode: int = 0,
    op: str = "npu_fusion_attention",
    check_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The training op: output, softmax maximum and softmax sum (both [B, N, S, 8])."""
    of_input, of_output = _layouts(op, input_layout, ("BSH", "SBH", "BSND", "BNSD"))
    _dtypes(op, query, key, value, half_only=False)
    q = _to_bnsd(op, query, of_input, head_num, "query")
    k_heads = head_num
    if of_input in ("BSH", "SBH"):
        _require(op, key.shape[2] % q.shape[3] == 0, "key does not hold whole heads")
        k_heads = key.shape[2] // q.shape[3]
    else:
        k_heads = key.shape[2 if of_input == "BSND" else 1]
    k = _to_bnsd(op, key, of_input, k_heads, "key")
    v = _to_bnsd(op, value, of_input, k_heads, "value")
    _sizes(op, q, k, v)
    _require(op, 1 <= q.shape[3] <= 768, f"head size {q.shape[3]} is not in 1..768")
    _require(op, max(q.shape[2], k.shape[2]) <= 1 << 20, "longer than 1M tokens")
    if keep_prob != 1.0:
        raise NotImplementedError(f"{op}: dropout (keep_prob {keep_prob}) is not simulated")
    b, n, s, t = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    shapes = [(b, n, s, t), (b, 1, s, t), (1, 1, s, t), (s, t)]
    mask = _sparse_mask(op, atten_mask, (s, t), sparse_mode, pre_tokens, next_tokens, shapes)
    found = _attend(q, k, v, scale, mask, pse)

    def eight(x: Tensor) -> Tensor:
        return x.expand(*x.shape[:-1], 8).contiguous()

    return _from_bnsd(found.out, of_output), eight(found.largest), eight(found.total)


def prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    scale_value: float = 1.0,
    pre_tokens: int = MAX_TOKENS,
    next_tokens: int = 0,
    sparse_mode: int = 0,
    op: str = "npu_prompt_flash_attention",
    check_values: bool = True,
) -> Tensor:
    """The inference op of older CANN. next_tokens is 0, which with a mask means causal."""
    of_input, of_output = _layouts(op, input_layout, ("BSH", "BSND", "BNSD", "BNSD_BSND"))
    _dtypes(op, query, key, value, half_only=True)
    if of_input == "BSH":
        _require(op, query.shape[2] < 65535, f"N*D={query.shape[2]} must be below 65535 in BSH")
    k_heads = num_key_value_heads or num_heads
    q = _to_bnsd(op, query, of_input, num_heads, "query")
    k = _to_bnsd(op, key, of_input, k_heads, "key")
    v = _to_bnsd(op, value, of_input, k_heads, "value")
    _sizes(op, q, k, v)
    size = q.shape[3]
    _require(op, size <= 512, f"head size {size} is above 512")
    _require(op, size % 16 == 0 or size <= _UNALIGNED, f"unaligned head size {size} above 128")
    _require(op, max(q.shape[2], k.shape[2]) <= _MAX_LENGTH, "longer than 20M tokens")
    b, s, t = q.shape[0], q.shape[2], k.shape[2]
    shapes = [(s, t), (b, s, t), (1, s, t), (b, 1, s, t), (1, 1, s, t)]
    mask = _sparse_mask(op, atten_mask, (s, t), sparse_mode, pre_tokens, next_tokens, shapes)
    late = _lengths(op, actual_seq_lengths_kv, b, t, "actual_seq_lengths_kv")[:, None, None, :]
    beyond = _lengths(op, actual_seq_lengths, b, s, "actual_seq_lengths")[:, None, :, None]
    mask = late if mask is None else mask | late
    if check_values:
        rows = mask.all(-1, keepdim=True) & ~beyond
        _require(op, not bool(rows.any()), "a query has every key masked out")
    found = _attend(q, k, v, scale_value, mask, pse_shift)
    return _from_bnsd(found.out.masked_fill(beyond, 0.0), of_output)


def fused_infer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    scale: float = 1.0,
    pre_tokens: int = MAX_TOKENS,
    next_tokens: int = MAX_TOKENS,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    op: str = "npu_fused_infer_attention_score",
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """The inference op; output and log-sum-exp ([B, N, S, 1], empty if not asked for).

    A row with everything masked is NaN here (the device leaves rubbish), except with
    inner_precise 2 or 3, which corrects such rows to 0.
    """
    known = ("BSH", "BSND", "BNSD", "BNSD_BSND", "BSND_BNSD", "BSND_NBSD", "BSH_NBSD",
             "BNSD_NBSD", "BSH_BNSD")  # fmt: skip
    of_input, of_output = _layouts(op, input_layout, known)
    _dtypes(op, query, key, value, half_only=True)
    k_heads = num_key_value_heads or num_heads
    q = _to_bnsd(op, query, of_input, num_heads, "query")
    k = _to_bnsd(op, key, of_input, k_heads, "key")
    v = _to_bnsd(op, value, of_input, k_heads, "value")
    _sizes(op, q, k, v)
    for what, size in (("query and key", q.shape[3]), ("value", v.shape[3])):
        _require(op, size <= 512, f"head size {size} of {what} is above 512")
        # In bytes of the two-byte dtypes that the device takes; fp32 stands for them in tests.
        _require(op, size * 2 % 16 == 0, f"head size {size} of {what} is not 16-byte aligned")
    _require(op, max(q.shape[2], k.shape[2]) <= _MAX_LENGTH, "longer than 20M tokens")
    b, s, t = q.shape[0], q.shape[2], k.shape[2]
    shapes = [(s, t), (1, s, t), (b, 1, s, t), (1, 1, s, t)]
    mask = _sparse_mask(op, atten_mask, (s, t), sparse_mode, pre_tokens, next_tokens, shapes)
    late = _lengths(op, actual_seq_lengths_kv, b, t, "actual_seq_lengths_kv")[:, None, None, :]
    beyond = _lengths(op, actual_seq_lengths, b, s, "actual_seq_lengths")[:, None, :, None]
    mask = late if mask is None else mask | late
    found = _attend(q, k, v, scale, mask, pse_shift)
    zero = beyond
    if inner_precise in (2, 3):
        zero = zero | mask.all(-1, keepdim=True)
    out = _from_bnsd(found.out.masked_fill(zero, 0.0), of_output)
    lse = found.lse if softmax_lse_flag else torch.zeros(0)
    return out, lse
