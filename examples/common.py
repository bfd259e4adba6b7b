"""Plumbing that the example programs share; none of it is needed to use ascend_sp.

It sets up one process a device, times a pipeline's steps, counts collectives from the compiler's
dump, compares two runs, draws pictures side by side and prints a table on rank 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageFont

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
RANK = int(os.environ.get("RANK", "0"))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are printed once for all ranks."""

    def error(self, message: str) -> NoReturn:
        """Rank 0 prints and fails the job; the others leave quietly, not to race with it."""
        if RANK != 0:
            raise SystemExit(0)
        super().error(message)


def parser(description: str, output: str) -> Parser:
    """The arguments that all examples have."""
    result = Parser(description=description)
    add = result.add_argument
    add("--model", help="path or hub id of real weights; without it, a small random model")
    add("--device", choices=sorted(BACKENDS), help="default: npu, else cuda, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu")
    add("--height", type=int, default=512, help="of the picture, in pixels")
    add("--width", type=int, default=512, help="of the picture, in pixels")
    add("--steps", type=int, default=8, help="denoising steps, at least 2")
    add("--prompt", help="what to draw, or to change")
    add("--tep", action="store_true", help="shard the text encoders over the ranks too")
    add("--seed", type=int, default=0, help="of the noise, and of the small model's weights")
    add("--output", type=Path, default=Path(output), help="picture file (default: %(default)s)")
    add("--timeout", type=float, default=10.0, help="minutes that one rank waits for another")
    add(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="leave out the single-process runs",
    )
    return result


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is made."""
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; it must be at least 2 to measure time per step")
    if not 0 < args.timeout < float("inf"):
        parser.error(f"--timeout is {args.timeout}; it must be minutes above 0")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output is {args.output}; name a picture file, such as out/picture.png")


def check_size(parser: Parser, args: argparse.Namespace, multiple: int) -> None:
    """Refuse a height or width that the pipeline would silently round."""
    for name in ("height", "width"):
        value = getattr(args, name)
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            parser.error(
                f"--{name} is {value}; it must be a multiple of {multiple} above 0. "
                f"Try --{name} {nearest}."
            )


def quiet() -> None:
    """Silence notes of the libraries that say nothing about this run."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def say(text: str) -> None:
    """Print on rank 0."""
    if RANK == 0:
        print(text, flush=True)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Return once every rank is here: a barrier that works alike on gloo, NCCL and HCCL."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device's queue; a clock read before that measures nothing."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


