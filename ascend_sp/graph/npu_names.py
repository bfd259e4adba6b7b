"""The attention ops of torch_npu, and what each of them calls the things that all of them have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """What one op calls the things that all of them have."""

    heads: str
    scale: str
    before: str
    after: str
    groups: str = ""
    """Number of heads of keys; empty where the shapes say it."""
    tuple_result: bool = True


OPS = {
    "npu_fusion_attention": Names("head_num", "scale", "pre_tockens", "next_tockens"),
    "npu_fusion_attention_v2": Names("head_num", "scale", "pre_tokens", "next_tokens"),
    "npu_fusion_attention_v3": Names("head_num", "scale", "pre_tockens", "next_tockens"),
    "npu_prompt_flash_attention": Names(
        "num_heads", "scale_value", "pre_tokens", "next_tokens", "num_key_value_heads", False
    ),
    "npu_fused_infer_attention_score": Names(
        "num_heads", "scale", "pre_tokens", "next_tokens", "num_key_value_heads"
    ),
    "npu_fused_infer_attention_score_v2": Names(
        "num_query_heads", "softmax_scale", "pre_tokens", "next_tokens", "num_key_value_heads"
    ),
}

UNLIMITED = 2147483647
"""Default of most windows: no limit, whatever the lengths are."""
