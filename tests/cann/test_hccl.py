"""Collectives between processes, through torch.distributed's hccl backend."""

from __future__ import annotations

import time
from typing import Any

import simulated_npu
import torch
import torch.distributed as dist


def _collectives(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = (torch.arange(12) + 12 * rank).remainder(7).to(dtype)
        every = [(torch.arange(12) + 12 * r).remainder(7).to(dtype) for r in range(world)]
        out = torch.empty(12, dtype=dtype).to("npu")
        dist.all_to_all_single(out, x.to("npu"))
        expected = torch.cat([e.chunk(world)[rank] for e in every])
        assert torch.equal(out.cpu(), expected)

        gathered = torch.empty(12 * world, dtype=dtype).to("npu")
        dist.all_gather_into_tensor(gathered, x.to("npu"))
        assert torch.equal(gathered.cpu(), torch.cat(every))

        sent = x.to("npu")
        dist.broadcast(sent, 1)
        assert torch.equal(sent.cpu(), every[1])
        if dtype is torch.bool:
            continue
        stacked = torch.stack(every).float() if dtype.is_floating_point else torch.stack(every)
        for op, combined in (
            (dist.ReduceOp.SUM, stacked.sum(0)),
            (dist.ReduceOp.MAX, stacked.amax(0)),
            (dist.ReduceOp.MIN, stacked.amin(0)),
            (dist.ReduceOp.PRODUCT, stacked.prod(0)),
        ):
            reduced = x.to("npu")
            dist.all_reduce(reduced, op)
            assert torch.equal(reduced.cpu(), combined.to(dtype)), op
            part = torch.empty(12 // world, dtype=dtype).to("npu")
            dist.reduce_scatter_tensor(part, x.to("npu"), op)
            assert torch.equal(part.cpu(), combined.to(dtype).chunk(world)[rank]), op

    # Uneven: rank r sends r + 1 rows to rank 0, and one to the others.
    sends = [rank + 1] + [1] * (world - 1)
    receives = [r + 1 if rank == 0 else 1 for r in range(world)]
    x = torch.full((sum(sends), 2), float(rank)).to("npu")
    out = torch.empty(sum(receives), 2).to("npu")
    dist.all_to_all_single(out, x, receives, sends)
    expected = torch.cat([torch.full((n, 2), float(r)) for r, n in enumerate(receives)])
    assert torch.equal(out.cpu(), expected)

    # A group of some ranks has a communicator of its own.
    pair = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        x = torch.tensor([float(rank)]).to("npu")
        dist.all_reduce(x, group=pair)
        assert x.item() == world - 1
        name = pair._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
        world_group = dist.group.WORLD._get_backend(torch.device("npu"))
        assert name and name != world_group.get_hccl_comm_name(rank)

    x = torch.tensor([float(rank)]).to("npu")
    if rank == 0:
        dist.send(x + 5, 1)
    elif rank == 1:
        dist.recv(x, 0)
        assert x.item() == 5
    dist.barrier()


def test_collectives_of_three_ranks() -> None:
    simulated_npu.run(_collectives, 3)


def _alone(rank: int, world: int) -> Any:
    if rank:
        time.sleep(2.5)  # alive, and not in the collective
        return None
    start = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1).to("npu"))
    except RuntimeError as e:
        return time.monotonic() - start, str(e)
    raise AssertionError("nobody else was there")


def test_a_rank_that_waits_in_vain_gets_an_error() -> None:
    seconds, text = simulated_npu.run(_alone, 2, CANNSIM_HCCL_TIMEOUT="1")[0]
    assert seconds < 2.5
    assert "HCCL allreduce" in text or "Hccl" in text or "HCCL" in text