@contextmanager
def world(parser: Parser, device: str | None, minutes: float) -> Iterator[World]:
    """The process group, if torchrun started us, and this process's device."""
    kind = device or _default_device()
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  (registers the device)
        except ImportError as e:
            parser.error(f"--device npu needs torch_npu: {e}. Install it as docs/ascend.md says.")
    if kind == "cpu":
        # One rank is one core, for the single-process runs too: else they would not be comparable.
        torch.set_num_threads(1)
        place = torch.device("cpu")
    else:
        module, local = getattr(torch, kind), int(os.environ.get("LOCAL_RANK", "0"))
        if local >= module.device_count():
            parser.error(
                f"local rank {local} has no {kind} device: this machine has "
                f"{module.device_count()}. Lower --nproc-per-node or choose another --device."
            )
        place = torch.device(kind, local)
        module.set_device(place)
    if "RANK" not in os.environ:
        yield World(place)
        return
    dist.init_process_group(BACKENDS[kind], timeout=timedelta(minutes=minutes))
    try:
        yield World(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _default_device() -> str:
    try:
        import torch_npu

        if torch_npu.npu.is_available():
            return "npu"
    except ImportError:
        pass
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Run:
    """One call of a pipeline."""

    pixels: np.ndarray
    """[height, width, 3], from 0 to 1."""
    latents: torch.Tensor
    intervals: list[float] = field(default_factory=list)
    """Seconds from the end of each step to the end of the next."""
    seconds: float = 0.0
    """From the call to the picture, prompt and VAE included."""
    after: float = 0.0
    """From the end of the last step to the picture: the VAE, mostly."""

    @property
    def step(self) -> float:
        """Median seconds a step."""
        return median(self.intervals)

    def shares(self) -> str:
        """How much of the call goes by before the steps, in them, and after the last."""
        steps = self.step * (len(self.intervals) + 1)
        before = max(0.0, self.seconds - steps - self.after)
        return ", ".join(f"{part / self.seconds:.0%}" for part in (before, steps, self.after))

    @property
    def image(self) -> Image.Image:
        """The picture in 255 levels."""
        return Image.fromarray((self.pixels * 255).round().astype(np.uint8))


def generate(pipe: Any, world: World, seed: int, label: str, **inputs: Any) -> Run:
    """Call the pipeline as a user would, with a clock at the end of each step."""
    ends: list[float] = []
    latents: list[torch.Tensor] = []

    def step_done(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        world.synchronize()
        ends.append(time.perf_counter())
        latents[:] = [values["latents"]]
        return values

    pipe.set_progress_bar_config(desc=label, disable=world.rank != 0)
    start = time.perf_counter()
    # A generator on the CPU gives every rank, and every device, the same noise.
    pixels = pipe(
        **inputs,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=step_done,
        output_type="np",
    ).images[0]
    world.synchronize()
    end = time.perf_counter()
    intervals = [b - a for a, b in pairwise(ends)]
    return Run(pixels, latents[0].float().cpu(), intervals, end - start, end - ends[-1])


def warm_up(pipe: Any, world: World, seed: int, **inputs: Any) -> None:
    """Call the pipeline for two steps, twice, which compiles.

    Twice, because a model that makes its tables in the first call is compiled again in the second.
    """
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        generator = torch.Generator("cpu").manual_seed(seed)
        pipe(**{**inputs, "num_inference_steps": 2}, generator=generator, output_type="np")
    world.synchronize()


def collectives(dump_dir: str | Path, rank: int) -> tuple[Counter[str], int]:
    """From the compiler's dump: how many of each collective a step has, and the bytes put in."""
    count: Counter[str] = Counter()
    total = 0
    for file in sorted(Path(dump_dir).glob(f"graph_*/rank_{rank}/collectives.json")):
        for row in json.loads(file.read_text()):
            count[row["op"]] += 1
            total += row["bytes"] if isinstance(row["bytes"], int) else 0
    return count, total


def picture_difference(a: Run, b: Run) -> int:
    """The largest difference of two pictures' pixels, in levels of 255."""
    return int(np.abs(np.asarray(a.image, np.int16) - np.asarray(b.image, np.int16)).max())


def amplified_difference(a: Run, b: Run) -> tuple[str, Image.Image]:
    """Two pictures' difference before rounding to levels, made visible; and what it is called.

    It is multiplied by the largest power of ten that leaves every pixel within the range.
    """
    off = np.abs(a.pixels.astype(np.float64) - b.pixels)
    if not off.any():
        return "no difference", Image.fromarray(np.zeros(off.shape, np.uint8))
    factor = 10 ** math.floor(-math.log10(off.max()))
    pixels = (off * factor * 255).round().astype(np.uint8)
    return f"difference x {factor:,}", Image.fromarray(pixels)


def latent_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two runs' latents, relative to the first run's largest value."""
    return float((a - b).abs().max() / a.abs().max())


def side_by_side(pictures: Mapping[str, Image.Image], path: Path) -> None:
    """Write one picture file that shows each picture under its label."""
    bar, gap = 20, 8
    width = sum(p.width for p in pictures.values()) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures.values()) + bar), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for label, picture in pictures.items():
        sheet.paste(picture, (x, bar))
        draw.text((x + 4, 4), label, fill="black", font=ImageFont.load_default())
        x += picture.width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns, on rank 0."""
    width = max(len(name) for name, _ in rows)
    say("\n".join(["", *(f"  {name:{width}}  {value}" for name, value in rows), ""]))
