"""What prompts that are filled up to a capacity cost by estimate: a table for docs/serving.md.

    python benchmarks/bucket_waste.py --device 910B4 --ranks 4

The cost model estimates a step of the whole transformer for a few prompts, and a parabola through
them (attention is quadratic in the tokens, all else linear) says what any other prompt takes. The
last of the few is left out of the fit and has to agree with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ascend_sp

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from explain_inputs import flux, qwen_image_edit

MODELS: dict[str, Callable[..., Any]] = {
    "FLUX.1-dev, 1024 x 1024": flux,
    "Qwen-Image-Edit, 1024 x 1024, one reference": qwen_image_edit,
}
UNITS = (64, 128)
PROMPTS = range(5, 1025)
FITTED, CHECKED = (64, 512, 1024), 256


def step(build: Callable[..., Any], text: int, ranks: int, device: str) -> float:
    """Seconds of a step, by estimate."""
    with torch.device("meta"):
        model, kwargs = build(text=text)
    options = {"ranks": ranks, "device": device, "target": "npugraph_ex"}
    told = ascend_sp.explain(model, explain_options=options, **kwargs)
    return sum(r.overlap.step_after for r in told.reports)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="910B4", help="a device of the table, or a file")
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    print("| model | capacities | mean | median | largest |\n|---|---|---|---|---|")
    for name, build in MODELS.items():
        seconds = [step(build, n, args.ranks, args.device) for n in (*FITTED, CHECKED)]
        fit = np.polynomial.Polynomial.fit(FITTED, seconds[:-1], 2)
        off = abs(fit(CHECKED) / seconds[-1] - 1)
        if off > 0.01:
            raise SystemExit(f"{name}: no parabola, {off:.1%} off at {CHECKED} tokens")
        for unit in UNITS:
            waste = np.array([fit(-(-n // unit) * unit) / fit(n) - 1 for n in PROMPTS])
            numbers = (waste.mean(), np.median(waste), waste.max())
            cells = " | ".join(f"{100 * w:.1f} %" for w in numbers)
            print(f"| {name} | multiples of {unit} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
