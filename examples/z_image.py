"""Z-Image on several devices: a model whose 30 heads divide by no 4 and no 8.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/z_image.py
    torchrun --nproc-per-node 4 examples/z_image.py --model Tongyi-MAI/Z-Image-Turbo --tep \
        --height 1024 --width 1024 --steps 9

Without --model it runs diffusers' own pipeline at reduced size with fixed random weights, from a
cold start: this model makes its rotary tables in the first call, which the compiler lives with.
"""

from __future__ import annotations

import argparse
from typing import Any

import small
from common import Parser
from program import Example, run

PROMPT = "a lighthouse on a cliff, oil painting"


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    return {"prompt": args.prompt or PROMPT, "guidance_scale": args.guidance}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="above 0: two captions of different lengths in each step (default: 0, as Turbo wants)",
    )


if __name__ == "__main__":
    run(
        Example(
            name="Z-Image",
            description=__doc__.splitlines()[0],
            output="out/z_image.png",
            pipeline="ZImagePipeline",
            small=small.z_image,
            inputs=inputs,
            encoders=("text_encoder",),
            add_arguments=add_arguments,
        )
    )
