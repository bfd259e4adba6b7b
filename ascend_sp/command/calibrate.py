"""Measure the rates of this machine for the cost model, and write them to a file.

    torchrun --nproc-per-node 2 -m ascend_sp calibrate --out device.json

All ranks measure at the same time, since they will share caches and memory in a step too. With one
rank there is no link to measure: the table's numbers of the device are kept.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ascend_sp.graph.cost.device import DeviceModel, find
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import DEVICE, ascend
from ascend_sp.runtime.versions import software

DEVICE_TYPES = ("cpu", DEVICE, "cuda")
BLOCK = 2e-3
"""Seconds that a timed block of calls shall last at least."""
REPEATS = 7
PATIENCE = 0.7
"""Seconds after which three repeats are enough."""
LAYERS = 4
"""Matrices that a linear takes in turn."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: the shapes of transformers that a device of this speed runs in a moment."""

    products: tuple[tuple[int, int, int], ...]
    """Rows, input and output features of linears."""
    attention: tuple[int, int, int]
    """Heads, rows and size of a head."""
    copied: int
    """Elements of a tensor too large for caches, since a step has many between two uses of one."""
    activated: int
    """Elements of a tensor that is put through a GELU."""
    transfers: tuple[int, ...]
    """Bytes that a rank puts into an all-to-all."""


SMALL = Sizes(
    ((576, 1024, 1024), (576, 1024, 4096), (576, 4096, 1024)),
    (4, 1152, 128),
    1 << 22,
    1 << 21,
    (1 << 14, 1 << 17, 1 << 20, 1 << 21, 1 << 22),
)
LARGE = Sizes(
    ((2304, 3072, 3072), (2304, 3072, 12288), (2304, 12288, 3072)),
    (12, 4608, 128),
    1 << 26,
    1 << 25,
    (1 << 16, 1 << 19, 1 << 22, 1 << 24, 1 << 26),
)


class Clock:
    """Median seconds of calls on one device, the mean over ranks.

    Args:
        device: where they run.
        busy: count the CPU seconds of this process, which other programs on the machine disturb
            less than the time on the wall. Sound for one thread a rank on the CPU.
    """

    def __init__(self, device: torch.device, busy: bool = False) -> None:
        self.device = device
        self.now = time.process_time if busy else time.perf_counter

    def seconds(self, call: Callable[[], object]) -> float:
        """What one `call` takes when the device is kept busy with it."""
        call()
        calls = max(1, round(BLOCK / max(self._block(call, 1), 1e-9)))
        spent: list[float] = []
        end = time.perf_counter() + PATIENCE
        while len(spent) < REPEATS and (len(spent) < 3 or time.perf_counter() < end):
            spent.append(self._block(call, calls))
        return self._mean(statistics.median(spent))

    def together(self, call: Callable[[], object]) -> float:
        """What one `call`, a collective, takes when all ranks come to it at once."""
        spent = []
        for _ in range(2 * REPEATS):  # the same on all ranks
            dist.barrier()
            spent.append(self._block(call, 1))
        return self._mean(statistics.median(spent))

    def _block(self, call: Callable[[], object], calls: int) -> float:
        start = self.now()
        for _ in range(calls):
            call()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return (self.now() - start) / calls

    def _mean(self, value: float) -> float:
        if not dist.is_initialized():
            return value
        everyone = torch.tensor([value], dtype=torch.float64)
        if self.device.type != "cpu":
            everyone = everyone.float().to(self.device)
        dist.all_reduce(everyone)
        return everyone.item() / dist.get_world_size()


