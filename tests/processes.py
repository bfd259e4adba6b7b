"""Real ranks: processes joined by gloo, every one of them bounded by a timeout."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

# Imported once for all tests, before any rank is forked; only imports, so no threads are lost.
PRELOAD = [
    "models",
    "encoders",
    "toy",
    "ascend_sp",
    "torch._inductor.compile_fx",
    "torch._dynamo.utils",
    "instruction_sets",
]


def collect_rarely() -> None:
    """Keep Python's garbage collector from walking over all of PyTorch again and again."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@dataclass
class Outcome:
    """What one rank returned, or the text of what it raised."""

    value: Any = None
    error: str | None = None


def _main(
    fn: Callable[..., Any], rank: int, world: int, store: str, out: Any, args: tuple, env: dict
) -> None:
    os.environ.update(env)
    collect_rarely()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=float(os.environ.get("GROUP_TIMEOUT", "60"))),
        )
        # A rank that is done or fails at once would close its connections while its peers still
        # make theirs, and they would report that.
        dist.barrier()
        with torch.no_grad():
            out.put((rank, Outcome(fn(rank, world, *args))))
    except BaseException:
        out.put((rank, Outcome(error=traceback.format_exc())))
    finally:
        # What a rank that fails does in the field: it goes, and its connections close.
        out.close()
        out.join_thread()
        os._exit(0)


def run(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    lost: Sequence[int] = (),
    **env: str,
) -> list[Outcome]:
    """``fn(rank, world, *args)`` on `world` gloo ranks; fails if one is not done in `timeout` s.

    Nobody waits for the ranks `lost`, which a test kills or puts to sleep. `env` is added to each
    rank's environment; GROUP_TIMEOUT there is the process group's own timeout, in seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out = context.Queue()
    with TemporaryDirectory() as folder:
        store = f"{folder}/store"
        processes = [
            context.Process(target=_main, args=(fn, r, world, store, out, args, env))
            for r in range(world)
        ]
        for p in processes:
            p.start()
        outcomes: dict[int, Outcome] = {}
        end = time.monotonic() + timeout
        try:
            while not set(range(world)) - set(lost) <= set(outcomes):
                rank, outcome = out.get(timeout=max(0.1, end - time.monotonic()))
                outcomes[rank] = outcome
        except queue.Empty:
            late = sorted(set(range(world)) - set(outcomes) - set(lost))
            raise AssertionError(f"ranks {late} hang; the others: {outcomes}") from None
        finally:
            for p in processes:
                p.kill()
                p.join()
    return [outcomes[r] for r in range(world) if r not in lost]


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails with their tracebacks if one raised."""
    errors = [o.error for o in outcomes if o.error]
    assert not errors, "\n".join(errors)
    return [o.value for o in outcomes]


def errors(outcomes: list[Outcome]) -> list[str]:
    """What the ranks raised; fails if one did not."""
    assert all(o.error for o in outcomes), outcomes
    return [o.error or "" for o in outcomes]
