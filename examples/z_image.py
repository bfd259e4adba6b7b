"""Z-Image on several devices: a model whose 30 heads divide by no 4 and no 8.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/z_image.py
    torchrun --nproc-per-node 4 examples/z_image.py --model Tongyi-MAI/Z-Image-Turbo --tep \
        --height 1024 --width 1024 --steps 9

Without --model it runs diffusers' own pipeline at reduced size with fixed random weights, from a
cold start: this model makes its rotary tables in the first call, which the compiler lives with.
"""

from __future__ import annotations

import argparse

import small
from common import Parser
from program import Example, run

PROMPT = "a lighthouse on a cliff, oil painting"


def example(args: argparse.Namespace) -> Example:
    return Example(
        name="Z-Image",
        pipeline="ZImagePipeline",
        small=small.z_image,
        inputs={"prompt": args.prompt or PROMPT, "guidance_scale": args.guidance},
        encoders=("text_encoder",),
    )


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="above 0: two captions of different lengths in each step (default: 0, as Turbo wants)",
    )


if __name__ == "__main__":
    run(__doc__, "out/z_image.png", example, add_arguments)
