"""Make `weights.safetensors`: a VAE, then a FLUX, on scenes that `draw.py` draws.

    make weights    # or: cd examples && torchrun --nproc-per-node 2 -m scenes.train

First the VAE learns to compress pictures, 64 pixels to one latent of four channels. Then the
transformer learns, from pairs of caption and compressed picture, to tell the noise in a mixture of
both: at noise level s of 0 to 1 the mixture is (1 - s) picture + s noise, and what is asked for is
noise - picture (a rectified flow), which is what FLUX's scheduler integrates. All numbers are drawn
from fixed seeds. Each process is one core, and takes its share of every batch. Now and then the
weights are written, and a sheet of samples is drawn with them.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import nn

from . import model
from .draw import SIDE, draw
from .fit import RANK, WORLD, fit, say
from .words import Scene, caption, scene

PROMPTS = (
    "a lighthouse at night under a full moon",
    "a lighthouse on a cliff by day",
    "a ship at sunset, the sun",
    "a ship at night, the moon",
    "a lighthouse and a ship by day under the sun",
    "a lighthouse on the left at dusk",
    "the sea at night with a full moon",
    "a ship",
)
BATCH = 16
GUIDANCE = 3.5  # FLUX is told a guidance. This one has seen no other than the pipeline's default.


def main() -> None:
    """Train both, and write the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=model.WEIGHTS)
    add("--work", type=Path, default=Path("out/scenes"), help="for the VAE and the samples")
    add("--keep-vae", action="store_true", help="take the VAE of an earlier run from --work")
    add("--vae-steps", type=int, default=1500)
    add("--steps", type=int, default=3000, help="of the transformer")
    add("--scenes", type=int, default=6000, help="that the transformer learns from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    pictures = model.vae().to(memory_format=torch.channels_last)
    file = args.work / "vae.safetensors"
    if args.keep_vae:
        safetensors.torch.load_model(pictures, file)
    else:
        train_vae(pictures, args.vae_steps)
    pictures.eval().requires_grad_(False)
    if RANK == 0:
        safetensors.torch.save_model(pictures, str(file))
        show_vae(pictures, args.work / "vae.png")

    scenes, captions = some_scenes(args.scenes)
    latents = compressed(pictures, scenes)
    torch.manual_seed(1)
    flux = model.transformer()
    start(flux)
    train_flux(flux, pictures, latents, captions, args)
    if WORLD > 1:
        dist.destroy_process_group()


# --- the VAE


def as_tensor(what: Scene) -> torch.Tensor:
    """A picture as a VAE wants it: [3, side, side], from -1 to 1."""
    return torch.from_numpy(draw(what)).permute(2, 0, 1).float() / 127.5 - 1


def error(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of pixels, and of what they differ by from their neighbours, which is what makes edges."""
    off = made - real
    return off.abs().mean() + (off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()) / 2


def train_vae(pictures: AutoencoderKL, steps: int) -> None:
    """Learn to compress: on pieces, which are cheap, and on whole pictures at the end."""
    rng, done = random.Random(RANK), 0

    def loss() -> torch.Tensor:
        whole = done >= steps * 0.9
        batch = []
        for _ in range((4 if whole else 8) // WORLD):
            picture = as_tensor(scene(rng))
            # Two pieces of a picture: what is in it, and what drawing it cost, counts twice.
            for _ in range(1 if whole else 2):
                at = [rng.randrange(0, SIDE - 96 + 1) for _ in range(2)]
                batch.append(picture if whole else picture[:, at[0] :, at[1] :][:, :96, :96])
        real = torch.stack(batch).contiguous(memory_format=torch.channels_last)
        spread = pictures.encode(real).latent_dist
        made = pictures.decode(spread.sample()).sample
        return error(made, real) + 1e-3 * spread.kl().mean() / spread.mean[0].numel()

    for done, average in fit(pictures, steps, 2e-3, loss, "VAE"):  # noqa: B007
        best = average.state_dict()
    pictures.load_state_dict(best)


def show_vae(pictures: AutoencoderKL, path: Path) -> None:
    """Scenes that it has not seen, and what is left of them."""
    real = torch.stack([as_tensor(scene(random.Random(-1 - i))) for i in range(8)])
    with torch.no_grad():
        made = pictures.decode(pictures.encode(real).latent_dist.mode()).sample
    say(f"VAE: pictures that it has not seen are off by {(made - real).abs().mean() * 127.5:.1f}")
    sheet([*real, *made], 8, path)


def sheet(pictures: list[torch.Tensor], across: int, path: Path) -> None:
    """Write pictures of -1 to 1 side by side."""
    rows = [torch.cat(pictures[i : i + across], 2) for i in range(0, len(pictures), across)]
    pixels = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


# --- the transformer


def start(flux: FluxTransformer2DModel) -> None:
    """What a transformer of this kind starts from: modulations that do nothing, and no output."""
    for name, layer in flux.named_modules():
        if isinstance(layer, nn.Linear):
            if "norm" in name and name.endswith(".linear"):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(flux.proj_out.weight)


def some_scenes(count: int) -> tuple[list[Scene], list[str]]:
    """Scenes to learn from, and a caption for each."""
    rng = random.Random(1)
    scenes, captions = [scene(rng) for _ in range(count)], []
    for what in scenes:
        text = caption(what, rng)
        while len(text) >= model.LETTERS:
            text = caption(what, rng)
        captions.append(text)
    return scenes, captions


def compressed(pictures: AutoencoderKL, scenes: list[Scene]) -> torch.Tensor:
    """Scenes as the transformer is to learn them, scaled to mean 0 and variance 1."""
    begin, parts = time.time(), []
    with torch.no_grad():
        for what in scenes[RANK::WORLD]:
            real = as_tensor(what)[None].contiguous(memory_format=torch.channels_last)
            parts.append(pictures.encode(real).latent_dist.mode().contiguous())
    latents = torch.cat(parts)
    if WORLD > 1:
        shares = [torch.empty_like(latents) for _ in range(WORLD)]
        dist.all_gather(shares, latents)
        latents = torch.stack(shares, 1).flatten(0, 1)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    pictures.register_to_config(shift_factor=shift, scaling_factor=scale)
    minutes = (time.time() - begin) / 60
    say(f"{len(scenes)} scenes are drawn and compressed: {minutes:.1f} minutes")
    return (latents - shift) * scale


def train_flux(
    flux: FluxTransformer2DModel,
    pictures: AutoencoderKL,
    latents: torch.Tensor,
    captions: list[str],
    args: argparse.Namespace,
) -> None:
    """Learn to tell noise from picture, given the caption."""
    pipe = model.assemble(copy.deepcopy(flux), pictures)
    pipe.set_progress_bar_config(disable=True)
    texts = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    of_scene = torch.tensor([texts[text] for text in captions])
    begin, vectors, pooled = time.time(), [], []
    with torch.no_grad():
        for i in range(0, len(texts), 64):
            v, p, _ = pipe.encode_prompt(
                list(texts)[i : i + 64],
                device=torch.device("cpu"),
                max_sequence_length=model.LETTERS,
            )
            vectors.append(v.half())  # for memory's sake
            pooled.append(p)
    encoded, pool = torch.cat(vectors), torch.cat(pooled)
    say(f"{len(texts)} captions are encoded: {(time.time() - begin) / 60:.1f} minutes")
    packed = pipe._pack_latents(latents, *latents.shape).contiguous()
    side = latents.shape[-1] // 2
    image_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    text_ids = torch.zeros(model.LETTERS, 3)
    guidance = torch.full((BATCH // WORLD,), GUIDANCE)
    generator = torch.Generator().manual_seed(2)  # the same on all processes
    order: list[int] = []

    def loss() -> torch.Tensor:
        nonlocal order
        if len(order) < BATCH:
            order = torch.randperm(len(packed), generator=generator).tolist()
        rows, order = torch.tensor(order[:BATCH]), order[BATCH:]
        noise = torch.randn(packed[rows].shape, generator=generator)
        # Levels in the middle are the hard ones; more towards noise, where the plan is made.
        level = (torch.randn(BATCH, generator=generator) + 0.4).sigmoid()
        rows, noise, level = rows[RANK::WORLD], noise[RANK::WORLD], level[RANK::WORLD]
        picture, s = packed[rows], level[:, None, None]
        told = flux(
            hidden_states=(1 - s) * picture + s * noise,
            encoder_hidden_states=encoded[of_scene[rows]].float(),
            pooled_projections=pool[of_scene[rows]],
            timestep=level,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=guidance,
        ).sample
        return (told - (noise - picture)).square().mean()

    flux.train()
    for step, average in fit(flux, args.steps, 2e-3, loss, "FLUX"):
        if RANK == 0 and (step % 250 == 0 or step == args.steps):
            model.save(average.state_dict(), pictures, args.output)
            pipe.transformer.load_state_dict(average.state_dict())
            samples(pipe, args.work / f"samples_{step}.png")


def samples(pipe: FluxPipeline, path: Path) -> None:
    """What the pipeline draws for some prompts, in 8 steps, as the demo does."""
    made = pipe(
        list(PROMPTS),
        height=SIDE,
        width=SIDE,
        num_inference_steps=8,
        max_sequence_length=model.LETTERS,
        generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))],
        output_type="pt",
    ).images
    sheet(list(made * 2 - 1), 4, path)


if __name__ == "__main__":
    main()
