"""Text encoders of the pipelines that we serve: transformers' own classes, reduced configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

IMAGE, START, END = 90, 91, 92


def seeded(model: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model changes the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_meta:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def t5(heads: int = 5, layers: int = 2) -> nn.Module:
    """As FLUX has it: gated gelu, a bias per head that the first layer makes for all."""
    return seeded(
        T5EncoderModel(
            T5Config(
                vocab_size=407,
                d_model=36,
                d_kv=8,
                d_ff=61,
                num_layers=layers,
                num_heads=heads,
                feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=8,
                relative_attention_max_distance=16,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
    )


def qwen3(heads: int = 6, kv_heads: int = 2, layers: int = 2) -> nn.Module:
    """As Z-Image has it: norms per head, grouped heads, a head dim of its own."""
    return seeded(
        Qwen3Model(
            Qwen3Config(
                vocab_size=407,
                hidden_size=40,
                intermediate_size=75,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=16,
            )
        )
    )


def qwen_vl(heads: int = 7, kv_heads: int = 1, vision_heads: int = 3) -> nn.Module:
    """As Qwen-Image-Edit has it, with the vision tower."""
    width = 8 * heads
    return seeded(
        Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": 408,
                    "hidden_size": width,
                    "intermediate_size": 77,
                    "num_hidden_layers": 2,
                    "num_attention_heads": heads,
                    "num_key_value_heads": kv_heads,
                    "rope_parameters": {
                        "rope_type": "default",
                        "mrope_section": [1, 1, 2],
                        "rope_theta": 1e4,
                    },
                },
                vision_config={
                    "depth": 2,
                    "hidden_size": 16 * vision_heads,
                    "num_heads": vision_heads,
                    "intermediate_size": 45,
                    "out_hidden_size": width,
                    "patch_size": 4,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                image_token_id=IMAGE,
                vision_start_token_id=START,
                vision_end_token_id=END,
            )
        )
    )


def clip(heads: int = 3) -> nn.Module:
    """As FLUX has it, beside T5."""
    return seeded(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=407,
                hidden_size=8 * heads,
                intermediate_size=50,
                num_hidden_layers=2,
                num_attention_heads=heads,
                max_position_embeddings=32,
                eos_token_id=406,
            )
        )
    )


MODELS = {"t5": t5, "qwen3": qwen3, "qwen_vl": qwen_vl, "clip": clip}


def inputs(model: nn.Module, seed: int = 0, length: int = 11) -> dict[str, Any]:
    """Two prompts, one of them padded; with a picture for a model that sees."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    out: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        # Two pictures of 4 by 8 patches: 8 tokens each, after the merger.
        picture = torch.tensor([START, *[IMAGE] * 8, END]).expand(2, -1)
        out["input_ids"] = torch.cat([picture, ids], 1)
        out["attention_mask"] = torch.cat([torch.ones_like(picture), mask], 1)
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
        out["image_grid_thw"] = torch.tensor([[1, 4, 8]] * 2)
        out["pixel_values"] = torch.randn(2 * 32, 3 * 2 * 4 * 4, generator=generator)
    if not isinstance(model, (T5EncoderModel, CLIPTextModel)):
        out["output_hidden_states"] = True
    return out


def outputs(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """All hidden states, and logits where there are any."""
    out = model(**given)
    states = [out.last_hidden_state] if "last_hidden_state" in out else [out.logits]
    return [*states, *(out.hidden_states or ())]


LIMIT = 1e-5


def off(got: list[Tensor], want: list[Tensor]) -> float:
    assert len(got) == len(want)
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def wrapped(model: nn.Module) -> list[str]:
    """Modules whose `forward` is not that of their class: none, once all proofs are done."""
    return [n for n, m in model.named_modules() if "forward" in vars(m)]


class Odd(nn.Module):
    """Attention whose query heads share K/V heads in turn, where ours are neighbours."""

    def __init__(self, blocks: str = "3hd", heads: int = 4, kv_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, 5
        self.blocks, self.inner = blocks, heads * 5
        self.qkv = nn.Linear(16, (heads + 2 * kv_heads) * 5)
        self.out = nn.Linear(heads * 5, 16)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        y = self.qkv(x)
        if self.blocks == "h3d":
            q, k, v = y.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        else:
            q, k, v = y.unflatten(-1, (-1, self.head_dim)).split(sizes, -2)
        if self.blocks == "turns":
            k, v = (z.repeat(1, 1, self.num_heads // self.num_kv_heads, 1) for z in (k, v))
        else:
            k, v = (z.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mlp = inner, nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x)
        return x + self.mlp(x)
