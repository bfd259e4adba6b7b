"""diffusers' own classes with small random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """`model` with weights that hide no mistake: diffusers starts some gates at zero."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.2)
    return model.eval()


def vae() -> nn.Module:
    """Autoencoder of pictures: three sizes, attention with one head in the middle."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
    ).eval()


def unet() -> nn.Module:
    """A U-Net as SDXL's: convolutions, attention in half of its blocks, sizes as a condition."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        norm_num_groups=8,
    ).eval()


def unet_inputs(height: int = 10, width: int = 6, text: int = 7) -> dict[str, Any]:
    """What a pipeline calls it with."""
    g = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, height, width, generator=g),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, text, 32, generator=g),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 16, generator=g),
            "time_ids": torch.tensor([[64.0, 48, 0, 0, 64, 48]]).repeat(2, 1),
        },
    }


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
    model = diffusers.FluxTransformer2DModel(
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
    return randomised(model).to(dtype)


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


def flux_controlnet(double: int = 2, single: int = 1) -> nn.Module:
    """A ControlNet for FLUX, which returns a residual for each of its blocks."""
    torch.manual_seed(0)
    model = diffusers.FluxControlNetModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return randomised(model)


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """Image first, joined behind the head transpose; batch 2."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=32,
        caption_projection_dim=24,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=24,
    )
    return randomised(model), {
        "hidden_states": torch.randn(2, 4, 16, 12),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3.0, 5.0]),
        "return_dict": False,
    }


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """A patchifying convolution, self attention with rotary by slices, and cross attention."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return randomised(model), {
        "hidden_states": torch.randn(1, 4, 3, 6, 10),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
        "return_dict": False,
    }


def ltx() -> tuple[nn.Module, dict[str, Any]]:
    """Cross attention with a float mask that is expanded over the heads."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
    )
    return randomised(model), {
        "hidden_states": torch.randn(1, 30, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
        "encoder_attention_mask": torch.tensor([[1.0] * 7 + [0] * 2]),
        "num_frames": 2,
        "height": 3,
        "width": 5,
        "return_dict": False,
    }


def sana() -> tuple[nn.Module, dict[str, Any]]:
    """Linear attention, which adds up over the sequence, and convolutions over the tokens."""
    model = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    return randomised(model), {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 8, 8),
        "return_dict": False,
    }


def qwen(
    heads: int = 4, layers: int = 2, zero_cond_t: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The double-stream transformer of the edit pipelines; rotary embedding by complex numbers."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    return randomised(model).to(dtype)


def qwen_inputs(
    batch: int = 1,
    sizes: Sequence[tuple[int, int]] = ((4, 4), (3, 4)),
    text: int = 7,
    mask: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    """Keyword arguments of one call.

    `sizes` are the heights and widths, in tokens, of the noise and of each reference image behind
    it; `mask` the number of real prompt tokens of each batch item, None for no mask.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in sizes)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, tokens, 16, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=g).to(dtype),
        "timestep": torch.full((batch,), 0.7, dtype=dtype),
        "img_shapes": [[(1, h, w) for h, w in sizes]] * batch,
        "return_dict": False,
    }
    if mask is not None:
        inputs["encoder_hidden_states_mask"] = torch.arange(text) < torch.tensor(mask)[:, None]
    return inputs


def z_image(heads: int = 3, layers: int = 2, warm: bool = True) -> nn.Module:
    """Refiners and one stream. Cold, it makes its rotary tables inside the first call."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16 * heads,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 64, 64],
    )
    if warm:
        model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
    return randomised(model)


def z_image_inputs(
    sizes: Sequence[tuple[int, int]] = ((12, 16),), text: Sequence[int] = (9,), seed: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Positional arguments of one call: for each batch item a latent size and a caption length."""
    g = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(4, 1, h, w, generator=g) for h, w in sizes],
        torch.full((len(sizes),), 0.7),
        [torch.randn(n, 32, generator=g) for n in text],
    )
