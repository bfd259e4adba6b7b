"""What every example does with its pipeline: run it on one process and on all, compare, report."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

import ascend_sp
from common import (
    Parser,
    Run,
    World,
    amplified_difference,
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
    """Components of the pipeline that ``--tep`` shards; without it, they stay whole."""
    drawing: Callable[[torch.dtype], Any] | None = None
    """Makes a pipeline with weights, too small to be timed: the picture is its then, and the times
    are the reduced one's, whose weights are random."""
    drawing_inputs: dict[str, Any] = field(default_factory=dict)
    """What a call of it is given instead."""


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
    if args.model:
        kind = getattr(diffusers, example.pipeline)
        return kind.from_pretrained(args.model, torch_dtype=_dtype(args, device)).to(device)
    return example.small(args.seed, _dtype(args, device)).to(device)


def _dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


@dataclass
class Runs:
    """The same call on one process and on all; what has one process is on rank 0 only."""

    eager: Run | None = None
    alone: Run | None = None
    """Compiled for one rank."""
    compiled: Run | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)
    """What else is to be told: the collectives in a step, and shares of the text encoders."""


def _run(example: Example, args: argparse.Namespace, arguments: Parser, world: World) -> None:
    size = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    inputs, drawn = {**size, **example.inputs}, None

    def make() -> Any:
        pipe = load(example, args, world.device)
        check_size(arguments, args, 2 * pipe.vae_scale_factor)
        return pipe

    if example.drawing and not args.model:
        make()  # refuses a bad size now
        drawing, dtype = example.drawing, _dtype(args, world.device)
        drawn = _runs(
            lambda: drawing(dtype).to(world.device),
            {**inputs, **example.drawing_inputs},
            example,
            args,
            world,
            timed=False,
        )
        torch.compiler.reset()
        _save(drawn, world, args)
        say(f"{args.output} is drawn; now the times, with a wider model of random weights ...")
    timed = _runs(make, inputs, example, args, world)
    if not drawn:
        _save(timed, world, args)
    if world.rank == 0:
        rows = [*_times(timed, world), *_differences(drawn or timed, "")]
        if drawn:
            rows += _differences(timed, ", in what was timed")
        print_table([*rows, *timed.rows, ("picture", str(args.output))])
        say(_benchmark_row(example, args, world, timed))


def _runs(
    make: Callable[[], Any],
    inputs: dict[str, Any],
    example: Example,
    args: argparse.Namespace,
    world: World,
    timed: bool = True,
) -> Runs:
    """Call a pipeline on one process, then compiled on all."""
    result, pipe = Runs(), make()
    if args.baseline and world.rank == 0:
        result.eager = generate(pipe, world, args.seed, "eager, one process", **inputs)
        if timed:
            name, how = _one_rank(world)
            say(f"compiling with {name} for one rank ...")
            pipe.transformer = torch.compile(pipe.transformer, **how)
            for method in ("encode", "decode"):
                setattr(pipe.vae, method, torch.compile(getattr(pipe.vae, method), **how))
            warm_up(pipe, world, args.seed, **inputs)
            result.alone = generate(pipe, world, args.seed, f"{name}, one rank", **inputs)
        # Models keep tables that their first call makes, and Dynamo the sizes that it saw change.
        # With those known on rank 0 alone, the ranks would compile different programs.
        pipe = make()
        torch.compiler.reset()
    # The other ranks wait here, so that the runs above have the machine to themselves.
    world.wait()

    say(f"compiling with ascend_sp for {_ranks(world)} ...")
    with tempfile.TemporaryDirectory() as dump:
        # Both lines are one in a program: `ascend_sp.parallelize(pipe)`. Here, what denoises writes
        # down what it does.
        whole = () if args.tep else example.encoders
        report = ascend_sp.parallelize(pipe, skip=("transformer", *whole))
        pipe.transformer = torch.compile(
            pipe.transformer, backend="ascend_sp", options={"dump_dir": dump}
        )
        warm_up(pipe, world, args.seed, **inputs)
        count, sent = collectives(dump, world.rank)
    world.wait()
    result.compiled = generate(pipe, world, args.seed, f"ascend_sp, {_ranks(world)}", **inputs)
    kinds = ", ".join(f"{k} {op}" for op, k in count.items()) or "none"
    result.rows = [
        ("collectives in a step", kinds),
        ("bytes that a rank puts in, in a step", f"{sent / 2**20:.1f} MiB"),
        ("time before, in and after the steps", result.compiled.shares()),
        *(
            (f"{p.name} on each rank", f"{p.local_bytes / p.whole_bytes:.0%} of its bytes")
            for p in report.parts
            if p.local_bytes < p.whole_bytes
        ),
    ]
    return result


def _save(runs: Runs, world: World, args: argparse.Namespace) -> None:
    """The picture of one process, that of all, and their difference, from rank 0."""
    if world.rank != 0:
        return
    assert runs.compiled
    ours = {f"ascend_sp, {_ranks(world)}": runs.compiled.image}
    if runs.eager:
        name, difference = amplified_difference(runs.eager, runs.compiled)
        ours = {"eager, one process": runs.eager.image, **ours, name: difference}
    side_by_side(ours, args.output)


def _ranks(world: World) -> str:
    return f"{world.size} ranks" if world.size > 1 else "one rank"


def _one_rank(world: World) -> tuple[str, dict[str, Any]]:
    """Who compiles for one rank: Inductor, or on NPUs, where it may not be there, ascend_sp."""
    if world.device.type == "npu":
        return "ascend_sp", {"backend": "ascend_sp", "options": {"sequence_parallel": False}}
    return "Inductor", {"backend": "inductor"}


def _times(runs: Runs, world: World) -> list[tuple[str, str]]:
    assert runs.compiled
    n, ours = len(runs.compiled.intervals), runs.compiled.step
    rows = [(f"time per step, {_ranks(world)} (ascend_sp)", f"{ours:.3f} s (median of {n})")]
    if runs.alone:
        one = f"{runs.alone.step:.3f} s (median of {n})"
        rows.insert(0, (f"time per step, one rank ({_one_rank(world)[0]})", one))
        rows.append(("ratio", f"{ours / runs.alone.step:.3f}"))
    return rows


def _differences(runs: Runs, where: str) -> list[tuple[str, str]]:
    if not runs.eager:
        return []
    assert runs.compiled
    pixels = picture_difference(runs.eager, runs.compiled)
    latents = latent_difference(runs.eager.latents, runs.compiled.latents)
    return [
        (f"largest difference of the pictures{where}", f"{pixels} of 255 levels"),
        (f"largest difference of the latents{where}", f"{latents:.1e} of the largest value"),
    ]


def _benchmark_row(example: Example, args: argparse.Namespace, world: World, runs: Runs) -> str:
    """One line of a benchmark table: seconds from the call to the picture."""
    assert runs.compiled
    name = example.name if args.model else f"{example.name} (reduced)"
    size = f"{args.width}x{args.height}, {args.steps} steps"
    strategy = f"Ulysses x{world.size}" + (" + TEP" if args.tep else "")
    base = f"{runs.alone.seconds:.2f} s" if runs.alone else "-"
    ratio = f"{runs.compiled.seconds / runs.alone.seconds:.3f}" if runs.alone else "-"
    return (
        f"| model | picture | x1, {_one_rank(world)[0]} | strategy | time | ratio |\n"
        "|---|---|---|---|---|---|\n"
        f"| {name} | {size} | {base} | {strategy} | {runs.compiled.seconds:.2f} s | {ratio} |\n"
    )
