"""What every example does with its pipeline: run it on one process and on all, compare, report."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

import ascend_sp
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


@dataclass(frozen=True)
class Example:
    """One pipeline: where it comes from, and how it is called."""

    name: str
    """As in the benchmark tables."""
    pipeline: str
    """Class of diffusers that loads real weights."""
    small: Callable[[int, torch.dtype], Any]
    """Makes the reduced one from a seed."""
    inputs: dict[str, Any]
    """What a call is given besides size and steps: the same on all ranks."""
    encoders: tuple[str, ...]
    """Attributes of the pipeline that ``--tep`` shards."""


def run(
    description: str,
    output: str,
    example: Callable[[argparse.Namespace], Example],
    add_arguments: Callable[[Parser], object] = lambda parser: None,
) -> None:
    """Parse the arguments, make of them an example, and run it on this rank.

    Args:
        description: of the program; its first line is shown by ``--help``.
        output: default picture file.
        example: what to run, from the parsed arguments.
        add_arguments: adds those that only this program has.
    """
    quiet()
    arguments = parser(description.splitlines()[0], output)
    add_arguments(arguments)
    args = arguments.parse_args()
    check(arguments, args)
    with world(arguments, args.device, args.timeout) as here:
        _run(example(args), args, arguments, here)


def load(example: Example, args: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline on this process's device."""
    name = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = getattr(torch, name)
    if args.model:
        kind = getattr(diffusers, example.pipeline)
        return kind.from_pretrained(args.model, torch_dtype=dtype).to(device)
    return example.small(args.seed, dtype).to(device)


def _run(example: Example, args: argparse.Namespace, arguments: Parser, world: World) -> None:
    pipe = load(example, args, world.device)
    check_size(arguments, args, 2 * pipe.vae_scale_factor)
    inputs = {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        **example.inputs,
    }
    one = None
    if args.baseline and world.rank == 0:
        one = _baselines(pipe, world, args.seed, inputs)
        # Models keep tables that their first call makes, and Dynamo the sizes that it saw change.
        # With those known on rank 0 alone, the ranks would compile different programs.
        pipe = load(example, args, world.device)
        torch.compiler.reset()
    # The other ranks wait here, so that the runs above have the machine to themselves.
    world.wait()

    strategy = f"Ulysses x{world.size}"
    rows = []
    if args.tep:
        strategy += " + TEP"
        for name in example.encoders:
            split = ascend_sp.parallelize_text_encoder(getattr(pipe, name))
            share = split.local_bytes / split.whole_bytes
            rows.append((f"{name} on each rank", f"{share:.0%} of its bytes"))
    say(f"compiling with ascend_sp for {_ranks(world)} ...")
    with tempfile.TemporaryDirectory() as dump:
        # This line is all that a program needs; without options, nothing is written.
        pipe.transformer = torch.compile(
            pipe.transformer, backend="ascend_sp", options={"dump_dir": dump}
        )
        warm_up(pipe, world, args.seed, **inputs)
        count, sent = collectives(dump, world.rank)
    world.wait()
    compiled = generate(pipe, world, args.seed, f"ascend_sp, {_ranks(world)}", **inputs)
    if world.rank == 0:
        rows = _rows(world, one, compiled, count, sent) + rows
        pictures = {"eager, one process": one[0].image} if one else {}
        pictures[f"ascend_sp, {_ranks(world)}"] = compiled.image
        side_by_side(pictures, args.output)
        print_table([*rows, ("picture", str(args.output))])
        say(_benchmark_row(example, args, strategy, _one_rank(world)[0], one, compiled))


def _ranks(world: World) -> str:
    return f"{world.size} ranks" if world.size > 1 else "one rank"


def _baselines(pipe: Any, world: World, seed: int, inputs: dict[str, Any]) -> tuple[Run, Run]:
    """The same pipeline in one process: eager, and compiled for one rank."""
    transformer = pipe.transformer
    eager = generate(pipe, world, seed, "eager, one process", **inputs)
    name, how = _one_rank(world)
    say(f"compiling with {name} for one rank ...")
    pipe.transformer = torch.compile(transformer, **how)
    warm_up(pipe, world, seed, **inputs)
    alone = generate(pipe, world, seed, f"{name}, one rank", **inputs)
    pipe.transformer = transformer
    return eager, alone


def _one_rank(world: World) -> tuple[str, dict[str, Any]]:
    """Who compiles for one rank: Inductor, or on NPUs, where it may not be there, ascend_sp."""
    if world.device.type == "npu":
        return "ascend_sp", {"backend": "ascend_sp", "options": {"sequence_parallel": False}}
    return "Inductor", {"backend": "inductor"}


def _rows(
    world: World, one: tuple[Run, Run] | None, compiled: Run, count: Counter[str], sent: int
) -> list[tuple[str, str]]:
    n = len(compiled.intervals)
    ours = f"time per step, {_ranks(world)} (ascend_sp)"
    rows = [(ours, f"{compiled.step:.3f} s (median of {n})")]
    if one:
        eager, alone = one
        pixels = picture_difference(eager.image, compiled.image)
        latents = latent_difference(eager.latents, compiled.latents)
        rows = [
            (
                f"time per step, one rank ({_one_rank(world)[0]})",
                f"{alone.step:.3f} s (median of {n})",
            ),
            *rows,
            ("ratio", f"{compiled.step / alone.step:.3f}"),
            ("largest difference of the pictures", f"{pixels} of 255 levels"),
            ("largest difference of the latents", f"{latents:.1e} of the largest value"),
        ]
    kinds = ", ".join(f"{k} {op}" for op, k in count.items()) or "none"
    rows.append(("collectives in a step", kinds))
    rows.append(("bytes that a rank passes to them", f"{sent / 2**20:.1f} MiB"))
    return rows


def _benchmark_row(
    example: Example,
    args: argparse.Namespace,
    strategy: str,
    base_name: str,
    one: tuple[Run, Run] | None,
    compiled: Run,
) -> str:
    """One line of a benchmark table: seconds from the call to the picture."""
    name = example.name if args.model else f"{example.name} (reduced)"
    size = f"{args.width}x{args.height}, {args.steps} steps"
    base = f"{one[1].seconds:.2f} s" if one else "-"
    ratio = f"{compiled.seconds / one[1].seconds:.3f}" if one else "-"
    return (
        f"| model | picture | x1, {base_name} | strategy | time | ratio |\n"
        "|---|---|---|---|---|---|\n"
        f"| {name} | {size} | {base} | {strategy} | {compiled.seconds:.2f} s | {ratio} |\n"
    )
