"""FLUX on several devices: one `torch.compile` line, and what it changes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/flux.py --prompt "a ship at sunset"
    torchrun --nproc-per-node 4 examples/flux.py --model black-forest-labs/FLUX.1-dev --tep \
        --height 1024 --width 1024 --steps 28

Without --model it runs diffusers' own pipeline, scheduler, transformer, text encoders and VAE at
reduced size. The picture comes from one that was trained on scenes by the sea, 192 pixels wide
(`scenes/`), which is too small to be timed; the times come from a wider one with random weights, of
--height and --width. The run of one process, eager, is compared with the compiled run of all.
"""

from __future__ import annotations

import argparse

import small
from common import say
from program import Example, run
from scenes import model as scenes

PROMPT = "a lighthouse at night under a full moon"


def example(args: argparse.Namespace) -> Example:
    trained = not args.model and scenes.WEIGHTS.exists()
    if not args.model and not trained:
        say(
            f"{scenes.WEIGHTS} is missing, so the picture will be noise, whatever the prompt is. "
            "Take it from the repository, or make it: make weights"
        )
    return Example(
        name="FLUX.1",
        pipeline="FluxPipeline",
        small=small.flux,
        inputs={
            "prompt": args.prompt or PROMPT,
            "max_sequence_length": 512 if args.model else 128,
        },
        encoders=("text_encoder", "text_encoder_2"),
        drawing=scenes.load if trained else None,
        drawing_inputs={
            "height": scenes.SIDE,
            "width": scenes.SIDE,
            "max_sequence_length": scenes.LETTERS,
        },
    )


if __name__ == "__main__":
    run(__doc__, "out/flux.png", example)
