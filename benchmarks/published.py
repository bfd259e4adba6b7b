"""Estimates of the cost model beside times that cache-dit published for an Atlas 800I A2.

    python benchmarks/published.py --device 910B4 > docs/published.md

Nothing is measured here: each cell is an estimate by `ascend_sp.explain`, for one forward of the
transformer at its real size, times the forwards of a picture. What was published are whole
pipelines in eager mode, text encoders and VAE included, by hand-written plans.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ascend_sp

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from explain_inputs import flux, qwen_image_edit, z_image

ALONE = "one rank"
PROGRAMS: dict[str, dict[str, Any]] = {
    "Ulysses": {"async": False, "strategy": "separate"},
    "Ulysses, async": {"strategy": "separate"},
    "chosen by cost": {},
}
"""Each with options of the backend; the last has nothing published beside it."""
HEAD = """# Published times and our estimates

*Made by `python benchmarks/published.py --device {device} > docs/published.md`.*

**The estimated columns are estimates**, from the [cost model](cost_model.md) with its table's rates
of a {device}, which were not calibrated on a card, for forwards of the transformer alone. The
published ones are whole pipelines in eager mode on an Atlas 800I A2 (which card is not said), text
encoders and VAE included: {source}.
What was not published is assumed: 28, 9 and 50 steps, guidance by a second forward for Qwen, a
reference of the picture's size, 1024 prompt tokens. Ratios to the line above compare better than
seconds.

{columns}
{rule}"""
COLUMNS = (
    *("model", "program", "ranks", "published, s", "estimated, s", "estimated / published"),
    *("published / line above", "estimated / line above"),
)
SOURCE = "cache-dit docs/benchmark/ASCEND_NPU.md, as of May to September 2026"


@dataclass(frozen=True)
class Model:
    """A pipeline of the table."""

    name: str
    build: Callable[[], Any]
    forwards: int
    """Of the transformer, in one picture."""
    cells: dict[tuple[str, int], float]
    """Published seconds, by programs and ranks."""


MODELS = (
    Model(
        "FLUX.1-dev, 1024 x 1024, 28 steps",
        flux,
        28,
        {(ALONE, 1): 16.13, ("Ulysses", 2): 11.45, ("Ulysses, async", 2): 10.47},
    ),
    Model(
        "Z-Image-Turbo, 1024 x 1024, 9 steps",
        z_image,
        9,
        {(ALONE, 1): 3.39, ("Ulysses", 2): 2.49, ("Ulysses, async", 2): 2.38},
    ),
    Model(
        "Qwen-Image-Edit, 1024 x 1024, one reference, 50 steps with guidance",
        qwen_image_edit,
        100,
        {("Ulysses", 2): 134.76, ("Ulysses", 4): 67.44, ("Ulysses, async", 4): 64.82},
    ),
)


def estimates(model: Model, ranks: int, device: str) -> dict[str, float]:
    """Seconds of a picture by programs, by estimate."""
    found = {}
    for what, options in PROGRAMS.items():
        with torch.device("meta"):
            made = model.build()
        args, kwargs = (made[1], made[2]) if len(made) == 3 else ((), made[1])
        told = ascend_sp.explain(
            made[0],
            *args,
            explain_options={"ranks": ranks, "device": device, "target": "npugraph_ex"} | options,
            **kwargs,
        )
        found[what] = model.forwards * sum(r.overlap.step_after for r in told.reports)
        found[ALONE] = model.forwards * sum(r.one_rank or 0.0 for r in told.reports)
        print(f"{model.name}: {what} on {ranks} ranks is estimated", file=sys.stderr)
    return found


def rows(model: Model, device: str) -> list[str]:
    """Lines of the table for one model: seconds, and what each program saves on the one before."""
    by_ranks = {r: estimates(model, r, device) for r in sorted({r for _, r in model.cells} - {1})}
    first = next(iter(by_ranks.values()))
    cells = [(ALONE, 1, first[ALONE])]
    cells += [(what, r, found[what]) for r, found in by_ranks.items() for what in PROGRAMS]
    out = []
    before: dict[str, float | None] = {}
    for what, ranks, seconds in cells:
        told = model.cells.get((what, ranks))
        columns = [model.name, what, str(ranks), _number(told), _number(seconds)]
        columns.append(_number(seconds / told if told else None))
        for kind, value in (("published", told), ("estimated", seconds)):
            base = before.get(kind)
            columns.append(_number(value / base if value and base else None))
            before[kind] = value
        out.append(f"| {' | '.join(columns)} |")
    return out


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="910B4", help="a device of the table, or a file")
    args = parser.parse_args()
    lines = [row for model in MODELS for row in rows(model, args.device)]
    columns, rule = f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"
    print(HEAD.format(device=args.device, source=SOURCE, columns=columns, rule=rule))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