def product_rate(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> float:
    """Flop/s of linears, all shapes of `sizes` together."""
    flops = spent = 0.0
    for rows, inner, outer in sizes.products:
        x = torch.randn(rows, inner, device=clock.device).to(dtype)
        b = torch.zeros(outer, device=clock.device, dtype=dtype)
        # As in a model, the weights of one call are not in the caches at the next.
        layers = [torch.randn(outer, inner, device=clock.device).to(dtype) for _ in range(LAYERS)]
        weights = itertools.cycle(layers)

        def linear(x: Tensor = x, b: Tensor = b, weights: Iterator[Tensor] = weights) -> Tensor:
            return F.linear(x, next(weights), b)

        flops += 2.0 * rows * inner * outer
        spent += clock.seconds(linear)
    return flops / spent


def attention_rate(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> float:
    """Flop/s of `F.scaled_dot_product_attention`."""
    heads, rows, dim = sizes.attention
    q, k, v = (torch.randn(1, rows, heads, dim, device=clock.device).to(dtype) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (
        4.0
        * heads
        * rows
        * rows
        * dim
        / clock.seconds(lambda: F.scaled_dot_product_attention(q, k, v))
    )


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s of ``seconds = latency + size / bandwidth``.

    Least squares of the relative errors, so that the small sizes say what the latency is.
    """
    x = torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(x), x], 1) / y[:, None]
    latency, per_byte = (
        torch.linalg.lstsq(rows, torch.ones_like(y)[:, None]).solution[:, 0].tolist()
    )
    # Noise may tilt the line so far that one of them is negative.
    latency = latency if latency > 0 else min(seconds)
    return latency, 1 / per_byte if per_byte > 0 else max(sizes) / max(seconds)


def link(clock: Clock, sizes: Sizes) -> tuple[float, float]:
    """Latency and bandwidth of an even all-to-all, by the bytes that a rank sends.

    With a clock that counts CPU seconds: what it takes of the core.
    """
    world = dist.get_world_size()
    sent, spent = [], []
    for size in sizes.transfers:
        x = torch.zeros(size // 4 // world * world, device=clock.device)
        sent.append(x.nbytes * (world - 1) / world)
        spent.append(clock.together(partial(dist.all_to_all_single, torch.empty_like(x), x)))
    return fit(sent, spent)


def calibrate(clock: Clock, sizes: Sizes, shared_link: bool) -> DeviceModel:
    """Measure a device with all ranks of the default group, if there is one.

    Args:
        clock: of this rank's device.
        sizes: what is run.
        shared_link: whether the link of a rank is one for all peers; cannot be measured.
    """
    device = clock.device
    base = find("auto", device.type, ascend().soc)
    world = dist.get_world_size() if dist.is_initialized() else 1
    x = torch.randn(sizes.copied, device=device)
    y, tiny = torch.empty_like(x), torch.zeros(8, device=device)
    active = x[: sizes.activated]
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type != "cpu" else ())
    with torch.no_grad():
        launch = clock.seconds(lambda: torch.neg(tiny))
        model = replace(
            base,
            name=f"{device.type}, calibrated",
            matmul={str(d)[6:]: product_rate(clock, sizes, d) for d in dtypes},
            attention={str(d)[6:]: attention_rate(clock, sizes, d) for d in dtypes},
            memory=2 * x.nbytes / clock.seconds(lambda: y.copy_(x)),
            transcendental=active.numel()
            / clock.seconds(lambda: F.gelu(active, approximate="tanh")),
            launch=launch,
            shared_link=shared_link,
            sources=(_where(device, world),),
        )
        if world == 1:
            kept = f"latency and bandwidth of a link: not measured, those of {base.name!r}"
            return replace(model, sources=(*model.sources, kept), shared_link=base.shared_link)
        latency, bandwidth = link(clock, sizes)
        # Sockets are served by the core that computes; links of accelerators serve themselves.
        launch, rate = link(Clock(device, True), sizes) if device.type == "cpu" else (0.0, math.inf)
    peers = 1 if shared_link else world - 1
    return replace(
        model,
        link_latency=latency,
        link_bandwidth=bandwidth / peers,
        link_launch=launch,
        link_work=1 / rate,
    )


def _where(device: torch.device, world: int) -> str:
    chip = ascend().soc if device.type == DEVICE else device.type
    threads = f", {torch.get_num_threads()} threads a rank" if device.type == "cpu" else ""
    where = f"{chip}, {world} ranks{threads}, torch {software().torch}"
    return f"measured by `ascend_sp calibrate`: {where}"


def table(model: DeviceModel, world: int) -> str:
    """The measured numbers, for people."""
    rows = [
        *((f"matmul, {d}", f"{r / 1e9:.1f} Gflop/s") for d, r in model.matmul.items()),
        *((f"attention, {d}", f"{r / 1e9:.1f} Gflop/s") for d, r in model.attention.items()),
        ("memory", f"{model.memory / 1e9:.2f} GB/s"),
        ("exp, tanh, erf...", f"{model.transcendental / 1e9:.3f} G elements/s"),
        ("kernel, at least", f"{model.launch * 1e6:.2f} us"),
        ("all-to-all, at least", f"{model.link_latency * 1e6:.1f} us"),
        ("link, one direction", f"{model.link_bandwidth / 1e9:.3f} GB/s"),
        ("device for it, at least", f"{model.link_launch * 1e6:.1f} us"),
        ("device for it, a MB sent", f"{model.link_work * 1e12:.1f} us"),
    ]
    if world == 1:
        rows[-4:] = [(what, value + " (not measured: one rank)") for what, value in rows[-4:]]
    return "\n".join(f"{what:24}{value}" for what, value in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: the device or the file cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m ascend_sp calibrate", description=__doc__)
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=DEVICE_TYPES, help="default: the accelerator, or cpu")
    parser.add_argument(
        "--shared-link",
        action=argparse.BooleanOptionalAction,
        help="one link for all peers (default on cpu), not one for each (default elsewhere)",
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="on the CPU, count CPU seconds: for a machine that runs other programs too",
    )
    given = parser.parse_args(arguments)
    out = Path(given.out)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(
            f"--out is {given.out!r}; it must be a file that can be written, in a folder that "
            "exists."
        )
    device = _device(given.device)
    ours = "RANK" in os.environ and not dist.is_initialized()
    if ours:
        dist.init_process_group(
            dist.get_default_backend_for_device(device), timeout=timedelta(minutes=5)
        )
    try:
        shared = device.type == "cpu" if given.shared_link is None else given.shared_link
        clock = Clock(device, given.busy and device.type == "cpu")
        model = calibrate(clock, SMALL if device.type == "cpu" else LARGE, shared)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or dist.get_rank() == 0:
            out.write_text(model.to_json())
            print(f"Measured on this machine ({world} ranks), written to {out}:")
            print(table(model, world))
    finally:
        if ours:
            dist.destroy_process_group()


def _device(kind: str | None) -> torch.device:
    """This rank's device of a type, made current."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = kind or (found.type if found is not None else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if found is None or found.type != kind:
        have = "cpu" if found is None else f"cpu and {found.type}"
        raise ConfigError(
            f"--device is {kind!r}, which PyTorch does not see here; it sees {have}. On Ascend, "
            "install torch_npu and source CANN's set_env.sh."
        )
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return device
