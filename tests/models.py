"""diffusers' own classes with small random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

GUIDANCE = {True: "guidance", False: "no guidance"}


def flux(
    double: int = 1,
    single: int = 1,
    heads: int = 4,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
) -> nn.Module:
    """A FLUX transformer of `double` + `single` blocks."""
    torch.manual_seed(0)
    third = head_dim // 8 * 3
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(head_dim - 2 * third, third, third),
    )
    # diffusers starts some gates and norms at values that hide mistakes.
    for p in model.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.2)
    return model.eval().to(dtype)


def flux_inputs(
    batch: int = 1,
    image: int = 16,
    text: int = 8,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    """Keyword arguments of one call: `image` and `text` are numbers of tokens."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    side = max(1, round(image**0.5))
    ids = torch.stack([torch.zeros(image), torch.arange(image) // side, torch.arange(image) % side])
    return {
        "hidden_states": rand(batch, image, 16),
        "encoder_hidden_states": rand(batch, text, 32),
        "pooled_projections": rand(batch, 32),
        "timestep": torch.full((batch,), 0.7, dtype=dtype),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
        "img_ids": ids.T.contiguous().to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "return_dict": False,
    }
