"""One rank with Inductor against several with ascend_sp, alternating, in one process group.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/flux_two_ranks.py

A FLUX of 2 + 4 blocks, 8 heads of 128, 1024 image and 128 text tokens, fp32, one thread a rank. In
each round every rank runs ascend_sp's program with the others, and rank 0 runs Inductor's program
of the whole model alone while the others wait, in turns. Printed are the ratios round by round, of
wall time and of each process's CPU time.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch._inductor.utils import run_and_get_code

TEXT_DIM, POOLED_DIM = 1024, 512
ALONE = "Inductor, one rank"


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """The model and its inputs, the same on every rank."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=args.double,
        num_single_layers=args.single,
        attention_head_dim=128,
        num_attention_heads=args.heads,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
    ).eval()
    side = max(1, round(args.image**0.5))
    place = torch.arange(args.image)
    ids = torch.stack([torch.zeros(args.image), place // side, place % side], 1)
    inputs = {
        "hidden_states": torch.randn(1, args.image, 64),
        "encoder_hidden_states": torch.randn(1, args.text, TEXT_DIM),
        "pooled_projections": torch.randn(1, POOLED_DIM),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(args.text, 3),
        "return_dict": False,
    }
    return model, inputs


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and process-CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


MOVES = "all_to_all_single|clone|permute|view|slice|constant_pad_nd|expand|wait_tensor|_unsafe"


def lone_copies(code: str) -> list[str]:
    """Kernel launches in Inductor's output code that only rearrange data.

    Inductor names a kernel after the ops that it fused. One whose ops all just move values is a
    copy; one that also concatenates is the model's own, which one rank has too.
    """
    calls = re.findall(r"^ +(cpp_fused_(\w+)_\d+)\(", code, re.M)
    return [name for name, ops in calls if not re.sub(rf"(?:^|_)(?:{MOVES})(?=_|$)", "", ops)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("double", 2), ("single", 4), ("heads", 8), ("image", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--text", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", action="store_true", help="diffusers' context parallelism too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()
    # One core a rank, the same for all programs.
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})

    model, inputs = build(args)
    whole = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
    programs = {
        "ascend_sp": torch.compile(model, backend="ascend_sp", fullgraph=True, dynamic=False)
    }
    if args.peer:
        programs["diffusers CP, Inductor"] = peer(model, world)
    with torch.no_grad():
        got, sources = run_and_get_code(lambda: programs["ascend_sp"](**inputs)[0])
        error = 0.0
        if rank == 0:
            want = whole(**inputs)[0]
            error = ((got - want).abs().max() / want.abs().max()).item()
        times: dict[str, list] = {name: [] for name in (*programs, ALONE)}
        for round_ in range(args.rounds + 1):
            # Whoever runs after the program of one rank finds the other cores cold: take turns.
            names = list(times)
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                dist.barrier()
                program = programs.get(name, whole)
                idle = name == ALONE and rank != 0
                pair = (0.0, 0.0) if idle else timed(lambda program=program: program(**inputs))
                if round_:  # the first round warms up
                    times[name].append(pair)
        dist.barrier()
    everyone: list = [None] * world
    dist.all_gather_object(everyone, times)
    if rank == 0:
        report(args, everyone, error, "\n".join(sources))
    dist.destroy_process_group()


def peer(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """Diffusers' own Ulysses, with its plan for this model."""
    from diffusers import ContextParallelConfig

    # It divides by the number of accelerators, which a CPU does not have.
    torch.accelerator.device_count = lambda: world
    other = copy.deepcopy(model)
    other.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    return torch.compile(other, backend="inductor", dynamic=False)


def report(args: argparse.Namespace, everyone: list, error: float, code: str) -> None:
    """Print medians and ratios."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    attentions = args.double + args.single
    print(
        f"FLUX {args.double}+{args.single} blocks, {args.heads} heads of 128, {args.image} + "
        f"{args.text} tokens, fp32; {args.rounds} alternating rounds; difference {error:.1e}"
    )
    print("ratios to one rank with Inductor, round by round: median (smallest .. largest)")
    print(f"{'':32} wall                    CPU of the process")
    base = everyone[0][ALONE]
    for name in (n for n in everyone[0] if n != ALONE):
        for rank, times in enumerate(everyone):
            rounds = list(zip(times[name], base, strict=True))
            wall = [a / b for (a, _), (b, _) in rounds]
            cpu = [a / b for (_, a), (_, b) in rounds]
            print(
                f"{name + ', rank ' + str(rank):32} "
                f"{median(wall):.3f} ({min(wall):.3f} .. {max(wall):.3f})   "
                f"{median(cpu):.3f} ({min(cpu):.3f} .. {max(cpu):.3f})"
            )
    copies = lone_copies(code)
    print(
        f"kernels that only copy, in Inductor's code: {len(copies)} for {attentions} attentions "
        f"({len(copies) / attentions:.2f} each)"
    )
    print("  " + ", ".join(sorted(set(copies))))


if __name__ == "__main__":
    main()
