"""Everything that a server will meet, once, before it serves: `warm_up`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.report.page import duration, size
from ascend_sp.runtime._pytorch import tree_leaves
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import captured_graphs

Call: TypeAlias = "Mapping[str, Any] | tuple[Any, ...]"


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up took on this rank."""

    calls: int
    programs: int
    """Graphs that were compiled."""
    captures: int
    """ACL graphs that were captured; none but on NPUs."""
    memory: int
    """Bytes by which what PyTorch holds of the device's memory has grown; 0 on CPUs."""
    seconds: float
    slowest: float
    """Seconds of the longest call."""

    def __str__(self) -> str:
        captures = f", {self.captures} captures" if self.captures else ""
        memory = f", {size(self.memory)} of memory" if self.memory else ""
        return (
            f"{self.calls} calls in {duration(self.seconds)} (the longest {duration(self.slowest)}"
            f"): {self.programs} programs{captures}{memory}"
        )


def warm_up(
    compiled: Callable[..., Any], calls: Iterable[Call], *, progress: bool = True
) -> WarmUp:
    """Call a compiled model once for each set of sizes that is to be served.

    All ranks that share a sequence do this with the same calls in the same order: a rank that
    compiles waits for the others. The order matters: after the first call that differs from the
    one before in a size, Dynamo makes a program in which that size is a symbol.

    Args:
        compiled: what `torch.compile` returned.
        calls: of each call its keyword arguments (a dict) or its arguments (a tuple), tensors on
            the device that will serve. Values do not matter, sizes and dtypes do. A generator
            keeps no more than one set of them in memory.
        progress: show a bar on rank 0, if there is a terminal.

    Returns:
        What it took.

    Raises:
        ConfigError: a call is neither a dict nor a tuple.
        AscendSPError: what a call raises.
    """
    first = not (dist.is_available() and dist.is_initialized() and dist.get_rank())
    shown = progress and first and sys.stderr.isatty()
    programs, captures = _pytorch.counted("graphs"), captured_graphs()
    before: dict[str, int] = {}
    start, slowest, done = time.perf_counter(), 0.0, 0
    total = len(calls) if isinstance(calls, (list, tuple)) else None
    with torch.no_grad():
        for call in calls:
            if not isinstance(call, (Mapping, tuple)):
                raise ConfigError(
                    f"call {done} of warm_up is a {type(call).__name__}. Give each call as a dict "
                    "of keyword arguments, or as a tuple of arguments."
                )
            device = _device(call)
            before.setdefault(device, _memory(device))
            own = time.perf_counter()
            if isinstance(call, Mapping):
                compiled(**call)
            else:
                compiled(*call)
            _wait_for(device)
            slowest = max(slowest, time.perf_counter() - own)
            done += 1
            if shown:
                _show(done, total, time.perf_counter() - start)
    return WarmUp(
        done,
        _pytorch.counted("graphs") - programs,
        captured_graphs() - captures,
        sum(_memory(device) - held for device, held in before.items()),
        time.perf_counter() - start,
        slowest,
    )


def _show(done: int, total: int | None, seconds: float) -> None:
    """One line that grows, on the terminal."""
    bar = "#" * (20 * done // total) if total else ""
    of = f" of {total} |{bar:20}|" if total else ""
    end = "\n" if done == total else ""
    sys.stderr.write(f"\rascend_sp warms up: {done}{of} {duration(seconds)}  {end}")
    sys.stderr.flush()


def _device(call: Call) -> str:
    """Type of the device that a call is for."""
    given = tree_leaves(dict(call) if isinstance(call, Mapping) else call)
    types = (x.device.type for x in given if isinstance(x, torch.Tensor))
    return next((t for t in types if t != "cpu"), "cpu")


def _memory(device: str) -> int:
    """Bytes of the device that PyTorch's allocator holds; 0 for CPUs, which have none."""
    return 0 if device == "cpu" else int(torch.get_device_module(device).memory_reserved())


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
