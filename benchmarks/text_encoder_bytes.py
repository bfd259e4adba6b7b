"""Weights that a rank holds of the text encoders of three pipelines, without having the weights.

torchrun --nproc-per-node 4 benchmarks/text_encoder_bytes.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

import ascend_sp


def encoders() -> Iterator[tuple[str, nn.Module]]:
    t5 = T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    yield "FLUX: T5-XXL encoder", T5EncoderModel(t5)
    vl = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
    )
    yield "Qwen-Image: Qwen2.5-VL-7B", Qwen2_5_VLForConditionalGeneration(vl)
    qwen3 = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    yield "Z-Image: Qwen3-4B", Qwen3Model(qwen3)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        models = list(encoders())
    for name, model in models:
        report = ascend_sp.parallelize_text_encoder(model)
        if dist.get_rank() == 0:
            print(f"{name}\n{report}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
