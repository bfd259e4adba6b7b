"""Small autoencoders of those classes of diffusers that its own tests of models do not build.

Sizes are those of diffusers' tests of pipelines, or the smallest that a class takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from torch import nn

OWN: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AutoencoderKLAllegro": (
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        (1, 4, 3, 5, 7),
    ),
    "AutoencoderKLFlux2": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
        },
        (1, 4, 5, 7),
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64, 64, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 8,
            "sample_size": 32,
        },
        (1, 4, 5, 7),
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        {
            "latent_channels": 4,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
            "downsample_match_channel": False,
            "upsample_match_channel": False,
        },
        (1, 4, 2, 5, 7),
    ),
    "AutoencoderKLHunyuanVideo15": (
        {
            "latent_channels": 4,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
            "downsample_match_channel": False,
            "upsample_match_channel": False,
        },
        (1, 4, 2, 5, 7),
    ),
    "AutoencoderKLKVAEAudio": (
        {
            "encoder_dim": 4,
            "encoder_rates": [2, 3],
            "latent_dim": 16,
            "codebook_dim": 4,
            "decoder_dim": 16,
            "decoder_rates": [3, 2],
            "attn_num_heads": 2,
        },
        (1, 4, 17),
    ),
    "AutoencoderKLQwenImage": (
        {
            "base_dim": 24,
            "z_dim": 4,
            "dim_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        (1, 4, 1, 5, 7),
    ),
    "AutoencoderKLQwenImage21": (
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            "scale_factor_temporal": 2,
            "scale_factor_spatial": 4,
        },
        (1, 4, 1, 5, 7),
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 12,
            "downsampling_ratios": [2, 3],
            "decoder_channels": 12,
            "decoder_input_channels": 6,
            "audio_channels": 2,
            "channel_multiples": [2, 4],
        },
        (1, 6, 17),
    ),
    "Kandinsky6SRVAE": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (16, 32, 32),
            "decoder_block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
        },
        (1, 4, 2, 5, 7),
    ),
    "LongCatAudioDiTVae": (
        {
            "channels": 16,
            "c_mults": [1, 2],
            "strides": [2],
            "latent_dim": 8,
            "encoder_latent_dim": 16,
            "downsampling_ratio": 2,
        },
        (1, 8, 17),
    ),
    "MMAudioVAE": (
        {"mel_bins": 8, "latent_channels": 4, "hidden_channels": 16, "n_fft": 64, "hop_length": 16},
        (1, 4, 17),
    ),
}
"""Arguments of the class, and the shape of latents; their rows divide by no number of ranks."""


def own(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, and the shape of its latents."""
    arguments, latents = OWN[name]
    make: Callable[..., nn.Module] = getattr(diffusers, name)
    return make(**arguments).eval(), latents
