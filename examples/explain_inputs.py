"""Models at their real size and what their pipelines call them with, to be explained.

    python -m ascend_sp explain examples/explain_inputs.py:flux --height 2048 --width 2048 --ranks 8

Sizes are those of the picture, in pixels. Weights have no numbers, so nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)

DTYPE = torch.bfloat16
TOKEN = 16
"""Pixels of a token along each side: the VAE's 8, times patches of 2."""


def flux(
    height: int = 1024, width: int = 1024, text: int = 512, guidance: bool = True, **sizes: int
) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev; ``--guidance false`` is FLUX.1-schnell, ``--num_layers 2`` has fewer blocks."""
    model = FluxTransformer2DModel(guidance_embeds=guidance, **sizes)
    image = (height // TOKEN) * (width // TOKEN)
    return model.to(DTYPE), {
        "hidden_states": torch.randn(1, image, 64, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(1, text, 4096, dtype=DTYPE),
        "pooled_projections": torch.randn(1, 768, dtype=DTYPE),
        "timestep": torch.ones(1, dtype=DTYPE),
        "guidance": torch.ones(1) if guidance else None,
        "img_ids": torch.zeros(image, 3, dtype=DTYPE),
        "txt_ids": torch.zeros(text, 3, dtype=DTYPE),
        "return_dict": False,
    }


def qwen_image_edit(
    height: int = 1024, width: int = 1024, text: int = 1024, images: int = 1, **sizes: int
) -> tuple[Any, dict[str, Any]]:
    """Qwen-Image-Edit: `images` references of the picture's size, and a padded prompt."""
    model = QwenImageTransformer2DModel(**sizes)
    grid = (1, height // TOKEN, width // TOKEN)
    image = grid[1] * grid[2] * (1 + images)
    return model.to(DTYPE), {
        "hidden_states": torch.randn(1, image, 64, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(1, text, 3584, dtype=DTYPE),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool),
        "timestep": torch.ones(1, dtype=DTYPE),
        "img_shapes": [[grid] * (1 + images)],
        "return_dict": False,
    }


def flux2(
    height: int = 1024, width: int = 1024, text: int = 512, **sizes: int
) -> tuple[Any, dict[str, Any]]:
    """FLUX.2-dev."""
    model = Flux2Transformer2DModel(**sizes)
    image = (height // TOKEN) * (width // TOKEN)
    return model.to(DTYPE), {
        "hidden_states": torch.randn(1, image, model.config.in_channels, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(
            1, text, model.config.joint_attention_dim, dtype=DTYPE
        ),
        "timestep": torch.ones(1, dtype=DTYPE),
        "guidance": torch.ones(1, dtype=DTYPE),
        "img_ids": torch.zeros(1, image, 4, dtype=DTYPE),
        "txt_ids": torch.zeros(1, text, 4, dtype=DTYPE),
        "return_dict": False,
    }


def z_image(
    height: int = 1024, width: int = 1024, text: int = 256, **sizes: int
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Z-Image-Turbo."""
    model = ZImageTransformer2DModel(**sizes).to(DTYPE)
    with torch.device("cpu"):  # the tables that it makes in its first call
        model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
    picture = torch.randn(16, 1, height // 8, width // 8, dtype=DTYPE)
    caption = torch.randn(text, 2560, dtype=DTYPE)
    return model, ([picture], torch.ones(1, dtype=DTYPE), [caption]), {"return_dict": False}
