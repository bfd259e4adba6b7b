"""Process groups on NPUs: what torchair would misread, and what cannot work, is seen to."""

from __future__ import annotations

import os
from typing import Any

import simulated_npu
import torch.distributed as dist

from ascend_sp.runtime.errors import TopologyError
from ascend_sp.runtime.topology import resolve


def groups(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, backend in enumerate(("hccl", "cpu:gloo,npu:hccl", "gloo")):
        store = f"file://{folder}/store{i}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
        try:
            first, again = (resolve(None, None, "npu") for _ in range(2))
            group = dist.distributed_c10d._resolve_process_group(first.group_name)
            found[backend] = {
                "config": dist.get_backend_config(group),
                "ranks": first.ranks,
                "same": first == again,
                "own": first.group_name != dist.group.WORLD.group_name,
            }
        except TopologyError as e:
            found[backend] = str(e)
        if backend == "gloo":
            # On CPU tensors the same group is right.
            found["cpu"] = resolve(None, None, "cpu").ranks
        dist.destroy_process_group()
    return found


def test_groups(tmp_path: os.PathLike) -> None:
    # These ranks call no collective: without PyTorch's barrier after an init, one of them destroys
    # its group while the other still connects to it.
    together = {"TORCH_DIST_INIT_BARRIER": "1"}
    for found in simulated_npu.run(groups, 2, str(tmp_path), grouped=False, **together):
        assert found["hccl"] == {
            "config": "npu:hccl",
            "ranks": (0, 1),
            "same": True,
            "own": False,
        }
        # torchair takes the CPU for the device of a group that has both.
        assert found["cpu:gloo,npu:hccl"] == {
            "config": "npu:hccl",
            "ranks": (0, 1),
            "same": True,
            "own": True,
        }
        assert "no backend for them, only cpu:gloo" in found["gloo"]
        assert 'init_process_group("hccl")' in found["gloo"]
        assert found["cpu"] == (0, 1)
