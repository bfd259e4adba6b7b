"""One rank with Inductor against several with ascend_sp, alternating, in one process group.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/two_ranks.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/two_ranks.py --models flux --peer

For each model, in each round, every rank runs ascend_sp's program with the others, and rank 0 runs
Inductor's program of the whole model alone while the others wait, in turns. fp32, one thread a
rank. Printed are the ratios round by round, of wall time and of each process's CPU time.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from cores import one_core
from torch._inductor.utils import run_and_get_code

from models import MODELS, USUAL, Benchmark

ALONE = "Inductor, one rank"
OURS, PEER = "ascend_sp", "diffusers CP, Inductor"

Pair = tuple[float, float]
"""Wall and process-CPU seconds."""


@dataclass
class Result:
    """One model's measurement on one rank."""

    name: str
    attentions: int
    error: float = 0.0
    times: dict[str, list[Pair]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Programs that cannot run this model, and why."""


def timed(call: Callable[[], object]) -> Pair:
    """Wall and process-CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


MOVES = (
    "all_to_all_single|clone|permute|view|slice|squeeze|unsqueeze|constant_pad_nd|expand"
    "|wait_tensor|_unsafe"
)


def lone_copies(code: str) -> list[str]:
    """Kernel launches in Inductor's output code that only rearrange data.

    Inductor names a kernel after the ops that it fused. One whose ops all just move values is a
    copy; one that also concatenates is the model's own, which one rank has too.
    """
    calls = re.findall(r"^ +(cpp_fused_(\w+)_\d+)\(", code, re.M)
    return [name for name, ops in calls if not re.sub(rf"(?:^|_)(?:{MOVES})(?=_|$)", "", ops)]


def measure(benchmark: Benchmark, rounds: int, with_peer: bool) -> Result:
    """Compile and time the programs of one model."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.compiler.reset()
    model = benchmark.model
    whole = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
    programs = {OURS: torch.compile(model, backend="ascend_sp", fullgraph=True, dynamic=False)}
    result = Result(benchmark.name, benchmark.attentions)
    if with_peer and model._cp_plan is None:
        result.absent[PEER] = "has no plan for this model"
    elif with_peer:
        programs[PEER] = peer(model, world)
        try:
            benchmark.first_output(programs[PEER])
        except Exception as e:  # it fails alike on all ranks, while it compiles
            del programs[PEER]
            result.absent[PEER] = f"fails: {str(e).splitlines()[0][:120]}"
    got, sources = run_and_get_code(lambda: benchmark.first_output(programs[OURS]))
    result.copies = lone_copies("\n".join(sources))
    if rank == 0:
        want = benchmark.first_output(whole)
        result.error = ((got - want).abs().max() / want.abs().max()).item()
    with one_core(rank, world):
        result.times = in_turns(benchmark, {**programs, ALONE: whole}, rounds)
    return result


def in_turns(
    benchmark: Benchmark, programs: dict[str, Callable[..., object]], rounds: int
) -> dict[str, list[Pair]]:
    """Time each program once a round, `ALONE` on rank 0 only."""
    times: dict[str, list[Pair]] = {name: [] for name in programs}
    for round_ in range(rounds + 1):
        # Whoever runs after the program of one rank finds the other cores cold: take turns.
        names = list(times)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            program = programs[name]
            idle = name == ALONE and dist.get_rank() != 0
            call = (
                timed(lambda program=program: benchmark.first_output(program))
                if not idle
                else (0.0, 0.0)
            )
            if round_:  # the first round warms up
                times[name].append(call)
    dist.barrier()
    return times


def peer(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """Diffusers' own Ulysses, with its plan for this model."""
    from diffusers import ContextParallelConfig

    # It divides by the number of accelerators, which a CPU does not have.
    torch.accelerator.device_count = lambda: world
    other = copy.deepcopy(model)
    other.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    return torch.compile(other, backend="inductor", dynamic=False)


def row(result: Result, everyone: list[Result], program: str, rank: int) -> str:
    """Medians and ranges of the ratios of one program on one rank, and the ratio of the fastest.

    The fastest rounds are those that other work on the machine disturbed least.
    """
    pairs = list(zip(everyone[rank].times[program], everyone[0].times[ALONE], strict=True))
    cells = []
    for i in (0, 1):
        ratios = [ours[i] / base[i] for ours, base in pairs]
        fastest = min(ours[i] for ours, _ in pairs) / min(base[i] for _, base in pairs)
        cells.append(
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f}), "
            f"{fastest:.3f}"
        )
    return f"| {result.name} | {program}, rank {rank} | {cells[0]} | {cells[1]} |"


def report(results: list[list[Result]], rounds: int) -> None:
    """Print one table for all models, and the copies."""
    print(
        f"Ratios to one rank with Inductor: median (smallest .. largest) of {rounds} rounds, and "
        "fastest to fastest"
    )
    print("| model | program | wall | CPU of the process |\n|---|---|---|---|")
    for everyone in results:
        first = everyone[0]
        for program in (n for n in first.times if n != ALONE):
            for rank in range(len(everyone)):
                print(row(first, everyone, program, rank))
        for program, why in first.absent.items():
            print(f"| {first.name} | {program} | {why} | |")
    for everyone in results:
        first = everyone[0]
        print(
            f"{first.name}: largest difference {first.error:.1e}; kernels that only copy: "
            f"{len(first.copies)} for {first.attentions} attentions, "
            f"{', '.join(sorted(set(first.copies))) or 'none'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=USUAL)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", action="store_true", help="diffusers' context parallelism too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    with torch.no_grad():
        for name in args.models:
            everyone: list = [None] * world
            dist.all_gather_object(everyone, measure(MODELS[name](), args.rounds, args.peer))
            results.append(everyone)
    if rank == 0:
        report(results, args.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
