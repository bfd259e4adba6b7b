"""What the guards cost: of a compile, of a graph's first run, and of every run after that.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/guard_costs.py

FLUX at real width, few blocks deep, caches and garbage collector off. Printed are shares, round by
round and as medians: of the compile, what comparing programs takes (both times); of the first run,
what comparing inputs and weights takes. Before each comparison the ranks meet, so that one rank's
waiting for the slower one does not count as the guard's. Shares are of wall time and of this
process's CPU time: where others use the machine too, a guard of milliseconds waits longer for its
turn than it works. The last line is the whole chain of guards around a program that does nothing,
as a share of a run of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ascend_sp.compiler import backend
from ascend_sp.runtime import guards, replicas, stalls
from ascend_sp.runtime.topology import resolve
from models import MODELS, Benchmark

Seconds = dict[str, complex]


def now() -> complex:
    """Wall seconds, and process-CPU seconds as the imaginary part: both add up."""
    return complex(time.perf_counter(), time.process_time())


def share(part: complex, whole: complex) -> tuple[float, float]:
    """Of wall time, and of CPU time."""
    return part.real / whole.real, part.imag / whole.imag


def timed(function: Callable[..., Any], name: str, spent: Seconds) -> Callable[..., Any]:
    """`function`, which adds to ``spent[name]`` what it takes once all ranks are there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        waiting = now()
        dist.barrier()
        start = now()
        spent["waiting"] += start - waiting
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += now() - start

    return call


@contextlib.contextmanager
def watched() -> Iterator[Seconds]:
    """Time the guards of everything that is compiled and run in here."""
    spent: Seconds = defaultdict(complex)
    checked = replicas.checked

    def watched_run(*args: Any) -> Callable[[list[Any]], Any]:
        run, before = checked(*args), 0

        def call(values: list[Any]) -> Any:
            nonlocal before
            start, waited = now(), spent["waiting"]
            try:
                return run(values)
            finally:
                name = f"run {before}"
                spent[name] += now() - start - (spent["waiting"] - waited)
                before += 1

        return call

    with (
        mock.patch.object(guards, "agree", timed(guards.agree, "programs", spent)),
        mock.patch.object(backend, "_program", timed(backend._program, "programs", spent)),
        mock.patch.object(replicas, "compare", timed(replicas.compare, "inputs", spent)),
        mock.patch.object(replicas, "checked", watched_run),
    ):
        yield spent


def one_round(benchmark: Benchmark, target: str) -> Seconds:
    """Seconds of a first call and of a second one, and of the guards in them."""
    torch._dynamo.reset()
    gc.collect()
    options = {"target": target}
    with watched() as spent, torch.no_grad():
        program = torch.compile(benchmark.model, backend="ascend_sp", options=options)
        start = now()
        benchmark.first_output(program)
        spent["first call"] = now() - start
        benchmark.first_output(program)
    return dict(spent)


def around_nothing(inputs: int, calls: int = 20000) -> float:
    """Seconds that the guards take around a program that does nothing, when none is due."""
    topology = resolve(None, None, "cpu")

    def nothing(args: list[Any]) -> list[Any]:
        return args

    which = [replicas.Input(str(i)) for i in range(inputs)]
    run = stalls.guarded(nothing, topology, "nothing")
    run = replicas.checked(run, topology, "nothing", which, "once", 60)
    values: list[Any] = [torch.zeros(1)] * inputs
    run(values)
    times = []
    for call in (run, nothing):
        start = time.perf_counter()
        for _ in range(calls):
            call(values)
        times.append((time.perf_counter() - start) / calls)
    return times[0] - times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--model", default="flux", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()  # else a full collection, of all that PyTorch holds, falls on whoever is running
    torch._inductor.config.force_disable_caches = True
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    benchmark = MODELS[args.model]()
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    runs = []
    for i in range(args.rounds + 1):
        t = one_round(benchmark, args.target)
        if i == 0 and args.rounds > 1:
            continue  # imports, and the compiler's own warm-up
        compiling = t["first call"] - t["run 0"] - t["waiting"]
        found["programs, of the compile"].append(share(t["programs"], compiling))
        found["inputs, of the first run"].append(share(t["inputs"], t["run 0"]))
        runs.append(t["run 1"].real)
    later = around_nothing(len(list(benchmark.model.parameters()))) / statistics.median(runs)
    if dist.get_rank() == 0:
        print(benchmark.name, "on", dist.get_world_size(), "ranks,", args.target)
        for name, shares in found.items():
            for i, clock in enumerate(("wall", "CPU")):
                each = [s[i] for s in shares]
                listed = ", ".join(f"{s:.2%}" for s in each)
                print(f"{name:26} {clock:5} {statistics.median(each):8.2%}   ({listed})")
        print(f"{'all guards, of a later run':26} wall  {later:8.5%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
