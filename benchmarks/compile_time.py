"""Compile time of FLUX at reduced width, split by phase, for 6 and for all 57 blocks.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/compile_time.py

Each row is a phase's share of the first call of the larger model, and how many times longer it took
than for the smaller one, whose number of blocks is 57 / 6 = 9.5 times less. Caches are off.
Python's garbage collector is a row of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel


@contextmanager
def collector_apart() -> Iterator[Callable[[], float]]:
    """Stop `time.perf_counter` while the garbage collector runs; yields the seconds that it ran.

    A full collection walks all of the process's objects, PyTorch's included. Whichever phase is
    running pays for it: a pass over 57 blocks gets half as long again, one over 6 blocks never
    meets it, and the pass that allocates most seems to grow faster than the model.
    """
    clock = time.perf_counter
    began = spent = 0.0

    def note(phase: str, info: dict[str, Any]) -> None:
        nonlocal began, spent
        if phase == "start":
            began = clock()
        else:
            spent += clock() - began

    def clock_apart() -> float:
        return clock() - spent

    gc.callbacks.append(note)
    try:
        with mock.patch.object(time, "perf_counter", clock_apart):
            yield lambda: spent
    finally:
        gc.callbacks.remove(note)


def first_call(double: int, single: int, target: str) -> dict[str, float]:
    """Seconds of each phase of the first call, on this rank."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
        "return_dict": False,
    }
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), collector_apart() as collecting:
        options = {"dump_dir": folder, "target": target}
        start = time.perf_counter()
        torch.compile(model, backend="ascend_sp", options=options, fullgraph=True)(**inputs)
        whole = time.perf_counter() - start
        (file,) = Path(folder).glob(f"graph_*/rank_{rank}/compile_time.json")
        times = json.loads(file.read_text())
    # What is left is Dynamo's trace, writing the dump and the first run.
    rest = whole - sum(times.values())
    return {"Dynamo and the rest": rest, "garbage collection": collecting(), **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="inductor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    first_call(1, 1, args.target)  # imports, and the compiler's own warm-up
    small = first_call(2, 4, args.target)
    large = first_call(19, 38, args.target)
    if dist.get_rank() == 0:
        total = sum(large.values())
        print(f"{'phase':24} {'share at 57 blocks':>20} {'57 blocks / 6 blocks':>22}")
        for phase, seconds in large.items():
            print(f"{phase:24} {seconds / total:20.1%} {seconds / small[phase]:22.1f}")
        print(f"{'all':24} {1:20.1%} {total / sum(small.values()):22.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
