"""The transformers that the benchmarks run: diffusers' classes at real widths, few blocks deep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

HEAD = 128
"""Size of a head, as all three models have it."""


@dataclass(frozen=True)
class Benchmark:
    """A model and the arguments of one call, the same on every rank."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attentions: int

    def first_output(self, program: Callable[..., Any]) -> torch.Tensor:
        """Run `program` and return its first tensor."""
        out = program(*self.args, **self.kwargs)[0]
        return out[0] if isinstance(out, list) else out


def flux(double: int = 2, single: int = 4, heads: int = 8) -> Benchmark:
    """1024 image and 128 text tokens."""
    torch.manual_seed(0)
    image, text, text_dim, pooled_dim = 1024, 128, 1024, 512
    model = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        pooled_projection_dim=pooled_dim,
        guidance_embeds=True,
    )
    place = torch.arange(image)
    kwargs = {
        "hidden_states": torch.randn(1, image, 64),
        "encoder_hidden_states": torch.randn(1, text, text_dim),
        "pooled_projections": torch.randn(1, pooled_dim),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros(image), place // 32, place % 32], 1),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    name = f"FLUX {double}+{single} blocks, {heads} heads, {image} + {text} tokens"
    return Benchmark(name, model.eval(), (), kwargs, double + single)


def qwen(blocks: int = 3, heads: int = 8) -> Benchmark:
    """768 noise and 256 reference tokens, a prompt of 128 with 28 of them padding."""
    torch.manual_seed(0)
    text = 128
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=blocks,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=1024,
    )
    kwargs = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, text, 1024),
        "encoder_hidden_states_mask": torch.arange(text)[None] < 100,
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 24, 32), (1, 16, 16)]],
        "return_dict": False,
    }
    name = f"Qwen-Image-Edit {blocks} blocks, {heads} heads, 768 + 256 + {text} tokens, masked"
    return Benchmark(name, model.eval(), (), kwargs, blocks)


def z_image(blocks: int = 6, heads: int = 6) -> Benchmark:
    """1024 image tokens and a caption of 90, which the model pads to 96."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        dim=HEAD * heads,
        n_layers=blocks,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=1024,
    )
    # Its tables, which the first call would make: all programs here share the module.
    model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
    args = ([torch.randn(16, 1, 64, 64)], torch.tensor([0.7]), [torch.randn(90, 1024)])
    name = f"Z-Image {blocks}+2 blocks, {heads} heads, 1024 + 90 tokens"
    return Benchmark(name, model.eval(), args, {"return_dict": False}, blocks + 2)


def flux_wide(double: int = 1, single: int = 2, heads: int = 24) -> Benchmark:
    """FLUX at the width of FLUX.1: three times the arithmetic for each byte that travels."""
    return flux(double, single, heads)


MODELS: dict[str, Callable[..., Benchmark]] = {
    "flux": flux,
    "qwen": qwen,
    "z_image": z_image,
    "flux_wide": flux_wide,
}
USUAL = ["flux", "qwen", "z_image"]
"""Those that a benchmark runs unless told otherwise."""
