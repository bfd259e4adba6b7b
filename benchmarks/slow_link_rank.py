"""One rank of `slow_link.py`: compiles and times programs as its parent asks, over a pipe."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cores import one_core
from quota import inside, own_threads, serve_first
from ranks import Prepared, Times
from torch import fx

from ascend_sp.compiler import ladder, pipeline
from ascend_sp.compiler.config import Config
from ascend_sp.graph.context import PassContext
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.ops import ALL_GATHER, ALL_TO_ALL, STARTS, WAIT
from models import MODELS, Benchmark

SMALL: dict[str, dict[str, int]] = {
    "flux": {"double": 1, "single": 2, "heads": 4},
    "qwen": {"blocks": 2, "heads": 4},
    "z_image": {"blocks": 2, "heads": 4},
    "flux_wide": {"double": 1, "single": 2, "heads": 4},
}
"""The same models in a size for tests."""


@torch.library.custom_op("slow_link::copies", mutates_args=())
def copies(x: torch.Tensor, times: int) -> torch.Tensor:
    """`times` copies of `x`; opaque to Inductor, as a collective is, so it fuses nothing more."""
    return x.repeat(times)


@copies.register_fake
def _(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.new_empty(times * x.shape[0], *x.shape[1:])


def without_communication(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """A pass: every collective becomes a local copy of the same shape. Its numbers are wrong."""
    for node in list(gm.graph.nodes):
        if node.target is WAIT:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if node.target in STARTS:
            times = ctx.topology.size if node.target is ALL_GATHER else 1
            with gm.graph.inserting_before(node):
                copy = gm.graph.call_function(
                    torch.ops.slow_link.copies.default, (node.args[0], times)
                )
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy)
            gm.graph.erase_node(node)
    return gm


@contextmanager
def no_communication() -> Iterator[None]:
    """Programs compiled meanwhile hold no collectives."""
    usual = ladder.compile_aten
    passes = (*pipeline.PASSES, pipeline.Pass(without_communication))
    ladder.compile_aten = partial(pipeline.compile_aten, passes=passes)
    try:
        yield
    finally:
        ladder.compile_aten = usual


def bytes_out(folder: str, world: int) -> float:
    """Bytes that this rank sends to others in a step, from the dumps in `folder`."""
    total = 0.0
    for file in Path(folder).glob(f"graph_*/rank_{dist.get_rank()}/collectives.json"):
        for row in json.loads(file.read_text()):
            gather = row["op"] == ALL_GATHER._opname
            own = row["op"] == ALL_TO_ALL._opname
            per_rank = 1 if gather else 1 / world if own else 2 / world
            total += row["bytes"] * per_rank * (world - 1)
    return total


class Rank:
    """The requests, one method each.

    Args:
        quota: the control group of the thread that computes, while it is measured.
    """

    def __init__(self, quota: Path | None = None) -> None:
        self.quota = quota
        self.programs: dict[str, Any] = {}
        self.benchmark: Benchmark

    def prepare(
        self,
        model: str,
        small: bool,
        programs: dict[str, dict[str, Any]],
        local: list[str],
        more: bool = False,
    ) -> Prepared:
        """Compile `programs`, name -> options; those in `local` without communication.

        With `more` they join those that there are.
        """
        if not more:
            torch.compiler.reset()
            self.benchmark = MODELS[model](**(SMALL[model] if small else {}))
            self.programs = {}
            self.want: torch.Tensor | None = None
            self.told = Prepared(self.benchmark.name)
        told, want = self.told, self.want
        for name, options in programs.items():
            try:
                Config.load(options)
            except ConfigError as e:
                told.absent[name] = str(e).partition(". ")[0]
                continue
            with tempfile.TemporaryDirectory() as folder:
                program = torch.compile(
                    self.benchmark.model,
                    backend="ascend_sp",
                    fullgraph=True,
                    dynamic=False,
                    options={**options, "dump_dir": folder},
                )
                if name in local:
                    with no_communication():
                        got = self.benchmark.first_output(program)
                else:
                    got = self.benchmark.first_output(program)
                told.bytes[name] = bytes_out(folder, dist.get_world_size())
            assert (told.bytes[name] > 0) is (name not in local), told.bytes
            self.programs[name] = program
            if name not in local:
                want = got if want is None else want
                told.errors[name] = ((got - want).abs().max() / want.abs().max()).item()
        self.want = want
        return told

    def measure(self, names: list[str], rounds: int) -> Times:
        """Time each program once a round, in turns, after a first round to warm up."""
        with one_core(dist.get_rank(), dist.get_world_size()), inside(self.quota):
            return self._measure(names, rounds)

    def _measure(self, names: list[str], rounds: int) -> Times:
        times = Times({n: [] for n in names}, {n: [] for n in names})
        for round_ in range(rounds + 1):
            # Whoever follows one program finds the cores and the link as that left them: turn.
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                self.benchmark.first_output(self.programs[name])
                if round_:
                    times.wall[name].append(time.perf_counter() - wall)
                    times.cpu[name].append(time.process_time() - cpu)
        dist.barrier()
        return times

    def sockets(self, sizes: list[int], address: str) -> dict[int, float]:
        """Median seconds in which both ranks send so many bytes to each other at once."""
        rank = dist.get_rank()
        if rank == 0:
            with socket.create_server((address, 0)) as server:
                server.settimeout(20)
                dist.broadcast_object_list([server.getsockname()[1]], 0)
                peer = server.accept()[0]
        else:
            port = [0]
            dist.broadcast_object_list(port, 0)
            peer = socket.create_connection((address, port[0]), timeout=20)
        with peer:
            peer.settimeout(60)
            return {n: statistics.median(_exchange(peer, n) for _ in range(5)) for n in sizes}

    def all_to_alls(self, sizes: list[int]) -> dict[int, list[float]]:
        """Seconds of five even all-to-alls in which each rank sends so many bytes away."""
        world = dist.get_world_size()
        seconds: dict[int, list[float]] = {}
        for n in sizes:
            x = torch.zeros(world, n // 4 // (world - 1))
            y = torch.empty_like(x)
            for _ in range(5):
                dist.barrier()
                start = time.perf_counter()
                dist.all_to_all_single(y, x)
                seconds.setdefault(n, []).append(time.perf_counter() - start)
        return seconds


def _exchange(peer: socket.socket, size: int) -> float:
    """Seconds to send `size` bytes and receive as many, once the other side is there."""
    data = bytes(size)
    dist.barrier()
    start = time.perf_counter()
    sender = threading.Thread(target=peer.sendall, args=(data,))
    sender.start()
    left = size
    while left:
        got = len(peer.recv(min(left, 1 << 20)))
        if not got:
            raise ConnectionError("the other rank closed its socket")
        left -= got
    sender.join()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rank", "world", "pipe"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--quota", type=Path)
    args = parser.parse_args()
    parent = Connection(args.pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends us
    torch.set_num_threads(1)
    # Programs of one model share its code, of which Dynamo keeps few versions.
    torch._dynamo.config.recompile_limit = 64
    before = own_threads()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{args.store}",
        rank=args.rank,
        world_size=args.world,
        timeout=timedelta(minutes=3),
    )
    rank = Rank(args.quota)
    if args.quota:
        serve_first(own_threads() - before)  # gloo's; those that have not run yet have no name
    try:
        with torch.no_grad():
            while True:
                method, arguments = parent.recv()
                parent.send(getattr(rank, method)(**arguments))
    except EOFError:  # the parent is done, or gone
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
