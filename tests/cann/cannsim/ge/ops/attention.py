"""Fused attention: the references of cannsim.attention, with GE's names of inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cannsim import attention
from cannsim.ge.registry import Call, ints, kernel


def _refuse_others(call: Call, *known: str) -> None:
    """Raise for connected inputs that the reference knows nothing of."""
    others = [n for n in call.op.input_names if call.get(n) is not None and n not in known]
    if others:
        raise NotImplementedError(f"inputs {others} are not simulated")


def _lengths(call: Call, name: str) -> list[int] | None:
    """Lengths come as a tensor; its values mean nothing in an execution on zeros."""
    t = call.get(name)
    return None if t is None or call.dry else ints(t)


@kernel("FlashAttentionScore")
def flash_attention_score(call: Call, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    # The start indices say where the positional bias begins, and torchair always gives them.
    starts = ("q_start_idx", "kv_start_idx")
    _refuse_others(call, "query", "key", "value", "real_shift", "atten_mask", *starts)
    out, largest, total = attention.fusion_attention(
        q,
        k,
        v,
        call.attr("head_num"),
        call.attr("input_layout"),
        pse=call.get("real_shift"),
        atten_mask=call.get("atten_mask"),
        scale=call.attr("scale_value", 1.0),
        keep_prob=call.attr("keep_prob", 1.0),
        pre_tokens=call.attr("pre_tockens", attention.MAX_TOKENS),
        next_tokens=call.attr("next_tockens", attention.MAX_TOKENS),
        sparse_mode=call.attr("sparse_mode", 0),
        op="FlashAttentionScore",
    )
    return largest, total, q.new_empty(0), out


@kernel("PromptFlashAttention")
def prompt_flash_attention(call: Call, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    _refuse_others(call, "query", "key", "value", "pse_shift", "atten_mask",
                   "actual_seq_lengths", "actual_seq_lengths_kv")  # fmt: skip
    return attention.prompt_flash_attention(
        q,
        k,
        v,
        num_heads=call.attr("num_heads"),
        num_key_value_heads=call.attr("num_key_value_heads", 1),
        input_layout=call.attr("input_layout", "BSH"),
        atten_mask=call.get("atten_mask"),
        pse_shift=call.get("pse_shift"),
        actual_seq_lengths=_lengths(call, "actual_seq_lengths"),
        actual_seq_lengths_kv=_lengths(call, "actual_seq_lengths_kv"),
        scale_value=call.attr("scale_value", 1.0),
        pre_tokens=call.attr("pre_tokens", 214748647),
        next_tokens=call.attr("next_tokens", 0),
        sparse_mode=call.attr("sparse_mode", 0),
        op="PromptFlashAttention",
        check_values=not call.dry,
    )


@kernel("FusedInferAttentionScore")
def fused_infer_attention_score(call: Call, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """Key and value are lists in GE, here of one tensor each."""
    _refuse_others(call, "query", "key0", "value0", "pse_shift", "atten_mask",
                   "actual_seq_lengths", "actual_seq_lengths_kv")  # fmt: skip
    return attention.fused_infer_attention(
        q,
        k,
        v,
        num_heads=call.attr("num_heads"),
        num_key_value_heads=call.attr("num_key_value_heads", 0),
        input_layout=call.attr("input_layout", "BSH"),
        atten_mask=call.get("atten_mask"),
        pse_shift=call.get("pse_shift"),
        actual_seq_lengths=_lengths(call, "actual_seq_lengths"),
        actual_seq_lengths_kv=_lengths(call, "actual_seq_lengths_kv"),
        scale=call.attr("scale", 1.0),
        pre_tokens=call.attr("pre_tokens", attention.MAX_TOKENS),
        next_tokens=call.attr("next_tokens", attention.MAX_TOKENS),
        sparse_mode=call.attr("sparse_mode", 0),
        inner_precise=call.attr("inner_precise", 0),
        softmax_lse_flag=bool(call.attr("softmax_lse_flag", False)),
        op="FusedInferAttentionScore",
    )
