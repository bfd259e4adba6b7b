"""The pipelines of diffusers at reduced size with random weights: what runs where no hub is.

Every part is the library's own class (scheduler, transformer, VAE, text encoders), made narrow and
shallow. Only vocabularies cannot be made up: text is tokenised byte by byte.
"""

from __future__ import annotations

import os
from typing import Any

# Before the import: the libraries warn about optional packages while they load.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

END, PAD = "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL = (PAD, "<|im_start|>", END, VISION_START, VISION_END, IMAGE)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def tokenizer(longest: int = 1024, end: bool = False) -> Any:
    """One token a byte, and the special tokens; at most `longest` in all.

    With `end`, the last token says that the text ends: CLIP's vector is the one that lies there.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    if end:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, inner.token_to_id(END))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT,
        model_max_length=longest,
    )


VOCABULARY = 256 + len(SPECIAL)
IMAGE_ID, START_ID, END_ID = (256 + SPECIAL.index(s) for s in (IMAGE, VISION_START, VISION_END))


class Processor:
    """Text and pictures as the text encoder wants them.

    transformers' own processor for this model insists on torchvision, of which there is no build
    for CPUs on the usual index.
    """

    def __init__(self) -> None:
        # Few patches: a reduced encoder would spend most of its time on the picture.
        pixels = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 16}
        self.pictures = transformers.Qwen2VLImageProcessor(size=pixels)
        self.tokenizer = tokenizer()

    def __call__(
        self, text: list[str], images: Any, padding: bool, return_tensors: str
    ) -> transformers.BatchFeature:
        """Token ids, with as many image tokens as the encoder makes of each picture."""
        images = images if isinstance(images, list) else [images]
        seen = self.pictures(images=images, return_tensors=return_tensors)
        tokens = iter((seen["image_grid_thw"].prod(1) // 4).tolist())
        parts = [t.split(IMAGE) for t in text]
        filled = [p[0] + "".join(IMAGE * next(tokens) + rest for rest in p[1:]) for p in parts]
        ids = self.tokenizer(filled, padding=padding, return_tensors=return_tensors)
        return transformers.BatchFeature({**ids, **seen})


def _seeded(seed: int, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Weights of a sensible size: some parts start at zero, and a picture would be flat."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for p in module.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
        module.to(dtype).eval().requires_grad_(False)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip() -> transformers.CLIPTextModel:
    """FLUX's first text encoder: one vector for a text."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=256 + SPECIAL.index(END),
        )
    )


def t5() -> transformers.T5EncoderModel:
    """FLUX's second: one vector for each token."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=256,
            d_kv=32,
            d_ff=512,
            num_layers=2,
            num_heads=8,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def flux(seed: int, dtype: torch.dtype) -> FluxPipeline:
    """FLUX.1, with guidance: CLIP and T5 in front."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=128,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
    )
    text, text_2 = clip(), t5()
    vae = _vae()
    _seeded(seed, dtype, transformer, text, text_2, vae)
    return FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer(77, end=True),
        tokenizer_2=tokenizer(512, end=True),
    )


def qwen_image_edit(
    seed: int, dtype: torch.dtype, plus: bool = False
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """Qwen-Image-Edit, or Edit Plus, which takes several pictures and sets references apart."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        axes_dims_rope=(16, 24, 24),
        zero_cond_t=plus,
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": rope,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE_ID,
            vision_start_token_id=START_ID,
            vision_end_token_id=END_ID,
        )
    )
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    _seeded(seed, dtype, transformer, encoder, vae)
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    return kind(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=encoder,
        tokenizer=tokenizer(),
        processor=Processor(),
    )


def z_image(seed: int, dtype: torch.dtype) -> ZImagePipeline:
    """Z-Image: a language model's hidden states, refiners, one stream."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        dim=384,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=128,
        axes_dims=[16, 24, 24],
        axes_lens=[1024, 512, 512],
    )
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    vae = _vae()
    _seeded(seed, dtype, transformer, encoder, vae)
    return ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoder,
        tokenizer=tokenizer(),
    )


def picture(seed: int, side: int = 256) -> Image.Image:
    """A picture to edit: soft blobs of colour."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((smooth.permute(1, 2, 0) * 255).byte().numpy())
