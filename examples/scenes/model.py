"""A small FLUX that draws scenes by the sea, with the weights that `train.py` made.

The classes are diffusers' and transformers' own. The text encoders are those of `small.flux`, with
fixed random numbers: they are not trained, since even a random encoder tells words apart, and the
transformer learns what its vectors mean. The numbers are written here from a stream that never
changes, because a model that was trained on them needs the same ones on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

import small

from .draw import SIDE

__all__ = ["LETTERS", "SIDE", "WEIGHTS", "assemble", "load", "save", "transformer", "vae"]

WEIGHTS = Path(__file__).parent / "weights.safetensors"
LETTERS = 64
"""Tokens of a prompt, one a letter: what `max_sequence_length` must be."""
CHANNELS = 4
"""Of the latents."""


def transformer() -> FluxTransformer2DModel:
    """FLUX.1's transformer, narrow and shallow."""
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=5,
        num_attention_heads=4,
        attention_head_dim=24,
        axes_dims_rope=(4, 10, 10),
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
    )


def vae() -> AutoencoderKL:
    """FLUX.1's VAE, narrow, with fewer latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 48),
        norm_num_groups=4,
        latent_channels=CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def text_encoders() -> tuple[Any, Any]:
    """CLIP and T5 with numbers that are the same on every machine."""
    clip, t5 = small.clip(), small.t5()
    for encoder, embedding in ((clip, 0.02), (t5, 1.0)):
        _fill(encoder, embedding)
        encoder.eval().requires_grad_(False)
    return clip, t5


def _fill(module: nn.Module, embedding: float) -> None:
    # NumPy promises that the numbers of RandomState stay; PyTorch and transformers promise nothing
    # about theirs. Vectors are ones and zeros already.
    numbers = np.random.RandomState(0)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                std = embedding if id(p) in tables else p.shape[-1] ** -0.5
                p.copy_(torch.from_numpy(numbers.standard_normal(tuple(p.shape)) * std))


def assemble(flux: FluxTransformer2DModel, pictures: AutoencoderKL) -> FluxPipeline:
    """The pipeline of diffusers around a transformer and a VAE."""
    clip, t5 = text_encoders()
    return FluxPipeline(
        transformer=flux.eval().requires_grad_(False),
        vae=pictures.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=small.tokenizer(77, end=True),
        tokenizer_2=small.tokenizer(512, end=True),
    )


def load(dtype: torch.dtype, path: Path = WEIGHTS) -> FluxPipeline:
    """The trained pipeline.

    Raises:
        FileNotFoundError: there are no weights at `path`.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["latents"])
    weights = safetensors.torch.load_file(path)
    flux, pictures = transformer(), vae()
    flux.load_state_dict(_under("transformer.", weights))
    pictures.decoder.load_state_dict(_under("vae.decoder.", weights))
    pictures.register_to_config(**about)
    pipe = assemble(flux, pictures)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.to(dtype)
    return pipe


def save(flux: Mapping[str, torch.Tensor], pictures: AutoencoderKL, path: Path) -> None:
    """Write a transformer's weights and a VAE's decoder in half precision."""
    parts = {"transformer.": flux, "vae.decoder.": pictures.decoder.state_dict()}
    weights = {p + k: v.half().contiguous() for p, part in parts.items() for k, v in part.items()}
    about = {k: pictures.config[k] for k in ("scaling_factor", "shift_factor")}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path, {"latents": json.dumps(about)})


def _under(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    n = len(prefix)
    return {k[n:]: v.float() for k, v in weights.items() if k.startswith(prefix)}
