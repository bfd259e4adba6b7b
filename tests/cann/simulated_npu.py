"""What the tests of this folder share: the installed simulator, ranks, captured programs."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import cannsim

# Before anything imports torch_npu: in the process of the tests, and in each spawned rank, which
# imports this module first.
if "CANNSIM_LIB_DIR" in os.environ:
    cannsim.install()

HERE = os.path.dirname(os.path.abspath(__file__))


def _main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    store: str,
    out: Any,
    args: tuple,
    env: dict,
    grouped: bool,
) -> None:
    os.environ.update(env)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        torch.npu.set_device(rank)  # as under torchrun: one process a device
        if grouped:
            dist.init_process_group(
                "hccl",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
        with torch.no_grad():
            out.put((rank, True, fn(rank, world, *args)))
        if grouped:
            dist.destroy_process_group()
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
        out.close()
        out.join_thread()
        os._exit(1)  # peers may be in a collective; a failed rank does not wait for them


def run(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 90,
    method: str = "forkserver",
    grouped: bool = True,
    **env: str,
) -> list[Any]:
    """``fn(rank, world, *args)`` in `world` processes with an hccl group; what they returned.

    Also fails if a process does not end by itself after that. `env` is set before torch_npu is
    imported only with ``method="spawn"``: a fork already has it, and knows its CANN version.
    """
    # The fork server imports what is preloaded before it learns our sys.path.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if HERE not in paths:
        ours = [HERE, os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]
        os.environ["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, paths)])
    context = mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["preloaded"])
    out = context.Queue()
    found: dict[int, Any] = {}
    errors = []
    with TemporaryDirectory() as folder:
        env["CANNSIM_TMP"] = folder
        processes = [
            context.Process(
                target=_main, args=(fn, r, world, f"{folder}/store", out, args, env, grouped)
            )
            for r in range(world)
        ]
        before = dict(os.environ)
        os.environ.update(env)  # for spawned processes, which import torch_npu on their way here
        for p in processes:
            p.start()
        os.environ.clear()
        os.environ.update(before)
        end = time.monotonic() + timeout
        try:
            while len(found) + len(errors) < world:
                rank, ok, value = out.get(timeout=max(0.1, end - time.monotonic()))
                if ok:
                    found[rank] = value
                else:
                    errors.append(f"rank {rank}: {value}")
                    end = min(end, time.monotonic() + 5)
            for p in processes:
                p.join(max(0.1, end - time.monotonic()))
            stuck = [r for r, p in enumerate(processes) if p.exitcode is None]
            assert errors or not stuck, f"ranks {stuck} do not end"
        except queue.Empty:
            if not errors:
                raise AssertionError(f"ranks hang; these are done: {sorted(found)}") from None
        finally:
            for p in processes:
                p.kill()
                p.join()
    assert not errors, "\n".join(errors)
    return [found[r] for r in range(world)]
