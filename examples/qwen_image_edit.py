"""Qwen-Image-Edit on several devices: reference tokens behind the noise, masked prompts.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/qwen_image_edit.py
    torchrun --nproc-per-node 4 examples/qwen_image_edit.py --model Qwen/Qwen-Image-Edit --tep \
        --image photo.png --height 1024 --width 1024 --steps 50 --cfg 4

--plus takes Qwen-Image-Edit-2509 and -2511, and several pictures. Without --model it runs
diffusers' own pipeline at reduced size with fixed random weights. With real weights, transformers'
processor for pictures needs torchvision.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import small
from common import Parser
from program import Example, run

PROMPT = "make it look like an oil painting of a lighthouse"


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    pictures = [Image.open(p).convert("RGB") for p in args.image]
    pictures = pictures or [small.picture(args.seed + i) for i in range(1 + args.plus)]
    out: dict[str, Any] = {
        "prompt": args.prompt or PROMPT,
        "image": pictures if args.plus else pictures[0],
        "true_cfg_scale": args.cfg,
    }
    if args.cfg > 1:
        out["negative_prompt"] = " "
    return out


def example(args: argparse.Namespace) -> Example:
    return Example(
        name="Qwen-Image-Edit" + "-Plus" * args.plus,
        pipeline="QwenImageEditPlusPipeline" if args.plus else "QwenImageEditPipeline",
        small=partial(small.qwen_image_edit, plus=args.plus),
        inputs=inputs(args),
        encoders=("text_encoder",),
    )


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--plus", action="store_true", help="the Plus pipeline")
    parser.add_argument("--image", type=Path, nargs="*", default=[], help="pictures to edit")
    parser.add_argument(
        "--cfg", type=float, default=1.0, help="above 1: a second, unconditional pass in each step"
    )


if __name__ == "__main__":
    run(__doc__, "out/qwen_image_edit.png", example, add_arguments)
