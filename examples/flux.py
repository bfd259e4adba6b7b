"""FLUX on several devices: one `torch.compile` line, and what it changes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/flux.py
    torchrun --nproc-per-node 4 examples/flux.py --model black-forest-labs/FLUX.1-dev \
        --height 1024 --width 1024 --steps 28

Without --model it runs diffusers' own pipeline, scheduler, transformer and VAE at reduced size with
fixed random weights. The run of one process, eager, is compared with the compiled run of all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from typing import Any

# Before the import: the libraries warn about optional packages while they load.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from common import (
    Parser,
    Run,
    World,
    check,
    check_size,
    collectives,
    generate,
    latent_difference,
    parser,
    picture_difference,
    print_table,
    quiet,
    say,
    side_by_side,
    warm_up,
    world,
)

PROMPT = "a lighthouse on a cliff, oil painting"
TEXT_TOKENS = 128


def small_pipeline(seed: int, dtype: torch.dtype) -> FluxPipeline:
    """FLUX as diffusers makes it, with fewer and narrower blocks and random weights."""
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
    vae = AutoencoderKL(
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
    return FluxPipeline(
        transformer=transformer.to(dtype).eval(),
        vae=vae.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )


def load(args: argparse.Namespace, world: World) -> tuple[FluxPipeline, dict[str, Any]]:
    """The pipeline on this process's device, and the inputs of a call: the same on all ranks."""
    name = args.dtype or ("float32" if world.device.type == "cpu" else "bfloat16")
    dtype = getattr(torch, name)
    inputs: dict[str, Any] = {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
    }
    if args.model:
        pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype)
        inputs["prompt"] = args.prompt or PROMPT
    else:
        pipe = small_pipeline(args.seed, dtype)
        config, noise = pipe.transformer.config, torch.Generator("cpu").manual_seed(args.seed)
        text = torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, generator=noise)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=noise)
        inputs["prompt_embeds"] = text.to(world.device, dtype)
        inputs["pooled_prompt_embeds"] = pooled.to(world.device, dtype)
    return pipe.to(world.device), inputs


def baselines(
    pipe: FluxPipeline, world: World, seed: int, inputs: dict[str, Any]
) -> tuple[Run, Run]:
    """The same pipeline in one process: eager, and compiled by Inductor."""
    transformer = pipe.transformer
    eager = generate(pipe, world, seed, "eager, one process", **inputs)
    say("compiling with Inductor for one rank ...")
    pipe.transformer = torch.compile(transformer, backend="inductor")
    warm_up(pipe, world, seed, **inputs)
    inductor = generate(pipe, world, seed, "Inductor, one rank", **inputs)
    pipe.transformer = transformer
    return eager, inductor


def main(args: argparse.Namespace, arguments: Parser, world: World) -> None:
    """Run, compare, and report on rank 0."""
    pipe, inputs = load(args, world)
    check_size(arguments, args, 2 * pipe.vae_scale_factor)
    ranks = f"{world.size} ranks" if world.size > 1 else "one rank"
    eager = inductor = None
    if args.baseline and world.rank == 0:
        eager, inductor = baselines(pipe, world, args.seed, inputs)
    # The other ranks wait here, so that the runs above have the machine to themselves.
    world.wait()

    say(f"compiling with ascend_sp for {ranks} ...")
    with tempfile.TemporaryDirectory() as dump:
        # This line is all that a program needs; without options, nothing is written.
        pipe.transformer = torch.compile(
            pipe.transformer, backend="ascend_sp", options={"dump_dir": dump}
        )
        warm_up(pipe, world, args.seed, **inputs)
        count, sent = collectives(dump, world.rank)
    world.wait()
    compiled = generate(pipe, world, args.seed, f"ascend_sp, {ranks}", **inputs)
    if world.rank == 0:
        one = (eager, inductor) if eager and inductor else None
        report(args, ranks, one, compiled, count, sent)


def report(
    args: argparse.Namespace,
    ranks: str,
    one: tuple[Run, Run] | None,
    compiled: Run,
    count: Counter[str],
    sent: int,
) -> None:
    """Write the picture and print the table."""
    n = len(compiled.intervals)
    rows = []
    pictures = {}
    if one:
        eager, inductor = one
        pictures["eager, one process"] = eager.image
        rows = [
            ("time per step, one rank (Inductor)", f"{inductor.step:.3f} s (median of {n})"),
            (f"time per step, {ranks} (ascend_sp)", f"{compiled.step:.3f} s (median of {n})"),
            ("ratio", f"{compiled.step / inductor.step:.3f}"),
            (
                "largest difference of the pictures",
                f"{picture_difference(eager.image, compiled.image)} of 255 levels",
            ),
            (
                "largest difference of the latents",
                f"{latent_difference(eager.latents, compiled.latents):.1e} of the largest value",
            ),
        ]
    else:
        rows = [(f"time per step, {ranks} (ascend_sp)", f"{compiled.step:.3f} s (median of {n})")]
    pictures[f"ascend_sp, {ranks}"] = compiled.image
    kinds = ", ".join(f"{k} {op}" for op, k in count.items()) or "none"
    rows.append(("collectives in a step", kinds))
    rows.append(("bytes that a rank puts in, in a step", f"{sent / 2**20:.1f} MiB"))
    rows.append(("picture", str(args.output)))
    side_by_side(pictures, args.output)
    print_table(rows)


if __name__ == "__main__":
    quiet()
    arguments = parser(__doc__.splitlines()[0], "out/flux.png")
    parsed = arguments.parse_args()
    check(arguments, parsed)
    with world(arguments, parsed.device, parsed.timeout) as here:
        main(parsed, arguments, here)
