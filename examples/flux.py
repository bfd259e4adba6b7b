"""FLUX on several devices: one `torch.compile` line, and what it changes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/flux.py
    torchrun --nproc-per-node 4 examples/flux.py --model black-forest-labs/FLUX.1-dev --tep \
        --height 1024 --width 1024 --steps 28

Without --model it runs diffusers' own pipeline, scheduler, transformer, text encoders and VAE at
reduced size with fixed random weights. The run of one process, eager, is compared with the
compiled run of all.
"""

from __future__ import annotations

import argparse

import small
from program import Example, run

PROMPT = "a lighthouse on a cliff, oil painting"


def example(args: argparse.Namespace) -> Example:
    return Example(
        name="FLUX.1",
        pipeline="FluxPipeline",
        small=small.flux,
        inputs={
            "prompt": args.prompt or PROMPT,
            "max_sequence_length": 512 if args.model else 128,
        },
        encoders=("text_encoder", "text_encoder_2"),
    )


if __name__ == "__main__":
    run(__doc__, "out/flux.png", example)
