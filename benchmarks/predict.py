"""What the cost model predicts of a step of ascend_sp's programs, beside what the step takes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m ascend_sp calibrate --out out/device.json
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/predict.py --device out/device.json

fp32, Inductor, one thread a rank. A prediction is two numbers: the sum of all computation, as if
every collective were hidden, and that with all collectives, as if none were. Printed are ratios
only. With ``--busy``, here and for `calibrate`, both are CPU seconds, for a machine that other
programs use.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cores import one_core
from torch import fx

from ascend_sp.compiler import ladder
from ascend_sp.graph.cost.device import DeviceModel, find
from ascend_sp.graph.cost.estimate import Estimator, attention_flops, product_flops
from models import MODELS, USUAL, Benchmark

KINDS = ("products", "attention", "other kernels", "collectives")


def estimates(gm: fx.GraphModule, device: DeviceModel, ranks: int) -> Counter:
    """Predicted seconds of a finished graph, by kind."""
    estimator = Estimator(device, ranks, fuses=True)
    seconds: Counter = Counter(dict.fromkeys(KINDS, 0.0))
    for node in gm.graph.nodes:
        spent = estimator.seconds(node)
        if not spent:
            kind = "other kernels"
        elif attention_flops(node) is not None:
            kind = "attention"
        else:
            kind = "other kernels" if product_flops(node) is None else "products"
        seconds[kind] += spent
        cost = estimator.transfer(node)
        seconds["collectives"] += cost.seconds
        seconds["their work"] += cost.work
    return seconds


def predict_and_run(
    benchmark: Benchmark, device: DeviceModel, rounds: int, busy: bool
) -> tuple[Counter, list[float]]:
    """What is predicted of this rank's program, and the seconds of each round."""
    torch.compiler.reset()
    graphs: list[Counter] = []
    compile_aten = ladder.compile_aten

    def spy(*args: Any, **kwargs: Any) -> fx.GraphModule:
        gm = compile_aten(*args, **kwargs)
        graphs.append(estimates(gm, device, dist.get_world_size()))
        return gm

    program = torch.compile(benchmark.model, backend="ascend_sp", fullgraph=True, dynamic=False)
    with mock.patch.object(ladder, "compile_aten", spy):
        benchmark.first_output(program)
    benchmark.first_output(program)
    clock = time.process_time if busy else time.perf_counter
    spent = []
    with one_core(dist.get_rank(), dist.get_world_size()):
        for _ in range(rounds):
            dist.barrier()
            start = clock()
            benchmark.first_output(program)
            spent.append(clock() - start)
    (predicted,) = graphs
    return predicted, spent


def row(name: str, predicted: Counter, spent: list[float]) -> str:
    """Shares of what is predicted, and ratios of what was measured."""
    total = sum(predicted[k] for k in KINDS)
    hidden = total - predicted["collectives"] + predicted["their work"]
    cells = [f"{predicted[k] / total:.0%}" for k in KINDS]
    for bound in (total, hidden):
        cells.append(f"{statistics.median(spent) / bound:.2f}")
    cells.append(f"{min(spent) / total:.2f} .. {max(spent) / total:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="a device of the table, or a file")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=USUAL)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--busy", action="store_true", help="CPU seconds instead of the wall's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank = dist.get_rank()
    device = find(args.device, "cpu")
    if rank == 0:
        print(f"Device: {device.name}; {'; '.join(device.sources)}. Rank 0, {args.rounds} rounds.")
        print(f"| model | {' | '.join(KINDS)} | measured / predicted, nothing hidden ", end="")
        print("| all hidden | smallest .. largest |\n|" + "---|" * (len(KINDS) + 4))
    with torch.no_grad():
        for name in args.models:
            benchmark = MODELS[name]()
            predicted, spent = predict_and_run(benchmark, device, args.rounds, args.busy)
            if rank == 0:
                print(row(benchmark.name, predicted, spent), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
